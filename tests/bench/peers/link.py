"""A network between clients and an S3 server that carries only so much: the server is in a network namespace of its
own, behind a pair of virtual cards with a token bucket in each direction. As root."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BURST = 128
"""KiB that go through at once."""
LATENCY_MS = 20
"""How long a packet waits at most before it is dropped, and TCP sends less."""


@dataclass(frozen=True, slots=True)
class Link:
    """Where the server is to run."""

    host: str
    """The server's address."""
    within: tuple[str, ...]
    """What a command begins with to run there."""


@contextmanager
def link(megabits: float) -> Iterator[Link]:
    """A link of so many Mbit/s. Addresses are of the range that RFC 2544 keeps for benchmarks; there is no way out."""
    if os.geteuid():
        raise SystemExit("--megabits makes a network namespace: run it as root")
    me = os.getpid()
    name, near, far = f"lockstep-bench-{me}", f"lsn{me}"[:15], f"lsf{me}"[:15]
    third, fourth = me >> 6 & 255, (me & 63) << 2
    here, there = (f"198.18.{third}.{fourth + last}" for last in (1, 2))
    shape = f"root tbf rate {megabits:g}mbit burst {BURST}kb latency {LATENCY_MS}ms"
    _run(f"ip netns add {name}")
    try:
        _run(f"ip link add {near} type veth peer name {far} netns {name}")
        _run(f"ip addr add {here}/30 dev {near}")
        _run(f"ip link set {near} up")
        _run(f"tc qdisc add dev {near} {shape}")
        for command in (
            "ip link set lo up", f"ip addr add {there}/30 dev {far}", f"ip link set {far} up",
            f"tc qdisc add dev {far} {shape}",
        ):  # fmt: skip
            _run(f"ip netns exec {name} {command}")
        yield Link(there, ("ip", "netns", "exec", name))
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)  # the cards go with it


def _run(command: str) -> None:
    subprocess.run(shlex.split(command), check=True)
