"""From a fault to the first new step: `lockstep run` beside the same model under torchrun, in one run.

    python tests/bench/recovery.py [--faults 30] [--classes kill,exception,hang,agent,pod] [--peer 30] [--write]

8 ranks on this machine: two pods of four workers, and a spare. Faults come one after another, at random instants and
ranks, each once the one before is mended; the model is tiny, so that what is measured is the recovery.

    kill       SIGKILL of a worker
    exception  a worker's own code raises
    hang       SIGSTOP of a worker; resilience.hang.minimumSeconds is 3, and counts
    agent      SIGKILL of an agent: the longest pause between two steps around it
    pod        SIGKILL of a pod's supervisor; a spare takes the slot

Seconds are from the fault to the end of the first step that is new: the parts are those of status.faults, and "steps"
those that were done again. torchrun runs in its best configuration (see peers/elastic.py), with checkpoints as often as
Lockstep's snapshots; its faults are SIGKILLs of a worker. The result is added to docs/results/recovery.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "scripts")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from awaited import eventually  # noqa: E402 - the path comes first
from bench import results  # noqa: E402
from bench.peers import elastic  # noqa: E402
from localrun import LocalRun, victims  # noqa: E402
from localrun.run import QUICKSTART  # noqa: E402

PARTS = ("detect", "decide", "restart", "restore", "first_step", "recompute")
PATIENCE = 300.0
RAISING = """
from pathlib import Path

import torch.distributed as dist
from torch.nn.functional import cross_entropy


def loss(logits, targets):
    flag = Path({folder!r}) / f"raise-{{dist.get_rank()}}"
    if flag.exists():
        number = flag.read_text()
        flag.unlink()
        raise RuntimeError(f"number {{number}}, on purpose")
    return cross_entropy(logits, targets, reduction="sum")
