"""A script that says on how many processes it runs, and ends when it is told to. It knows nothing of Lockstep."""

import os
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
with (folder / "worlds").open("a") as worlds:
    worlds.write(f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}\n")
while not (folder / "finish").exists():
    time.sleep(0.05)
