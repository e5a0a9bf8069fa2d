"""A user's script for the tests: no torch. Ranks pass a token around over TCP, so each round needs all of them."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])


def receive(peer: socket.socket) -> None:
    if not peer.recv(1):
        sys.exit(f"rank {rank}: a peer is gone")


def main() -> None:
    progress = folder / f"rank-{rank}"
    if rank == 0:
        server = socket.create_server((host, port))
        server.settimeout(60)
        peers = [server.accept()[0] for _ in range(world - 1)]
    else:
        while True:
            try:
                peers = [socket.create_connection((host, port), timeout=60)]
                break
            except ConnectionRefusedError:
                time.sleep(0.01)  # as torch's own rendezvous does: rank 0 may be a moment late
    for peer in peers:
        peer.settimeout(60)
    for step in range(1, rounds + 1):
        for peer in peers:
            peer.sendall(b"x")
        for peer in peers:
            receive(peer)
        progress.write_text(f"{os.environ['TORCHELASTIC_RESTART_COUNT']} {step}")
        if (folder / "hold").exists():
            print(f"round {step}", flush=True)
            while (folder / "hold").exists():
                time.sleep(0.01)
    print(f"rank {rank} of {world} done", flush=True)


main()
