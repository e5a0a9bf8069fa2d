"""What each rank of a healthy job does by itself in each step: work, noise, documents, clocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from stragglers.scenarios.layout import Layout
from stragglers.scenarios.physics import Floats, Transfers

CLOCK = 1755.0  # MHz: what an H100 holds under load


@dataclass(frozen=True)
class Job:
    """One step of one rank, without noise."""

    layout: Layout
    compute: float
    """Seconds."""
    host: float
    """Seconds."""
    batch: float
    """Seconds."""
    transfers: Transfers
    tokens: int = 8192
    """Of a data rank."""
    length: int = 1024
    """Σ length² ÷ tokens, where documents don't vary."""
    attention: float = 0.2
    """Share of the computing that grows with Σ length²; the rest grows with the tokens."""
    stages: tuple[float, ...] = (1.0,)
    """What each pipeline stage computes, 1 for the mean."""
    vary_squares: float = 0.0
    """σ of the logarithm of Σ length² of a data rank's step."""
    vary_tokens: float = 0.0
    """The same of its tokens."""


@dataclass(frozen=True)
class Noise:
    """Relative, as σ of a logarithm where nothing else is said."""

    rank: float = 0.01
    """Of each rank's computing in each step."""
    devices: float = 0.005
    """Between devices, for good."""
    node: float = 0.0
    """Shared by a node's ranks, over ``node_steps`` steps (an autoregression of first order)."""
    node_steps: float = 20.0
    drift: float = 0.0
    """Largest of what all ranks share, over some hundred steps: the room's temperature."""
    outliers: float = 0.005
    """Chance of a step to have a rank that computes 2 to 5 times as long. Not of each rank: in a job of many ranks,
    that would be lasting slowness."""
    host: float = 0.3
    """Of what the host and the batch are late."""
    parts: float = 0.01
    """Between the micro-batches of a step."""


QUIET = Noise(rank=0, devices=0, node=0, drift=0, outliers=0, host=0, parts=0)


@dataclass
class Drawn:
    """Arrays of (steps, data, pipeline, tensor); documents of (steps, data)."""

    compute: Floats
    host: Floats
    batch: Floats
    link: Floats
    clock: Floats
    tokens: NDArray[np.int64]
    squares: NDArray[np.int64]
    spread: Floats
    """(micro-batches, steps, data, pipeline, tensor)"""

    @property
    def own(self) -> Floats:
        """What the ranks do before and besides meeting others."""
        return self.compute + self.host + self.batch


def draw(
    job: Job, noise: Noise, longer: Floats, *, devices: Floats, nodes: NDArray[np.int64], random: Generator
) -> Drawn:
    """A healthy job. ``longer``, (steps, data), multiplies Σ length²; ``devices``, by rank, how much longer each device
    takes for good; ``nodes``, by rank, the number of its node."""
    layout, steps = job.layout, len(longer)
    shape = (steps, *layout.shape)
    tokens = job.tokens * _lognormal(random, job.vary_tokens, longer.shape)
    squares = tokens * job.length * longer * _lognormal(random, job.vary_squares, longer.shape)
    need = (1 - job.attention) * tokens / job.tokens + job.attention * squares / (job.tokens * job.length)
    shared = 1 + noise.drift * _slow_wave(random, steps)
    by_node = np.exp(noise.node * _autoregression(random, steps, int(nodes.max()) + 1, noise.node_steps))
    compute = (
        job.compute
        * need[:, :, None, None]
        * np.asarray(job.stages)[:, None]
        * devices[layout.ranks]
        * shared[:, None, None, None]
        * by_node[:, nodes[layout.ranks]]
        * _lognormal(random, noise.rank, shape)
    )
    compute *= np.where(random.random(shape) < noise.outliers / layout.size, random.uniform(2, 5, shape), 1.0)
    parts = _lognormal(random, noise.parts, (layout.micro_batches, *shape))
    return Drawn(
        compute=compute,
        host=job.host * _lognormal(random, noise.host, shape),
        batch=job.batch * _lognormal(random, noise.host, shape),
        link=_lognormal(random, noise.rank, shape),
        clock=CLOCK / devices[layout.ranks] / shared[:, None, None, None] * random.normal(1, 0.003, shape),
        tokens=tokens.astype(np.int64),
        squares=squares.astype(np.int64),
        spread=parts / parts.sum(axis=0),
    )


def devices(noise: Noise, units: int, random: Generator) -> Floats:
    """How much longer each device takes for good; at most two σ: burnt-in devices differ by little."""
    return np.exp(np.clip(random.normal(0, noise.devices, units), -2 * noise.devices, 2 * noise.devices))


def _lognormal(random: Generator, sigma: float, shape: tuple[int, ...]) -> Floats:
    """Of mean 1."""
    return np.ones(shape) if sigma == 0 else random.lognormal(-(sigma**2) / 2, sigma, shape)


def _slow_wave(random: Generator, steps: int) -> Floats:
    """Between -1 and 1, three waves of some hundred steps."""
    at = np.arange(steps)
    waves = [np.sin(2 * np.pi * (at / random.uniform(150, 900) + random.random())) for _ in range(3)]
    return np.asarray(sum(waves) / 3)


def _autoregression(random: Generator, steps: int, series: int, memory: float) -> Floats:
    """(steps, series) of variance 1 that forgets within ``memory`` steps."""
    keep = np.exp(-1 / memory)
    found = np.empty((steps, series))
    now = random.normal(size=series)
    for step in range(steps):
        now = keep * now + np.sqrt(1 - keep**2) * random.normal(size=series)
        found[step] = now
    return found
