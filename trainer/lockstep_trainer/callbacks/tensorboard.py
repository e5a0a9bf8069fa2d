"""TensorBoard: event files in a folder or in S3. Needs no package; TensorBoard itself is needed to look at them.

Each process of the job writes a file of its own. It begins with a session start that makes TensorBoard forget what
earlier processes wrote of the steps that are now computed again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from lockstep_trainer.callbacks import eventfile
from lockstep_trainer.callbacks.base import Callback, Checkpoint, Evaluation, Outcome, Run, Step
from lockstep_trainer.errors import UserError
from lockstep_trainer.storage import ObjectStore, open_store

_SEGMENT_BYTES = 1024 * 1024
"""A file in S3 is replaced as a whole at each flush; at this size the next one begins."""


class TensorBoard(Callback):
    """``folder``: file:///folder or s3://bucket/prefix; without it ``tensorboard`` in the job's folder, beside its
    checkpoints. ``flush_seconds``: what is written appears at least so often."""

    def __init__(self, *, folder: str | None = None, flush_seconds: float = 10.0) -> None:
        if folder is not None:
            try:
                open_store(folder)
            except UserError as error:
                raise UserError(f"trainer.callbacks: folder of tensorboard: {error}") from None
        self._folder = folder
        self._flush_seconds = flush_seconds
        self._flushed = 0.0
        self._sink: _Sink | None = None

    def on_start(self, run: Run) -> None:
        """Open this process's file."""
        uri = self._folder or f"{run.store}/tensorboard"
        now = time.time()
        # Names sort by time; the rest keeps two starts within a second apart.
        name = f"events.out.tfevents.{int(now):010}.{run.name}.e{run.epoch:04}-g{run.generation:04}"
        parts = urlsplit(uri)
        if parts.scheme == "file":
            self._sink = _FileSink(Path(unquote(parts.path)), name)
        else:
            self._sink = _ObjectSink(open_store(uri, run.s3), name)
        self._sink.write(eventfile.session_start(now, run.step + 1))
        if run.step == 0:
            spec = json.dumps(dict(run.spec), indent=1)
            self._sink.write(eventfile.text(now, 0, "job", f"{run.namespace}/{run.name} {run.uid}\n\n```\n{spec}\n```"))
        self._flush(now)

    def on_step(self, step: Step) -> None:
        """A point on each curve."""
        self._write(step.at, step.step, step.scalars())

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """The same of the evaluations' curves."""
        self._write(time.time(), evaluation.step, evaluation.scalars())

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        """What comes before this step won't be told again."""
        self._flush(time.time())

    def on_end(self, outcome: Outcome) -> None:
        """The rest."""
        self._flush(time.time())

    def _write(self, at: float, step: int, values: dict[str, float]) -> None:
        assert self._sink
        self._sink.write(eventfile.scalars(at, step, values))
        if at - self._flushed >= self._flush_seconds:
            self._flush(at)

    def _flush(self, now: float) -> None:
        assert self._sink
        self._sink.flush()
        self._flushed = now


class _Sink(Protocol):
    def write(self, data: bytes) -> None: ...

    def flush(self) -> None: ...


class _FileSink:
    """Appends: TensorBoard keeps the file open and reads on."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / name
        self._pending = [eventfile.version()]

    def write(self, data: bytes) -> None:
        self._pending.append(data)

    def flush(self) -> None:
        data, self._pending = b"".join(self._pending), []
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)


class _ObjectSink:
    """Puts the newest segment again and again until it is full."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name = store, name
        self._segment = 0
        self._content = bytearray(eventfile.version())
        self._written = 0

    def write(self, data: bytes) -> None:
        self._content += data

    def flush(self) -> None:
        if len(self._content) == self._written:
            return
        self._store.put(f"{self._name}.{self._segment:06}", bytes(self._content))
        self._written = len(self._content)
        if self._written >= _SEGMENT_BYTES:
            self._segment += 1
            self._content = bytearray(eventfile.version())
            self._written = 0
