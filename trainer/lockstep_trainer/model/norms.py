"""Normalisation."""

from __future__ import annotations

from torch import nn

from lockstep_trainer.model.config import DecoderConfig


def build_norm(config: DecoderConfig, width: int) -> nn.Module:
    """RMSNorm (Zhang and Sennrich 2019), or LayerNorm with a bias, over the last ``width`` features."""
    if config.norm == "layer":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return nn.RMSNorm(width, eps=config.norm_eps)
