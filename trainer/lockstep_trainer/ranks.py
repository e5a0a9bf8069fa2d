"""How the workers of one generation find each other and agree."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lockstep_api.v1alpha1 import HangSpec
from lockstep_trainer.config import Orders
from lockstep_trainer.errors import PeerLost, TrainerError
from lockstep_trainer.runtime import set_allocator

BEYOND_SECONDS = 30.0
"""Longer than the leader: before it ends a generation that makes no step it asks all workers where they are, and names
who keeps the others waiting. A worker that gives up before that can only say that somebody did not come."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This worker among the others."""

    rank: int
    size: int
    device: torch.device
    control: Any  # gloo ProcessGroup: small objects and the planning of checkpoints

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return self.rank == 0


def patience(hang: HangSpec) -> timedelta:
    """How long a worker waits for others, in a collective or until all have come."""
    return timedelta(seconds=max(hang.first_step_seconds, hang.minimum_seconds) + BEYOND_SECONDS)


def join(orders: Orders, timeout: timedelta) -> Ranks:
    """Meet the other workers of this generation: NCCL where there is a GPU, gloo where not.

    Only the store prefix of the orders is used, so that workers of two generations never meet. Raises PeerLost where
    the others do not come within ``timeout``, TrainerError where this pod lacks the GPU.
    """
    device = device_of(orders)
    meeting = orders.rendezvous
    interface = interface_towards(meeting.host, meeting.port)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout, wait_for_workers=False)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(meeting.prefix, store),
            rank=orders.rank,
            world_size=orders.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        control = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else dist.group.WORLD
    except (dist.DistError, RuntimeError) as error:
        raise PeerLost(f"the workers of generation {meeting.prefix} do not meet at {meeting.host}: {error}") from error
    return Ranks(orders.rank, orders.world_size, device, control)


def lost_peer(error: BaseException) -> bool:
    """Whether an error of torch says that another worker went away."""
    if isinstance(error, PeerLost | dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo", "connection closed by peer", "connection reset by peer", "nccl")
    )


def interface_towards(host: str, port: int) -> str | None:
    """The network interface that carries traffic to ``host``: gloo would take the one of this machine's host name,
    which in many pods leads nowhere. None where it can't be told (IPv6)."""
    try:
        address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # no packet is sent: the kernel only chooses the route
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address_of(probe, name) == own:
                    return name
    except OSError:
        return None
    return None


def _address_of(sock: socket.socket, interface: str) -> str | None:
    try:
        answer = fcntl.ioctl(sock, 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
    except OSError:
        return None
    return socket.inet_ntoa(answer[20:24])


def device_of(orders: Orders) -> torch.device:
    """Where this worker computes; raises TrainerError where this pod lacks the GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if orders.local_rank >= torch.cuda.device_count():
        raise TrainerError(
            f"this pod has {torch.cuda.device_count()} GPUs and gpusPerNode is {orders.local_world_size}; "
            "check the resources of the pod template"
        )
    device = torch.device("cuda", orders.local_rank)
    set_allocator(device)
    torch.cuda.set_device(device)
    return device
