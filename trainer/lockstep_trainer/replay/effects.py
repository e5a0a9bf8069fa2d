"""What computing a micro-batch changes besides gradients: random state and buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def random_state(device: torch.device) -> Tensor:
    """The state of torch's generators on the host and on ``device``, (bytes,) uint8 in the host's memory."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Go on from a state as ``random_state`` gave it, here or on another rank."""
    host = len(torch.get_rng_state())
    torch.set_rng_state(state[:host].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[host:].clone(), device)


@dataclass(frozen=True, slots=True)
class Effects:
    """How things stood before something was computed."""

    random: Tensor
    buffers: tuple[tuple[Tensor, Tensor], ...]
    """Each buffer, and a copy of its values."""
    device: torch.device

    @classmethod
    def before(cls, parts: Sequence[nn.Module], device: torch.device) -> Effects:
        """As it stands now."""
        buffers = tuple((buffer, buffer.clone()) for part in parts for buffer in part.buffers())
        return cls(random_state(device), buffers, device)

    @torch.no_grad()
    def restore(self) -> None:
        """As it stood then."""
        set_random_state(self.random, self.device)
        for buffer, value in self.buffers:
            buffer.copy_(value)
