"""How much of the devices' capacity training uses: tokens per second, MFU and memory, by step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.flops import model_flops_utilization, peak_flops, training_flops_per_token


@dataclass(frozen=True, slots=True)
class Throughput:
    """What one step was worth."""

    tokens_per_second: float  # of all ranks
    mfu: float | None  # model FLOPs utilisation, 0 to 1; None where the device's peak is not known
    memory: int  # bytes that this rank's device had in use at most since the step before; 0 on a CPU


class Meter:
    """Makes ``Throughput`` of a step's tokens and seconds, for one rank.

    MFU counts the FLOPs of the model's formula (``model.flops``), not those done: what is recomputed is no gain. All
    tokens of the batch count, padding included, and all seconds of the step, whatever they were spent on.
    """

    def __init__(self, flops_per_token: float, ranks: int, peak: float | None, device: torch.device) -> None:
        """``flops_per_token``: forward and backward; ``peak``: FLOP/s of one device; ``ranks``: number of devices."""
        self.flops_per_token, self.ranks, self.peak, self.device = flops_per_token, ranks, peak, device

    @classmethod
    def of(
        cls,
        config: DecoderConfig | None,
        *,
        weights: int = 0,
        sequence_length: int,
        ranks: int,
        precision: str,
        device: torch.device,
    ) -> Meter:
        """The meter of a decoder on ``ranks`` devices like this one. Without a ``config`` it is of another model with
        so many ``weights``, and a token costs 6 FLOPs for each (Kaplan et al. 2020).

        A float8 run is measured by the peak of bfloat16, as most reports do: not all its products are in float8.
        """
        peak = None
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), "fp32" if precision == "fp32" else "bf16")
        flops = 6 * weights if config is None else training_flops_per_token(config, sequence_length)
        return cls(flops, ranks, peak, device)

    def step(self, tokens: int, seconds: float) -> Throughput:
        """``tokens`` over all ranks, in ``seconds`` of wall time; memory is measured since the last call."""
        rate = tokens / seconds if seconds > 0 else 0.0
        mfu = None
        if self.peak:
            mfu = model_flops_utilization(self.flops_per_token, rate / self.ranks, self.peak)
        return Throughput(rate, mfu, self._memory())

    def _memory(self) -> int:
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak
