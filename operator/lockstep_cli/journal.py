"""Reads a run's journal from its store and folds it into one value: what happened, in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lockstep_api.constants import STOP_SUSPENDED
from lockstep_cli.errors import NotFoundError

Line = Mapping[str, Any]


class Source(Protocol):
    """The part of an object store that reading a journal needs."""

    def get(self, key: str) -> tuple[bytes, str]:
        """Content and version of an object."""
        ...

    def list(self, prefix: str) -> Iterable[str]:
        """Keys below a prefix."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step, as the leader folded it."""

    step: int
    at: float  # Unix seconds at its end
    loss: float  # nats per token
    tokens: int
    seconds: float
    epoch: int
    generation: int
    grad_norm: float | None = None
    lr: float | None = None
    sections: dict[str, float] = field(default_factory=dict)  # section → seconds
    recomputed: bool = False  # done before, in an older term


@dataclass(frozen=True, slots=True)
class Fault:
    """Something broke, and how the run got over it."""

    at: float
    cause: str
    rung: str
    epoch: int
    generation: int
    witness: str = ""
    slot: int | None = None
    rank: int | None = None
    node: str | None = None
    exit_code: int | None = None
    step: int | None = None  # newest step when it happened
    log_tail: tuple[str, ...] = ()
    message: str = ""
    recovered_at: float | None = None  # first new step after it
    seconds: dict[str, float] = field(default_factory=dict)  # part of the recovery → seconds
    steps_lost: int | None = None
    mended_with: int | None = None  # place of an earlier fault, whose recovery was this one's too: it has the cost


@dataclass(frozen=True, slots=True)
class Suspension:
    """The job was suspended: its workers were told to end, and until it was resumed it had no pods."""

    at: float
    until: float | None = None  # None: it still is


