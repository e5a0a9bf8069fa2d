"""Imports everything that a worker needs, for the process that workers are forked from.

Import it in a parent with one thread: nothing here starts a thread, touches a GPU, or reads the state of a job. What
would otherwise be imported after the fork, by each worker anew, is named here too.
"""

from __future__ import annotations

import importlib
import os

MODULES = (
    "awscrt.checksums",
    "boto3",
    "numpy",
    "tokenizers",
    "torch",
    "torch._dynamo",  # imported by nearly everything at its first call: 1.5 s
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "lockstep_trainer.storage.folder",
    "lockstep_trainer.storage.s3",
    "lockstep_trainer.worker",
)


COMPILER = ("torch._inductor.compile_fx",)
"""What torch.compile imports when it is first called: 2 s of each new worker. It starts nothing before it compiles."""


def preload(*, compiler: bool = False) -> None:
    """Import all of MODULES, and COMPILER where the job compiles."""
    # OpenBLAS starts its threads when numpy is imported. Here numpy only moves tokens; torch has its own library.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for name in (*MODULES, *(COMPILER if compiler else ())):
        importlib.import_module(name)