"""
SETTINGS = [
    "nodes=2",
    "gpusPerNode=4",
    "spares=1",
    f"trainer.model.overrides={{layers: {elastic.SIZE.layers}, dim: {elastic.SIZE.dim}}}",
    f"trainer.tokenizer.train.vocabSize={elastic.SIZE.vocab}",
    "trainer.data.sources.0.maxBytes=400000",
    f"trainer.data.sequenceLength={elastic.SIZE.tokens}",
    f"trainer.recipe.globalBatchTokens={8 * elastic.SIZE.tokens}",
    "trainer.recipe.steps=1000000",
    "trainer.recipe.loss=raising:loss",
    "trainer.evaluate=null",
    "trainer.generate=null",
    "checkpoint.every=50",
    f"checkpoint.memory.every={elastic.EVERY}",
    "resilience.hang.minimumSeconds=3",
    "resilience.budgets.process=100000",
    "resilience.budgets.pod=100000",
]


@dataclass
class Faults:
    """What the faults of one class cost."""

    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    rungs: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def said(self) -> dict[str, Any]:
        """As the result has it."""
        ordered = sorted(self.seconds)
        if not ordered:
            return {"faults": 0, "problems": self.problems}
        return {
            "faults": len(ordered),
            "seconds": {"p50": _at(ordered, 0.5), "p90": _at(ordered, 0.9), "worst": round(ordered[-1], 3)},
            "steps": {"mean": round(statistics.mean(self.steps), 1), "worst": max(self.steps)},
            "parts": {name: round(statistics.median(values), 3) for name, values in self.parts.items()},
            "rungs": self.rungs,
            "problems": self.problems,
        }


def _at(ordered: list[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


class Ours:
    """One `lockstep run`, and what is done to it."""

    def __init__(self, run: LocalRun, seed: int) -> None:
        self.run, self.random = run, random.Random(seed)
        self._raised = 0

    def fault(self, kind: str, found: Faults) -> None:
        """Do one, and wait until it is mended."""
        self.run.until_step(self.run.status.progress.step + self.random.randint(6, 12), PATIENCE)
        time.sleep(self.random.random())  # anywhere in a step
        if kind == "agent":
            self._agent(found)
            return
        before = self.run.status.restarts.total
        getattr(self, f"_{kind}")()
        status = self.run.until(
            lambda status: status.restarts.total > before and bool(status.faults)
            and status.faults[-1].steps_lost is not None,
            PATIENCE, f"recovery from {kind}",
        )  # fmt: skip
        fault = status.faults[-1]
        found.seconds.append(sum(fault.seconds.values()))
        found.steps.append(fault.steps_lost or 0)
        found.rungs[fault.rung] = found.rungs.get(fault.rung, 0) + 1
        for part in PARTS:
            found.parts.setdefault(part, []).append(fault.seconds.get(part, 0.0))

    def _worker(self) -> victims.Victim:
        return self.random.choice(list(victims.workers(self.run.state)))

    def _kill(self) -> None:
        os.kill(self._worker().pid, signal.SIGKILL)

    def _exception(self) -> None:
        self._raised += 1
        (self.run.state.parent / f"raise-{self._worker().rank}").write_text(str(self._raised))

    def _hang(self) -> None:
        os.kill(self._worker().pid, signal.SIGSTOP)

    def _pod(self) -> None:
        self.run.until(lambda status: status.members.spares >= 1, PATIENCE, "a spare")
        supervisor = self.run.supervisor(self.random.randrange(2))
        assert supervisor is not None
        os.kill(supervisor, signal.SIGKILL)

    def _agent(self, found: Faults) -> None:
        """It costs no step; what it may cost is a pause."""
        before = self.run.status
        supervisor = self.run.supervisor(self.random.randrange(2))
        assert supervisor is not None
        agent = eventually(  # the one before was only just succeeded by the one that stood by
            lambda: victims.children_running(supervisor, "lockstep_trainer.agent"), "an agent", PATIENCE
        )[0]
        killed = time.time()
        os.kill(agent, signal.SIGKILL)
        after = self.run.until_step(before.progress.step + 12, PATIENCE)
        steps = [step.at for step in self.run.journal().steps if step.step >= before.progress.step - 1]
        pauses = [b - a for a, b in pairwise(steps) if b >= killed]
        found.seconds.append(max(pauses, default=0.0))
        found.steps.append(0)
        if after.restarts.total != before.restarts.total:
            found.problems.append(f"restarts: {after.faults[-1].cause}")


def ours(folder: Path, kinds: list[str], faults: int) -> dict[str, Faults]:
    """All classes in one job."""
    manifest = folder / "job.yaml"
    manifest.write_text(QUICKSTART.read_text())
    (folder / "raising.py").write_text(RAISING.format(folder=str(folder)))
    found = {kind: Faults() for kind in kinds}
    with LocalRun(folder, SETTINGS, manifest=manifest) as run:
        run.until_step(10, PATIENCE)
        job = Ours(run, 1)
        for kind in kinds:
            for number in range(faults):
                try:
                    job.fault(kind, found[kind])
                except (AssertionError, OSError) as error:
                    found[kind].problems.append(str(error)[:2000])
                    if run.process.poll() is not None:
                        return found
                print(f"{kind} {number + 1}: {found[kind].seconds[-1:]}", file=sys.stderr, flush=True)
    return found


def torchrun(folder: Path, faults: int) -> Faults:
    """The peer."""
    found, chance = Faults(), random.Random(2)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "BENCH_PATH": ":".join(str(REPOSITORY / name) for name in ("tests", "trainer", "crds")),
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"),
        *("--max-restarts", "1000", "--monitor-interval", "0.1", str(Path(elastic.__file__)), str(folder)),
    ]
    with (folder / "output.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            for number in range(faults):
                _kill_one(folder, process, chance, found)
                print(f"torchrun {number + 1}: {found.seconds[-1:]}", file=sys.stderr, flush=True)
        except AssertionError as error:
            found.problems.append(f"{error}: {(folder / 'output.log').read_text()[-1500:]}")
        finally:
            for pid in victims.descendants(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()
    return found


def _kill_one(folder: Path, process: subprocess.Popen[bytes], chance: random.Random, found: Faults) -> None:
    """SIGKILL to one of its workers, and the wait until that is mended."""
    target = max(10, _steps(folder)[-1]["step"] + chance.randint(6, 12))
    _until(lambda: _steps(folder)[-1]["step"] >= target, process)
    time.sleep(chance.random())
    attempt = _steps(folder)[-1]["attempt"]
    victim = int((folder / f"pid-{chance.randrange(8)}").read_text())
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    _until(lambda: _first_new(folder, killed, attempt) is not None, process)
    new, highest = _first_new(folder, killed, attempt) or ({}, 0)
    found.seconds.append(new["at"] - killed)
    found.steps.append(highest - new["from"])


def _steps(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "steps.jsonl").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    return [json.loads(line) for line in lines] or [{"step": 0, "at": 0.0, "attempt": 0, "from": 0}]


def _first_new(folder: Path, killed: float, attempt: int) -> tuple[dict[str, Any], int] | None:
    """The first step of a later attempt that is beyond all earlier ones, and the highest of those."""
    steps = _steps(folder)
    highest = max((step["step"] for step in steps if step["attempt"] <= attempt), default=0)
    later = [step for step in steps if step["attempt"] > attempt and step["step"] > highest and step["at"] > killed]
    return (later[0], highest) if later else None


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "torchrun gave up"
        assert time.monotonic() < deadline, f"nothing for {PATIENCE:.0f} s"
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, help="of each class")
    parser.add_argument("--classes", default="kill,exception,hang,agent,pod")
    parser.add_argument("--peer", type=int, default=30, help="faults of torchrun")
    parser.add_argument("--write", action="store_true", help="add the result to docs/results/recovery.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started is ended
    import torch

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "peer").mkdir()
        load = os.getloadavg()[1]
        found: dict[str, Faults] = {}
        if arguments.peer:
            found["torchrun"] = torchrun(Path(name) / "peer", arguments.peer)
        if arguments.classes:
            (Path(name) / "ours").mkdir()
            found |= ours(Path(name) / "ours", arguments.classes.split(","), arguments.faults)
    table = Table("", "faults", "p50", "p90", "worst", "steps redone", *PARTS, "rungs")
    for kind, faults in found.items():
        said = faults.said()
        if not faults.seconds:
            table.add_row(kind, "0")
            continue
        times, parts = said["seconds"], said["parts"]
        numbers = (f"{times['p50']:.2f}", f"{times['p90']:.2f}", f"{times['worst']:.2f}", str(said["steps"]["mean"]))
        rungs = ", ".join(f"{count} {rung}" for rung, count in faults.rungs.items())
        table.add_row(kind, str(said["faults"]), *numbers, *(f"{parts.get(part, 0):.2f}" for part in PARTS), rungs)
    Console(width=160, stderr=True).print(table)
    result = {
        **results.origin("seconds from a fault to the first new step, 8 ranks", f"torch {torch.__version__}"),
        "load": [round(load, 1), round(os.getloadavg()[1], 1)],
        "classes": {kind: faults.said() for kind, faults in found.items()},
    }
    if arguments.write:
        results.add(result, results.RESULTS / "recovery.json")
    else:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
