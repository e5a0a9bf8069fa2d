"""What is drawn at random within a step, as by dropout in a model of the user's own."""

from __future__ import annotations

import hashlib

import torch


def seed_step(seed: int, step: int, data_rank: int, device: torch.device) -> None:
    """Seed torch's generators on the host and on ``device`` for ``step``, so that what it draws is a function of these
    numbers alone: the same behind a restart, another on each data-parallel rank.

    Not ``torch.manual_seed``: where no GPU is in use yet it notes the call, with its stack, each time.
    """
    digest = hashlib.sha256(f"{seed} {step} {data_rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)
