"""torch's asynchronous save, in a thread and in a process, and a plain save: all through s3torchconnector's DCP writer.

torch has no writer to S3 of its own. The settings are the best that these offer on this machine: staging beside the
next forward and backward in memory that is kept from save to save (shared with the process, page-locked on a GPU),
plans kept from save to save, a process group of their own.
"""

from __future__ import annotations

import gc
import logging
import time
from concurrent.futures import Future
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from s3server import BUCKET

from .store import REGION, Server
from .training import Training

PART = 16 << 20
"""Bytes, as Lockstep's client has it."""


logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)  # it warns at each copy of a DTensor


def is_there() -> bool:
    """Whether s3torchconnector is installed; it is no dependency of Lockstep."""
    try:
        import s3torchconnector.dcp  # noqa: F401
    except ImportError:
        return False
    return True


class _Kept(DefaultSavePlanner):
    """Plans are kept by the name of the planner's class."""

    def __init__(self) -> None:
        super().__init__(enable_plan_caching=True)


class _ThreadPlanner(_Kept):
    pass


class _ProcessPlanner(_Kept):
    pass


class _PlainPlanner(_Kept):
    pass


class Bucket:
    """s3torchconnector's writers and readers at the local server."""

    def __init__(self, server: Server, threads: int) -> None:
        """``threads`` that write on each rank."""
        self._server, self._threads = server, threads

    def uri(self, folder: str) -> str:
        """Of a checkpoint."""
        return f"s3://{BUCKET}/{folder}/"

    def writer(self, folder: str) -> Any:
        """A new writer for each save, as torch wants it."""
        from s3torchconnector.dcp import S3StorageWriter

        writer = S3StorageWriter(REGION, self.uri(folder), self._config(), thread_count=self._threads)
        self._redirect(writer, None)
        return writer

    def reader(self, folder: str) -> Any:
        """Its default reader, made for torch's checkpoints."""
        from s3torchconnector import S3ReaderConstructor
        from s3torchconnector.dcp import S3StorageReader

        constructor = S3ReaderConstructor.dcp_optimized()
        reader = S3StorageReader(REGION, self.uri(folder), self._config(), reader_constructor=constructor)
        self._redirect(reader, constructor)
        return reader

    def _redirect(self, end: Any, constructor: Any) -> None:
        """To the local server: neither takes an endpoint."""
        from s3torchconnector._s3client import S3Client
        from s3torchconnector.dcp.s3_file_system import S3FileSystem

        client = S3Client(REGION, endpoint=self._server.endpoint, s3client_config=self._config())
        end.fs = S3FileSystem(REGION, s3_client=client, reader_constructor=constructor)
        end.path = end.fs.init_path(end.path)

    def _config(self) -> Any:
        from s3torchconnector import S3ClientConfig

        return S3ClientConfig(force_path_style=True, part_size=PART)


class AsyncSave:
    """``dcp.async_save``."""

    first_saves = 1

    def __init__(self, training: Training, bucket: Bucket, kind: Literal["thread", "process"]) -> None:
        self.name = f"async_save, {kind}"
        self._training, self._bucket, self._kind = training, bucket, kind
        self._group = dist.new_group()
        on_gpu = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=kind == "process",
                use_async_staging=True,
                use_non_blocking_copy=on_gpu,
            )
        )
        self._staged: Future[None] | None = None
        self._saved: Future[Any] | None = None
        self.folder = ""
        self.durable_at: float | None = None

    def begin(self, number: int) -> None:
        """At a boundary."""
        self.folder, self.durable_at = f"{self._kind}-{number}", None
        response = dcp.async_save(
            self._training.state(),
            storage_writer=self._bucket.writer(self.folder),
            planner=_ThreadPlanner() if self._kind == "thread" else _ProcessPlanner(),
            process_group=self._group,
            async_checkpointer_type=AsyncCheckpointerType(self._kind),
            async_stager=self._stager,
        )
        assert isinstance(response, AsyncSaveResponse)
        self._staged, self._saved = response.staging_completion, response.upload_completion
        self._saved.add_done_callback(self._note)

    def wait(self) -> None:
        """Before the state changes."""
        assert self._staged is not None
        self._staged.result()

    def done(self) -> bool:
        """Whether it is durable."""
        assert self._saved is not None
        if self._saved.done():
            self._saved.result()
        return self.durable_at is not None

    def finish(self) -> None:
        """Wait until it is durable."""
        assert self._saved is not None
        self._saved.result()
        dist.barrier(group=self._group)

    def close(self) -> None:
        """End its threads, and the process where there is one."""
        self._stager.close()
        if self._kind == "process":
            from torch.distributed.checkpoint import _async_process_executor

            _async_process_executor._CHECKPOINT_PROCESS = None  # it ends when nobody refers to it
            gc.collect()

    def restore(self) -> None:
        """``dcp.load`` into the live state."""
        _load(self._training, self._bucket, self.folder, self._group)

    def _note(self, _: Future[Any]) -> None:
        self.durable_at = time.perf_counter()


class PlainSave:
    """``dcp.save``, as s3torchconnector's documentation has it: training stands still until all is there."""

    name = "s3torchconnector, dcp.save"
    first_saves = 1

    def __init__(self, training: Training, bucket: Bucket) -> None:
        self._training, self._bucket = training, bucket
        self._group = dist.new_group()
        self.folder = ""
        self.durable_at: float | None = None

    def begin(self, number: int) -> None:
        """All of it."""
        self.folder = f"plain-{number}"
        dcp.save(
            self._training.state(),
            storage_writer=self._bucket.writer(self.folder),
            planner=_PlainPlanner(),
            process_group=self._group,
        )
        self.durable_at = time.perf_counter()

    def wait(self) -> None:
        """Nothing is left."""

    def done(self) -> bool:
        """It is."""
        return True

    def finish(self) -> None:
        """It is."""

    def close(self) -> None:
        """Nothing to end."""

    def restore(self) -> None:
        """``dcp.load`` into the live state."""
        _load(self._training, self._bucket, self.folder, self._group)


def _load(training: Training, bucket: Bucket, folder: str, group: dist.ProcessGroup | None) -> None:
    dcp.load(training.state(), storage_reader=bucket.reader(folder), process_group=group)
