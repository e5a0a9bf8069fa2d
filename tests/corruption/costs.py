"""CPU time of a step with ring replay and without, the optimizer's update and the looks at memory included."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from statistics import median
from typing import Any

import torch

from corruption.setting import DENSE, Setting, batch_of, build
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.agreement import from_all
from lockstep_trainer.optim.adamw import Pairs
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.replay.report import Replay
from lockstep_trainer.replay.ring import Ring
from lockstep_trainer.replay.sampling import Sampling

SETTING = Setting(
    Layout(shard=2), replace(DENSE, dim=192, heads=6, kv_heads=2, ffn_dim=512, vocab_size=1024), samples=4, length=256
)
STEPS = 6


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    """One rank's part. Each round: STEPS times a step without replay, a step with its hooks that is not replayed, and
    one that is, in turn, so that what others do on the machine strikes all three; medians of the CPU seconds of both
    ranks together."""
    rank_engine = build(SETTING)
    other = build(SETTING)
    ring = Ring(other, None, sampling=Sampling(3, 0.0), compiled=False, report=lambda _: None)
    batch = batch_of(1, SETTING, rank_engine.meshes.rank)
    plain, replay = Replay(rank_engine, None), Replay(other, ring)
    steps = count(2)  # a step is compared by its number

    def step(replay: Replay, parameters: Pairs, optimizer: torch.optim.Optimizer, *, compared: bool = False) -> None:
        if compared:  # as behind the update before
            replay._memory.left(parameters, optimizer)
        ring.sampling, number = Sampling(3, 1.0 if compared else 0.0), next(steps)
        replay.forward_backward(number, batch, SETTING.tokens)
        ring.sampling = Sampling(3, 0.0)
        with replay.update(number, parameters, optimizer):
            optimizer.step()
        optimizer.zero_grad()

    mine, others = list(rank_engine.named_parameters()), list(other.named_parameters())
    my_optimizer, others_optimizer = build_optimizer(mine, OptimizerSpec()), build_optimizer(others, OptimizerSpec())
    ways: dict[str, Callable[[], None]] = {
        "off": lambda: step(plain, mine, my_optimizer),
        "unsampled": lambda: step(replay, others, others_optimizer),
        "replayed": lambda: step(replay, others, others_optimizer, compared=True),
    }
    names = list(ways)
    for number in range(-1, rounds):  # the first warms up
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(STEPS):
            for name in names[turn % 3 :] + names[: turn % 3]:
                begun = time.process_time()
                ways[name]()
                seconds[name].append(time.process_time() - begun)
        found = from_all({name: median(each) for name, each in seconds.items()}, None)
        if number >= 0:
            yield {"round": number, **{name: sum(each[name] for each in found) for name in names}}
