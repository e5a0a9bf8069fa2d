"""A worker says where it is, while its main thread is stuck: in a collective that somebody never joined, in a data
loader that never returns, in an endless loop.

Its agent asks with two signals. The first one makes the interpreter's fault handler write all stacks to
``stacks.txt``, which works even where a library holds the interpreter lock. The second one wakes a thread, which writes
``position.json``: the main thread's frames, and how many collectives this rank has entered and left in each process
group, by torch's flight recorder.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, Any

from lockstep_api.messages import GroupCalls
from lockstep_trainer.control import CONTROL_SIGNAL
from lockstep_trainer.supervisor import write_json

STACKS_SIGNAL = signal.SIGUSR1
POSITION_SIGNAL = signal.SIGUSR2
STACKS = "stacks.txt"
POSITION = "position.json"
_FRAMES = 12
_COMMUNICATION = ("torch/distributed/", "torch/_ops.py")

log = logging.getLogger(__name__)


class Answers:
    """From now on signals do not end this process but write to ``folder``, and the control signal calls ``control`` in
    a thread. Made by the main thread, before there is another one: they inherit that these signals are not theirs."""

    def __init__(self, folder: Path, control: Callable[[], None] = lambda: None) -> None:
        self._stacks: IO[str] | None = None
        waiting: dict[int, Callable[[], None]] = {POSITION_SIGNAL: self._tell_position, CONTROL_SIGNAL: control}
        for number in waiting:
            signal.signal(number, lambda *_: None)  # a thread that does not block it must not die of it
        signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
        self.move(folder)
        for number, body in waiting.items():
            threading.Thread(target=_serve, args=(number, body), name=f"signal {number}", daemon=True).start()

    def move(self, folder: Path) -> None:
        """Answer in this folder from now on: ``stacks.txt`` says that somebody listens. Called by the main thread."""
        self._folder = folder
        before, self._stacks = self._stacks, (folder / STACKS).open("w")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        if before is not None:
            before.close()

    def _tell_position(self) -> None:
        frames, communicating = frames_of(sys._current_frames().get(threading.main_thread().ident or 0))
        groups = [asdict(calls) for calls in group_calls()]
        write_json(self._folder / POSITION, {"frames": frames, "communicating": communicating, "groups": groups})


def _serve(number: int, body: Callable[[], None]) -> None:
    while True:
        signal.sigwait({number})
        try:
            body()
        except Exception:  # whoever asks does without
            log.exception("could not do what signal %d asks for", number)


def frames_of(frame: FrameType | None) -> tuple[list[str], bool]:
    """``file.py:120 function`` of the innermost frames, and whether the first of them is torch's communication."""
    communicating = frame is not None and is_communication(frame)
    found: list[str] = []
    while frame is not None and len(found) < _FRAMES:
        place = "/".join(Path(frame.f_code.co_filename).parts[-2:])
        found.append(f"{place}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return found, communicating


def is_communication(frame: FrameType) -> bool:
    """Whether torch communicates here."""
    return any(part in frame.f_code.co_filename for part in _COMMUNICATION)


def group_calls() -> list[GroupCalls]:
    """Of all process groups of this rank; empty before there is one. Groups whose last call the recorder has forgotten
    are left out: nobody waits in them."""
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if not dist.is_initialized():
        return []
    recorders: Any = torch._C._distributed_c10d
    traces = {"gloo": recorders._dump_fr_trace_json(True, False)}
    if torch.cuda.is_available():
        traces["nccl"] = recorders._dump_nccl_trace_json(True, False)
    groups = [
        (name, f"{group.group_desc or name} {_digest(dist.get_process_group_ranks(group))}")
        for group, name in list(distributed_c10d._world.pg_names.items())
    ]
    found: list[GroupCalls] = []
    for backend, trace in traces.items():
        entries = json.loads(trace).get("entries", [])
        prefix = f"{backend} " if len(traces) > 1 else ""
        found += (calls for name, label in groups if (calls := _calls(name, prefix + label, entries)))
    return found


def _calls(name: str, label: str, entries: list[dict[str, Any]]) -> GroupCalls | None:
    """Of one group in one recorder, which keeps the newest entries only."""
    own = [entry for entry in entries if entry["process_group"][0] == name and not entry["is_p2p"]]
    if not own:
        forgets = bool(entries) and entries[0].get("record_id", 0) > 0
        return None if forgets else GroupCalls(label, 0, 0)
    newest = own[-1]
    done = max((entry["collective_seq_id"] for entry in own if entry["retired"]), default=0)
    return GroupCalls(label, newest["collective_seq_id"], done, newest["profiling_name"].rpartition(":")[2])


def _digest(ranks: list[int]) -> str:
    return hashlib.sha256(json.dumps(ranks).encode()).hexdigest()[:8]
