"""What a mixture layer costs: forward and backward of one layer, beside the same layer without grouped products and
beside transformers' Mixtral block with the same weights. Run as a script.

Times are CPU seconds of this process on a CPU and seconds on a GPU, the best of several passes; the three take turns,
so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from lockstep_trainer.model import grouped
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.moe import MoE


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--passes", type=int, default=7)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    layer, theirs = _layers(options)
    dtype = getattr(torch, options.dtype)
    layer, theirs = layer.to(device, dtype), theirs.to(device, dtype)
    x = torch.randn(1, options.tokens, options.dim, device=device, dtype=dtype, requires_grad=True)

    def without_kernel() -> None:
        with patch.object(grouped, "has_kernel", lambda rows, weight: False):
            _forward_backward(layer, x)

    ways = {
        "lockstep": lambda: _forward_backward(layer, x),
        "lockstep, loop": without_kernel,
        "transformers": lambda: _forward_backward(theirs, x),
    }
    seconds = {name: float("inf") for name in ways}
    for _ in range(options.passes):
        for name, way in ways.items():
            seconds[name] = min(seconds[name], _seconds(way, device))
    print(json.dumps({**vars(options), "device": device.type, "seconds": seconds}))


def _layers(options: argparse.Namespace) -> tuple[MoE, nn.Module]:
    """The layer, and transformers' with the same weights."""
    config = DecoderConfig(
        dim=options.dim, layers=1, heads=1, kv_heads=1, ffn_dim=options.width, vocab_size=1, experts=options.experts
    )  # fmt: skip
    layer = MoE(config)
    theirs = MixtralSparseMoeBlock(  # type: ignore[no-untyped-call]
        MixtralConfig(
            hidden_size=options.dim,
            intermediate_size=options.width,
            num_local_experts=options.experts,
            num_experts_per_tok=config.experts_per_token,
        )
    )
    assert layer.experts.gate is not None
    weights = {
        "gate.weight": layer.router.weight,
        "experts.gate_up_proj": torch.cat((layer.experts.gate, layer.experts.up), 1),
        "experts.down_proj": layer.experts.down,
    }
    theirs.load_state_dict(weights)
    return layer, theirs


def _forward_backward(layer: nn.Module, x: Tensor) -> None:
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.ones_like(y))


def _seconds(way: Callable[[], None], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
