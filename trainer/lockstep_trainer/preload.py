"""Imports everything that a worker needs, for the process that workers are forked from.

Import it in a parent with one thread: nothing here starts a thread, touches a GPU, or reads the state of a job. What
would otherwise be imported after the fork, by each worker anew, is named here too. Not torch's compiler, 2 to 3 s of
each worker of a compiled job: the import of torch._inductor may ask CUDA how many devices there are (torch 2.11 does),
and no process that is forked behind that can use one.
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


def preload() -> None:
    """Import all of MODULES."""
    # OpenBLAS starts its threads when numpy is imported. Here numpy only moves tokens; torch has its own library.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for name in MODULES:
        importlib.import_module(name)
