"""Copies the training state into a snapshot buffer while training goes on.

The copy begins at a step's boundary and runs in a thread beside the next forward and backward pass, which read what it
reads; before the optimizer changes that, ``wait`` must be called. What forward passes change is cloned at the boundary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep_api.messages import StateId
from lockstep_trainer.checkpoint.buffers import Buffer, Buffers, in_memory
from lockstep_trainer.checkpoint.planning import Planned
from lockstep_trainer.checkpoint.snapshots import Root, Snapshot
from lockstep_trainer.errors import TrainerError
from lockstep_trainer.storage.checksum import crc64nvme
from lockstep_trainer.supervisor import write_whole


@dataclass(frozen=True, slots=True)
class Facts:
    """What a snapshot says besides its numbers."""

    state: StateId
    header: dict[str, Any]
    root: Root
    since: int
    samples: str | None  # name of the log in the step folder
    log: str  # its text
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one snapshot: that training stood still, and until it was whole."""

    blocked: float
    whole: float


class Stage:
    """The snapshots of one rank."""

    def __init__(
        self, folder: Path, planned: Planned, device: torch.device, *, changes: Callable[[str], bool] = lambda _: False
    ) -> None:
        """``changes``: whether forward passes change the tensor of this name."""
        self.planned = planned
        self.buffers = Buffers(folder, planned.plan)
        if planned.metadata is not None:
            write_whole(folder / f"metadata-{planned.plan.key}", planned.metadata)
        self._device = device
        self._changes = [changes(item.name) for item in planned.plan.items]
        self._views: dict[int, list[Tensor]] = {}
        self._reserved: Buffer | None = None
        self._thread: threading.Thread | None = None
        self._preparing: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._error: BaseException | None = None
        self._begun = self._boundary = 0.0
        self._waiting_since: float | None = None
        self.cost: Cost | None = None
        """Of the newest whole snapshot."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def busy(self) -> bool:
        """A snapshot is not whole yet."""
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, is_protected: Callable[[StateId], bool]) -> None:
        """Begin to make memory for the snapshots to come, beside the first steps: to fill the pages of 4.5 GiB with
        zeros and to lock them takes 2 s beside an H100. What goes wrong is raised by ``reserve``."""
        self._preparing = threading.Thread(target=self._prepare, args=(is_protected,), name="prepare", daemon=True)
        self._preparing.start()

    def reserve(self, is_protected: Callable[[StateId], bool]) -> bool:
        """Have a buffer for the next snapshot; False where the last one is not whole yet, or each buffer must stay."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
            self._raise()
        if self._reserved is None and not self.busy:
            self._reserved = self.buffers.reserve(is_protected)
        return self._reserved is not None

    def release(self) -> None:
        """Give the reserved buffer back unused."""
        if self._reserved is not None:
            self._reserved.let_go()
            self._reserved = None

    def begin(self, sources: Sequence[Tensor], facts: Facts, *, begun: float | None = None) -> None:
        """Begin to copy ``sources`` (``Planned.sources``), behind ``reserve``. ``begun``: since when training has stood
        still for this snapshot (``time.perf_counter``), now by default. Raises TrainerError where a source is not what
        was planned with."""
        begun = time.perf_counter() if begun is None else begun
        buffer, self._reserved = self._reserved, None
        assert buffer is not None
        for item, source in zip(self.planned.plan.items, sources, strict=True):
            if tuple(source.shape) != item.shape or str(source.dtype) != f"torch.{item.dtype}":
                buffer.let_go()
                raise TrainerError(
                    f"{item.name} is {source.dtype} of {tuple(source.shape)} now, and was torch.{item.dtype} of "
                    f"{item.shape} at the start: what an optimizer keeps must not change its shape"
                )
        still = [source.clone() if changes else source for source, changes in zip(sources, self._changes, strict=True)]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._error, self._waiting_since = None, None
        self._copied.clear()
        self._begun, self._boundary = begun, time.perf_counter() - begun
        self._thread = threading.Thread(target=self._run, args=(buffer, still, facts), name="stage", daemon=True)
        self._thread.start()

    def wait(self) -> float:
        """Until the state may change: all is copied. Returns the seconds that it took; raises what went wrong."""
        begun = time.perf_counter()
        if not self._copied.is_set():
            self._waiting_since = begun
            self._copied.wait()
        self._raise()
        return time.perf_counter() - begun

    def finish(self) -> None:
        """Until the snapshot is whole."""
        self.wait()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.wait()

    def close(self) -> None:
        """Until the threads are behind their work, a snapshot whole or not; then let go of the buffers."""
        for thread in (self._preparing, self._thread):
            if thread is not None:
                thread.join()
        self.release()
        self._views.clear()
        for buffer in self.buffers.all:
            if buffer.memory is not None and self._stream is not None and in_memory(buffer.folder):
                _page_unlock(buffer)
            buffer.close()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    # --- in threads ---------------------------------------------------------------------------------------------------

    def _prepare(self, is_protected: Callable[[StateId], bool]) -> None:
        try:
            for buffer in self.buffers.fresh(is_protected):
                self._map(buffer)
        except BaseException as error:
            self._error = error

    def _run(self, buffer: Buffer, sources: list[Tensor], facts: Facts) -> None:
        try:
            self._copy(buffer, sources)
            copied_at = time.perf_counter()
            self._copied.set()
            waited = max(0.0, copied_at - self._waiting_since) if self._waiting_since is not None else 0.0
            memory = memoryview(buffer.memory)  # type: ignore[arg-type]
            checksums = tuple(
                crc64nvme(memory[item.offset : item.offset + item.length]) for item in self.planned.plan.items
            )
            memory.release()
            if facts.samples is not None:
                (buffer.folder / f"samples-{buffer.number}.jsonl").write_text(facts.log)
            buffer.whole(
                Snapshot(
                    state=facts.state,
                    plan=self.planned.plan.key,
                    crc64nvme=checksums,
                    header={**facts.header, "seconds": self._boundary + waited},
                    root=facts.root,
                    since=facts.since,
                    samples=facts.samples,
                    at=time.time(),
                    blocked=self._boundary + waited,
                    copied=copied_at - self._begun,
                    left_out=facts.left_out,
                )
            )
            self.cost = Cost(self._boundary + waited, time.perf_counter() - self._begun)
        except BaseException as error:
            self._error = error
            buffer.let_go()
            self._copied.set()

    def _copy(self, buffer: Buffer, sources: list[Tensor]) -> None:
        self._map(buffer)
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for view, source in zip(self._views[buffer.number], sources, strict=True):
                view.copy_(source, non_blocking=self._stream is not None)
        if self._stream is not None:
            self._stream.synchronize()

    def _map(self, buffer: Buffer) -> None:
        if not buffer.map():
            self._views[buffer.number] = _framed(buffer, self.planned)
            if self._stream is not None and in_memory(buffer.folder):
                _page_lock(buffer)


