"""A script as people write them for torchrun: linear regression with DistributedDataParallel on gloo.

It knows nothing of Lockstep. It resumes from a file of its own, and crashes once when CRASH_AT_STEP says so.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

STEPS = 12


def main() -> None:
    folder = Path(sys.argv[1])
    saved = folder / "state.pt"
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert (rank, world) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = 0
    if saved.exists():
        state = torch.load(saved)
        model.module.load_state_dict(state["model"])
        first = state["step"]

    for step in range(first, STEPS):
        marker = folder / "crashed"
        if rank == world - 1 and str(step) == os.environ.get("CRASH_AT_STEP") and not marker.exists():
            marker.touch()
            print("crashing on purpose", flush=True)
            os._exit(17)
        generator = torch.Generator().manual_seed(step * world + rank)
        x = torch.randn(8, 4, generator=generator)
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            torch.save({"model": model.module.state_dict(), "step": step + 1}, folder / "new.pt")
            os.replace(folder / "new.pt", saved)
        dist.barrier()
        print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
    if rank == 0:
        (folder / "done").write_text(f"{STEPS} steps on {world} ranks from step {first}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