@dataclass(frozen=True, slots=True)
class Membership:
    """Who held which slot from ``at`` on."""

    at: float
    epoch: int
    slots: dict[int, tuple[str, str]]  # slot → (pod, node)
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """A generation was started, from a checkpoint's step or (None) from fresh weights."""

    at: float
    epoch: int
    generation: int
    restored_step: int | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint became durable."""

    at: float
    step: int
    seconds: float
    bytes: int
    manifest: str = ""


@dataclass(frozen=True, slots=True)
class OtherData:
    """Up to ``step`` training was done on other data than the job's; ``message`` says what differs."""

    step: int
    message: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Loss on held-out text, in nats per token."""

    at: float
    step: int
    loss: float
    tokens: int = 0
    bigram_loss: float | None = None  # a tuned interpolated bigram model on the same tokens


@dataclass(frozen=True, slots=True)
class Text:
    """What the model wrote."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Journal:
    """A run, folded. Times are Unix seconds; the ledger is in GPU-seconds."""

    steps: tuple[Step, ...] = ()
    faults: tuple[Fault, ...] = ()
    suspensions: tuple[Suspension, ...] = ()
    memberships: tuple[Membership, ...] = ()
    starts: tuple[Start, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    other_data: tuple[OtherData, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    texts: tuple[Text, ...] = ()
    ledger: dict[str, float] = field(default_factory=dict)
    outcome: str | None = None
    message: str = ""
    begin: float = 0.0
    end: float = 0.0

    @property
    def lineage(self) -> tuple[Step, ...]:
        """The steps that count: for each number the one of the newest term."""
        newest = {step.step: step for step in self.steps}
        return tuple(newest[number] for number in sorted(newest))

    @property
    def recomputed(self) -> int:
        """How many steps were done more than once."""
        return sum(step.recomputed for step in self.steps)

    @property
    def goodput(self) -> float | None:
        """Productive share of the GPU time, queued and suspended time left out."""
        counted = sum(seconds for name, seconds in self.ledger.items() if name not in ("queued", "suspended"))
        return self.ledger.get("productive", 0.0) / counted if counted > 0 else None


def read(source: Source, prefix: str = "") -> list[dict[str, Any]]:
    """All lines below ``prefix``/journal/, by time. A torn last line of a file is passed over.

    Raises NotFoundError when there is no journal.
    """
    keys = [key for key in source.list(f"{prefix}journal/") if key.endswith(".jsonl")]
    if not keys:
        raise NotFoundError("no journal there; the run writes one once its leader has started")
    lines: list[dict[str, Any]] = []
    for key in keys:
        content, _ = source.get(key)
        lines += parse_lines(content)
    # The sort is stable and files are listed in order, so lines of one instant stay as they were written.
    return sorted(lines, key=lambda line: float(line.get("at", 0)))


def parse_lines(content: bytes) -> list[dict[str, Any]]:
    """Objects of a JSON-lines text; what is no JSON object is passed over."""
    lines = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "kind" in line:
            lines.append(line)
    return lines


def fold(lines: Iterable[Line]) -> Journal:
    """The run that the lines tell of. Kinds that this version does not know are passed over."""
    folding = _Folding()
    for line in lines:
        handler = _HANDLERS.get(str(line.get("kind")))
        folding.see(float(line.get("at", 0.0)))
        if handler:
            handler(folding, line)
    return folding.journal()


class _Folding:
    """The fold's running state."""

    def __init__(self) -> None:
        self.begin = float("inf")
        self.end = 0.0
        self.steps: list[Step] = []
        self.faults: list[Fault] = []
        self.open_faults: list[int] = []
        self.suspensions: list[Suspension] = []
        self.memberships: list[Membership] = []
        self.starts: list[Start] = []
        self.checkpoints: list[Checkpoint] = []
        self.other_data: list[OtherData] = []
        self.evaluations: list[Evaluation] = []
        self.texts: list[Text] = []
        self.ledgers: dict[int, dict[str, float]] = {}
        self.highest_step = 0
        self.outcome: str | None = None
        self.message = ""

    def see(self, at: float) -> None:
        self.begin, self.end = min(self.begin, at), max(self.end, at)

    def on_step(self, line: Line) -> None:
        number = int(line["step"])
        term = _term(line)
        if self.steps and (self.steps[-1].epoch, self.steps[-1].generation) > term:
            return  # a straggling line of a term that is over
        self.steps.append(
            Step(
                step=number,
                at=float(line["at"]),
                loss=float(line["loss"]),
                tokens=int(line["tokens"]),
                seconds=float(line["seconds"]),
                epoch=term[0],
                generation=term[1],
                grad_norm=line.get("grad_norm"),
                lr=line.get("lr"),
                sections=dict(line.get("sections") or {}),
                recomputed=number <= self.highest_step,
            )
        )
        self.highest_step = max(self.highest_step, number)

    def on_fault(self, line: Line) -> None:
        epoch, generation = _term(line)
        self.open_faults.append(len(self.faults))
        self.faults.append(
            Fault(
                at=float(line["at"]),
                cause=str(line.get("cause", "Unknown")),
                rung=str(line.get("rung", "")),
                epoch=epoch,
                generation=generation,
                witness=str(line.get("witness") or ""),
                slot=line.get("slot"),
                rank=line.get("rank"),
                node=line.get("node") or self._node_of(line.get("slot")),
                exit_code=line.get("exit_code"),
                step=line.get("step"),
                log_tail=tuple(map(str, line.get("log_tail") or ())),
                message=str(line.get("message") or ""),
                seconds={"detect": float(line["detect_seconds"])} if line.get("detect_seconds") else {},
            )
        )

    def _node_of(self, slot: int | None) -> str | None:
        if slot is None or not self.memberships:
            return None
        return self.memberships[-1].slots.get(slot, ("", ""))[1] or None

    def on_membership(self, line: Line) -> None:
        epoch = int(line.get("epoch", 0))
        slots = {
            int(slot): (str(holder.get("pod", "")), str(holder.get("node", "")))
            for slot, holder in (line.get("slots") or {}).items()
        }
        if self.memberships and self.memberships[-1].epoch == epoch and self.memberships[-1].slots == slots:
            return
        self.outcome, self.message = None, ""  # one that was stopped before, or had failed, goes on
        lost = None if self._suspended else self._lost(slots)
        if self._suspended:
            self.suspensions[-1] = replace(self.suspensions[-1], until=float(line["at"]))
        if lost is not None and not self.open_faults:
            # The leader that saw it went down with it: the change of members is all that tells of the fault.
            slot, (_, node) = lost
            at = self.steps[-1].at if self.steps else float(line["at"])
            self.open_faults.append(len(self.faults))
            self.faults.append(
                Fault(at, str(line.get("cause") or "MemberLost"), "pod", epoch - 1, 0, slot=slot, node=node or None,
                      step=self.highest_step)
            )  # fmt: skip
        self.memberships.append(Membership(float(line["at"]), epoch, slots, str(line.get("cause") or "")))

    @property
    def _suspended(self) -> bool:
        return bool(self.suspensions) and self.suspensions[-1].until is None

    def _lost(self, slots: dict[int, tuple[str, str]]) -> tuple[int, tuple[str, str]] | None:
        """The first slot whose pod is another one than before."""
        before = self.memberships[-1].slots if self.memberships else {}
        return next(((s, before[s]) for s in sorted(before) if slots.get(s, ("",))[0] != before[s][0]), None)

    def on_start(self, line: Line) -> None:
        restore = line.get("restore") or {}
        self.starts.append(Start(float(line["at"]), *_term(line), restore.get("step")))

    def on_recovered(self, line: Line) -> None:
        seconds = {str(part): float(value) for part, value in (line.get("seconds") or {}).items()}
        for index in self.open_faults:
            fault = replace(self.faults[index], recovered_at=float(line["at"]))
            first = self.open_faults[0]
            if index == first:
                fault = replace(fault, seconds={**fault.seconds, **seconds}, steps_lost=line.get("steps_lost"))
            else:  # the stopwatch began with the first of them, and runs once
                fault = replace(fault, seconds={}, mended_with=first)
            self.faults[index] = fault
        self.open_faults.clear()

    def on_checkpoint(self, line: Line) -> None:
        self.checkpoints.append(
            Checkpoint(
                at=float(line["at"]),
                step=int(line["step"]),
                seconds=float(line.get("seconds") or 0.0),
                bytes=int(line.get("bytes") or 0),
                manifest=str(line.get("manifest", "")),
            )
        )

    def on_data_changed(self, line: Line) -> None:
        found = OtherData(int(line["step"]), str(line.get("message", "")))
        if found not in self.other_data:  # it is told at each start from that checkpoint
            self.other_data.append(found)

    def on_evaluate(self, line: Line) -> None:
        self.evaluations.append(
            Evaluation(
                at=float(line["at"]),
                step=int(line["step"]),
                loss=float(line["loss"]),
                tokens=int(line.get("tokens") or 0),
                bigram_loss=line.get("bigram_loss"),
            )
        )

    def on_text(self, line: Line) -> None:
        self.texts.append(Text(int(line["step"]), str(line.get("prompt", "")), str(line["text"])))

    def on_ledger(self, line: Line) -> None:
        classes = {plain_class(name): float(seconds) for name, seconds in (line.get("classes") or {}).items()}
        self.ledgers[int(line.get("epoch", 0))] = classes  # cumulative in its epoch: the last one counts

    def on_finished(self, line: Line) -> None:
        self.outcome = str(line.get("outcome"))
        self.message = str(line.get("message") or "")
        if self.message == STOP_SUSPENDED and not self._suspended:
            self.suspensions.append(Suspension(float(line["at"])))

    def journal(self) -> Journal:
        ledger: dict[str, float] = {}
        for classes in self.ledgers.values():
            for name, seconds in classes.items():
                ledger[name] = ledger.get(name, 0.0) + seconds
        return Journal(
            steps=tuple(self.steps),
            faults=tuple(self.faults),
            suspensions=tuple(self.suspensions),
            memberships=tuple(self.memberships),
            starts=tuple(self.starts),
            checkpoints=tuple(self.checkpoints),
            other_data=tuple(self.other_data),
            evaluations=tuple(self.evaluations),
            texts=tuple(self.texts),
            ledger=ledger,
            outcome=self.outcome,
            message=self.message,
            begin=self.begin if self.end else 0.0,
            end=self.end,
        )


_HANDLERS: dict[str, Callable[[_Folding, Line], None]] = {
    "step": _Folding.on_step,
    "fault": _Folding.on_fault,
    "membership": _Folding.on_membership,
    "start": _Folding.on_start,
    "recovered": _Folding.on_recovered,
    "checkpoint": _Folding.on_checkpoint,
    "data_changed": _Folding.on_data_changed,
    "evaluate": _Folding.on_evaluate,
    "text": _Folding.on_text,
    "ledger": _Folding.on_ledger,
    "finished": _Folding.on_finished,
}


def _term(line: Line) -> tuple[int, int]:
    return int(line.get("epoch", 0)), int(line.get("generation", 0))


def plain_class(name: str) -> str:
    """A ledger class in words: ``checkpointStall`` and ``checkpoint_stall`` become ``checkpoint stall``."""
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name)
    return words.replace("_", " ").replace("-", " ").strip()
