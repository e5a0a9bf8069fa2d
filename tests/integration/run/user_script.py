"""A script as people write them for torchrun: linear regression with DistributedDataParallel on gloo.

It knows nothing of Lockstep. Rank 0 keeps a checkpoint of its own; CRASH_AT_STEP makes the last rank crash there once.
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
    saved, crashed = folder / "state.pt", folder / "crashed"
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert (rank, world) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 1)
    first = torch.zeros(1, dtype=torch.int64)
    if rank == 0 and saved.exists():
        state = torch.load(saved)
        linear.load_state_dict(state["model"])
        first[0] = state["step"]
    dist.broadcast(first, src=0)
    model = DistributedDataParallel(linear)  # sends rank 0's weights to all
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    for step in range(int(first), STEPS):
        if rank == world - 1 and str(step) == os.environ.get("CRASH_AT_STEP") and not crashed.exists():
            crashed.touch()
            print("crashing on purpose", flush=True)
            os._exit(17)
        generator = torch.Generator().manual_seed(step * world + rank)
        x = torch.randn(8, 4, generator=generator)
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            torch.save({"model": linear.state_dict(), "step": step + 1}, folder / "new.pt")
            os.replace(folder / "new.pt", saved)
        dist.barrier()
        print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
    if rank == 0:
        (folder / "done").write_text(f"{STEPS} steps on {world} ranks from step {int(first)}")
        print(f"done from step {int(first)}", flush=True)
    dist.destroy_process_group()
    # torch's threads now and then abort a gloo process while Python ends ("terminate called without an active
    # exception"), which would be one more restart; this test is about the restart that it asks for.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
