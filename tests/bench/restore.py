"""How long a restore takes: load_state beside torch's dcp.load with its FileSystemReader, and reading the same bytes.

    PYTHONPATH=tests .venv/bin/python tests/bench/restore.py [--megabytes 512] [--ranks 2] [--rounds 3]

A state of float32 tensors of 32 MiB, sharded over the ranks by rows, lies in a folder (in the page cache, so that
what is compared is the work and not the disk). All three run in the same processes, in alternating rounds: at the
layout that wrote it, by columns (each rank needs half of every shard), and whole on every rank. Ours verifies every
byte, torch's does not; "raw" is each rank's share of the files read in a row into one buffer. Seconds are the slowest
rank's, behind a barrier, CPU seconds those of all ranks and threads; the best round stands for each, since others may
be using the machine. The result is added to docs/results/restore.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from forked import run_ranks
from lockstep_api.messages import StateId
from lockstep_trainer.checkpoint.manifest import Layout, Manifest
from lockstep_trainer.checkpoint.state import load_state
from lockstep_trainer.storage import open_store
from samplerstates import sampler_state
from stored import store_state

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs/results/restore.json"
FOLDER = "step-1-e1-g1"
ROWS, COLUMNS = 4096, 2048  # 32 MiB
LAYOUTS: dict[str, Placement] = {"same": Shard(0), "columns": Shard(1), "whole": Replicate()}


def state_at(placement: Placement, tensors: int, mesh: DeviceMesh, *, fill: bool) -> dict[str, Any]:
    """``tensors`` tensors at a placement; ``fill``: with numbers by place, else zeros."""
    found: dict[str, Any] = {}
    for number in range(tensors):
        whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) + number
        local = whole if isinstance(placement, Replicate) else whole.chunk(mesh.size(), placement.dim)[mesh.get_rank()]  # type: ignore[attr-defined]
        local = local.clone() if fill else torch.zeros_like(local, memory_format=torch.contiguous_format)
        found[f"t{number}"] = DTensor.from_local(local, mesh, [placement])
    return {"model": found}


def measured(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the slowest rank and CPU seconds of all."""
    dist.barrier()
    begun, cpu = time.perf_counter(), time.process_time()
    call()
    took = torch.tensor([time.perf_counter() - begun, time.process_time() - cpu], dtype=torch.float64)
    total = took.clone()
    dist.all_reduce(took, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return float(took[0]), float(total[1])


def body(rank: int, root: Path, tensors: int, ranks: int, rounds: int) -> None:
    """A rank: write once, then read in all ways; rank 0 leaves the results in ``root``."""
    mesh = init_device_mesh("cpu", (ranks,))
    store = open_store(f"file://{root}/store")
    files = store_state(state_at(Shard(0), tensors, mesh, fill=True), store)
    manifest = Manifest(
        state=StateId(1, 1, 1),
        parent=None,
        files=files,
        layout=Layout(world_size=ranks),
        sampler=sampler_state(1),
        versions={},
        verified=(),
        written_at=0.0,
        seconds=0.0,
    )
    data = [root / "store" / FOLDER / file.name for file in files if file.name.endswith(".distcp")]

    def raw() -> None:
        buffer = bytearray(32 << 20)
        for path in data[rank::ranks]:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(rounds):
        found["raw"].append(measured(raw))
        for name, placement in LAYOUTS.items():
            expected = state_at(placement, tensors, mesh, fill=True)
            ways: dict[str, Callable[[dict[str, Any]], None]] = {
                "lockstep": lambda state: load_state(state, store, FOLDER, manifest, group=dist.group.WORLD),
                "torch": lambda state: dcp.load(state, storage_reader=FileSystemReader(data[0].parent)),
            }
            for way, load in ways.items():
                state = state_at(placement, tensors, mesh, fill=False)
                found[f"{name}, {way}"].append(measured(lambda load=load, state=state: load(state)))  # type: ignore[misc]
                for key, tensor in state["model"].items():
                    assert torch.equal(tensor.to_local(), expected["model"][key].to_local()), key
    if rank == 0:
        (root / "found").write_bytes(pickle.dumps(dict(found)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, tensors = Path(folder), arguments.megabytes // 32
        run_ranks(
            arguments.ranks, lambda rank: body(rank, root, tensors, arguments.ranks, arguments.rounds), timeout=600
        )
        found: dict[str, list[tuple[float, float]]] = pickle.loads((root / "found").read_bytes())
    result = {
        "what": "restore from a folder in the page cache; seconds of the slowest rank, CPU seconds of all",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, text=True).strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, CPU and gloo",
        "ranks": arguments.ranks,
        "megabytes": tensors * 32,
        "rounds": arguments.rounds,
        "load_average": round(os.getloadavg()[0], 1),
        "seconds": {name: round(min(wall for wall, _ in runs), 3) for name, runs in found.items()},
        "cpu_seconds": {name: round(min(cpu for _, cpu in runs), 3) for name, runs in found.items()},
    }
    print(json.dumps(result, indent=1))
    runs = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps([*runs, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
