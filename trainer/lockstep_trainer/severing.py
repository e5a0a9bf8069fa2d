"""Breaks a generation's process groups off while the main thread waits in one of their collectives.

A worker that shall leave its generation may be stuck in a collective that somebody will never join. What frees it
depends on what the groups are. gloo waits for bytes, and its own ``abort`` leaves the waiting thread where it is (torch
2.13 and 2.15): its connections are shut down, and the collective raises. NCCL's kernels wait on the device: aborting
the communicators ends them, and the main thread goes on with worthless numbers, so that whoever is behind a collective
looks whether it has to leave before it uses what came of it.

Only connections of the groups are touched: those that were opened while groups were made, the one to the rendezvous
store included, which serves no other generation. Trackers, object stores and data sets keep theirs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
import torch._dynamo
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lockstep_trainer.parallel.mesh import forget_results

Descriptor = tuple[int, int]
"""A descriptor of this process and the inode behind it: a later file may get the same number."""


class Severing(Protocol):
    """Frees a thread that waits in a collective of one kind of process groups."""

    def sever(self) -> None:
        """Break all groups off; called from another thread, again and again until the main thread has come out."""


class Connections:
    """gloo's way: the sockets of the groups and of their rendezvous."""

    def __init__(self) -> None:
        self._own: set[Descriptor] = set()
        self._before: set[Descriptor] | None = None

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Sockets that appear during the body are the groups'. Nothing else of the process opens connections then."""
        self._before = _sockets()
        try:
            yield
        finally:
            self._own |= _sockets() - self._before
            self._before = None

    def sever(self) -> None:
        """Shut down all connections of the groups, also those that are just being opened."""
        before, there = self._before, _sockets()
        own = self._own & there if before is None else there - before | self._own & there
        for number, inode in own:
            with suppress(OSError):  # closed meanwhile, or not connected: nobody waits for it
                _shut_down(number, inode)


class Communicators:
    """NCCL's way: abort them all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sever(self) -> None:
        """Kernels that wait for other ranks end; no rank can use these communicators any more."""
        for group in list(distributed_c10d._world.pg_map):
            with suppress(RuntimeError):  # a group without a part on this device, or aborted already
                group._get_backend(self._device).abort()


def ways(connections: Connections, device: torch.device) -> tuple[Severing, ...]:
    """What frees the main thread, by what the groups of ``ranks.join`` are: on a GPU they have a gloo part too."""
    return (Communicators(device), connections) if device.type == "cuda" else (connections,)


def forget_groups(*, compiled: bool) -> None:
    """Behind the last use of a generation's groups and meshes. ``compiled``: code was compiled that has them built
    in."""
    if dist.is_initialized():
        dist.destroy_process_group()
    # Groups are named by a count, which only the end of whole groups sets back: where they were never whole, this rank
    # would wait for the others under names that no new process uses.
    distributed_c10d._world.group_count = 0
    if compiled:
        torch._dynamo.reset()
        forget_results()


def _sockets() -> set[Descriptor]:
    found: set[Descriptor] = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:["):
                found.add((int(name), int(link[8:-1])))
    return found


def _shut_down(number: int, inode: int) -> None:
    copy = os.dup(number)
    if os.fstat(copy).st_ino != inode:
        os.close(copy)
        return
    with socket.socket(fileno=copy) as connection:
        internet = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM
        if internet and not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            # The reading end only: a gloo thread that writes to a closed one is told so, and waits all the same.
            connection.shutdown(socket.SHUT_RD)