def _framed(buffer: Buffer, planned: Planned) -> list[Tensor]:
    """Write what stands around the numbers; returns the places of the numbers as tensors over the mapped file."""
    memory = buffer.memory
    assert memory is not None
    views = []
    for item, frame in zip(planned.plan.items, planned.frames, strict=True):
        if frame is not None:
            memory[item.offset : item.data] = frame.head
            memory[item.data + item.bytes : item.offset + item.length] = frame.tail
        dtype = getattr(torch, item.dtype)
        if item.bytes:
            count = item.bytes // dtype.itemsize
            views.append(torch.frombuffer(memory, dtype=dtype, count=count, offset=item.data).view(item.shape))
        else:
            views.append(torch.empty(item.shape, dtype=dtype))
    return views


def _page_lock(buffer: Buffer) -> None:
    """Let the GPU write into the mapped file by itself: a copy into other memory goes through a small buffer of the
    driver, and holds the CPU up. CUDA locks pages of memory only, not those of a file on a disk."""
    assert buffer.memory is not None
    address = torch.frombuffer(buffer.memory, dtype=torch.uint8).data_ptr()
    code = torch.cuda.cudart().cudaHostRegister(address, buffer.size, 0)  # type: ignore[no-untyped-call]
    if int(code) != 0:
        raise TrainerError(
            f"{buffer.size} bytes of the run volume can't be page-locked (CUDA error {int(code)}); give the pod the "
            "capability to lock memory (ulimit -l)"
        )


def _page_unlock(buffer: Buffer) -> None:
    assert buffer.memory is not None
    address = torch.frombuffer(buffer.memory, dtype=torch.uint8).data_ptr()
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
