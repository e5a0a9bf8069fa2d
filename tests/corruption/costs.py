"""CPU time of forward and backward with ring replay and without."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from torch import Tensor

from corruption.setting import DENSE, Setting, batch_of, build
from lockstep_trainer.agreement import from_all
from lockstep_trainer.parallel.layout import Layout
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
    ring = Ring(other, None, sampling=Sampling(3, 1.0), compiled=False, report=lambda _: None)
    batch = batch_of(1, SETTING, rank_engine.meshes.rank)
    ways: dict[str, tuple[Any, Callable[[], Tensor]]] = {
        "off": (rank_engine, lambda: rank_engine.forward_backward(batch, SETTING.tokens)),
        "unsampled": (other, lambda: other.forward_backward(batch, SETTING.tokens)),
        "replayed": (other, lambda: ring.forward_backward(2, batch, SETTING.tokens)),
    }
    names = list(ways)
    for number in range(-1, rounds):  # the first warms up
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(STEPS):
            for name in names[turn % 3 :] + names[: turn % 3]:
                engine, compute = ways[name]
                for _, parameter in engine.named_parameters():
                    parameter.grad = None
                begun = time.process_time()
                compute()
                seconds[name].append(time.process_time() - begun)
        found = from_all({name: median(each) for name, each in seconds.items()}, None)
        if number >= 0:
            yield {"round": number, **{name: sum(each[name] for each in found) for name in names}}
