"""FLOPs of training by formula, and what GPUs can do: the two sides of model FLOPs utilisation (MFU).

Matrix products only, as is usual: 2 FLOPs for each weight that a token meets in the forward pass and twice that in the
backward pass (6N, Kaplan et al. 2020), and the same for scores and values of attention (Chowdhery et al. 2022, appendix
B). What is computed a second time (activation checkpointing, flash attention's backward pass) does not count.
"""

from __future__ import annotations

import re

from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.weights import weights

TERA = 10**12


def training_flops_per_token(config: DecoderConfig, sequence_length: int, *, full_square: bool = False) -> float:
    """FLOPs of forward and backward pass for one token of a sequence of ``sequence_length``."""
    return 3 * forward_flops_per_token(config, sequence_length, full_square=full_square)


def forward_flops_per_token(config: DecoderConfig, sequence_length: int, *, full_square: bool = False) -> float:
    """FLOPs of the forward pass for one token of a sequence of ``sequence_length``.

    Attention counts the pairs that the causal order and the window let through, on average (T + 1) / 2 keys for a query
    and not T. ``full_square`` counts all pairs, as PaLM and Megatron-LM do: use it to compare with their MFU. Document
    masks, which let through less, are not taken off.
    """
    return 2.0 * matrix_weights(config) + attention_flops_per_token(config, sequence_length, full_square=full_square)


def matrix_weights(config: DecoderConfig) -> int:
    """Weights that a token is multiplied with: matrices, of the experts the chosen ones; the head, tied or not; not the
    embedding's look-up."""
    count = config.vocab_size * config.dim
    for weight in weights(config):
        if weight.name.startswith("blocks.") and len(weight.shape) == 2:
            count += weight.count
        elif len(weight.shape) == 3:
            count += weight.count // config.experts * config.experts_per_token
    return count


def attention_flops_per_token(config: DecoderConfig, sequence_length: int, *, full_square: bool = False) -> float:
    """FLOPs of QKᵀ and of the product with V in the forward pass, for one token, all layers."""
    keys = float(sequence_length) if full_square else mean_keys(sequence_length, config.window)
    return 4.0 * config.layers * config.heads * config.head_dim * keys


def mean_keys(sequence_length: int, window: int) -> float:
    """How many keys a query sees on average, itself included; ``window`` 0 is none."""
    window = min(window or sequence_length, sequence_length)
    return window - window * (window - 1) / 2 / sequence_length  # the first window − 1 queries see fewer


# Dense TFLOP/s, without sparsity, of one device as torch names it, from the makers' data sheets: bfloat16 on tensor
# cores, and float32 without TF32, which training does not allow (None: not known). The first name that occurs in the
# device's, in whole words, counts: variants come before their family.
_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    ("GB300", 2_500, None),
    ("GB200", 2_500, 80),
    ("B300", 2_250, 75),
    ("B200", 2_250, 75),
    ("B100", 1_750, 60),
    ("GH200", 989.4, 67),
    ("H200 NVL", 835.5, 60),
    ("H200", 989.4, 67),
    ("H100 PCIe", 756.5, 51),
    ("H100 NVL", 835.5, 60),
    ("H100", 989.4, 67),  # SXM: «NVIDIA H100 80GB HBM3»
    ("H800 PCIe", 756.5, 51),
    ("H800", 989.4, 67),
    ("H20", 148, 44),
    ("A100", 312, 19.5),
    ("A800", 312, 19.5),
    ("A40", 149.7, 37.4),
    ("A10G", 70, None),
    ("A10", 125, 31.2),
    ("L40S", 362, 91.6),
    ("L40", 181, 90.5),
    ("L4", 121, 30.3),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71, 35.6),
    ("MI355X", 2_516, 157.3),
    ("MI350X", 2_310, 144.2),
    ("MI325X", 1_307.4, 163.4),
    ("MI300X", 1_307.4, 163.4),
)
_FLOAT8 = ("GB", "B300", "B200", "B100", "GH200", "H200", "H100", "H800", "H20", "L40S", "L40", "L4", "RTX 4090", "MI3")
_OTHERS = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|D)\b")
"""Words of devices that share a name of the table and not its figures: slices of one, and siblings."""


def peak_flops(device_name: str, precision: str = "bf16") -> float | None:
    """FLOP/s that one device reaches at most, by the name that ``torch.cuda.get_device_name`` gives.

    ``precision`` is bf16, fp32 (without TF32) or float8 (twice bfloat16's, where the device has it). None for a device
    or precision that is not in the table: there is no MFU then.
    """
    if _OTHERS.search(device_name):
        return None
    for name, bf16, fp32 in _PEAKS:
        if re.search(rf"\b{name}\b", device_name):
            if precision == "float8":
                return 2 * bf16 * TERA if name.startswith(_FLOAT8) else None
            peak = fp32 if precision == "fp32" else bf16
            return None if peak is None else peak * TERA
    return None


def model_flops_utilization(flops_per_token: float, tokens_per_second: float, peak: float) -> float:
    """MFU: model FLOPs done per second as a share of what the device can do; tokens per second of one device."""
    return flops_per_token * tokens_per_second / peak
