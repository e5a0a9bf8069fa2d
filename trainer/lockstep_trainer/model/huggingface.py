"""What `transformers` calls the same decoder: config.json and the names of tensors, both ways. Without torch.

Names and configuration are those of published checkpoints (releases 4 and 5 read both), one tensor for each expert.
``export`` writes such folders and ``pretrained`` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep_trainer.errors import UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.weights import weights

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of `transformers`: its class, model_type, and what its experts' tensors are called."""

    architecture: str
    model_type: str
    router: str = ""
    experts: str = ""  # with the expert's number and the matrix to fill in
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    bias: str = ""  # of the router; "" where the family has none


_QWEN_EXPERTS = "mlp.experts.{expert}.{matrix}.weight"
LLAMA = Family("LlamaForCausalLM", "llama")
MISTRAL = Family("MistralForCausalLM", "mistral")
QWEN2 = Family("Qwen2ForCausalLM", "qwen2")
QWEN3 = Family("Qwen3ForCausalLM", "qwen3")
MIXTRAL = Family(
    "MixtralForCausalLM",
    "mixtral",
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{expert}.{matrix}.weight",
    ("w1", "w3", "w2"),
)
QWEN3_MOE = Family("Qwen3MoeForCausalLM", "qwen3_moe", "mlp.gate.weight", _QWEN_EXPERTS)
GLM4_MOE = Family(
    "Glm4MoeForCausalLM", "glm4_moe", "mlp.gate.weight", _QWEN_EXPERTS, bias="mlp.gate.e_score_correction_bias"
)
FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, GLM4_MOE)}

# --- which family ----------------------------------------------------------------------------------------------------


def family(config: DecoderConfig) -> Family:
    """The architecture that gives the same logits; raises UserError where `transformers` has none.

    Call it before the first step of a job that exports its model.
    """
    unknown = [
        (config.norm != "rms", f"norm {config.norm}", "norm: rms"),
        (config.activation != "swiglu", f"activation {config.activation}", "activation: swiglu"),
        (config.positions != "rope", f"positions {config.positions}", "positions: rope"),
        (
            config.qk_norm and config.attention_bias and config.routing != "sigmoid",
            "attention_bias together with qk_norm",
            "attention_bias: false",
        ),
    ]
    chosen = _mixture(config, unknown) if config.experts else _dense(config)
    for wrong, what, instead in unknown:
        if wrong:
            raise UserError(
                f"trainer.export: Hugging Face's transformers has no architecture with {what}; set {instead} in "
                "trainer.model.overrides, or leave trainer.export out"
            )
    return chosen


def _dense(config: DecoderConfig) -> Family:
    if config.qk_norm:
        return QWEN3
    if config.attention_bias:
        return QWEN2
    return MISTRAL if config.window else LLAMA


def _mixture(config: DecoderConfig, unknown: list[tuple[bool, str, str]]) -> Family:
    if config.routing == "sigmoid":
        width = config.expert_width
        unknown += [
            (bool(config.window), "sigmoid routing and a window", "window: 0"),
            (
                not config.shared_expert_dim or bool(config.shared_expert_dim % width),
                f"sigmoid routing and a shared expert of {config.shared_expert_dim}",
                f"shared_expert_dim to a multiple of the experts' {width}",
            ),
        ]
        return GLM4_MOE
    unknown += [
        (bool(config.shared_expert_dim), "softmax routing and shared experts", "shared_expert_dim: 0"),
        (
            config.balance_rate > 0,
            "softmax routing and a bias that balances experts",
            "balance_rate: 0 (or routing: sigmoid with a shared expert)",
        ),
        (config.attention_bias, "softmax routing and attention_bias", "attention_bias: false"),
    ]
    if config.qk_norm:
        return QWEN3_MOE
    unknown += [
        (not config.normalize_routing, "weights of experts that are not normalised", "normalize_routing: true"),
        (config.dense_layers > 0, "layers without experts and no qk_norm", "dense_layers: 0"),
    ]
    return MIXTRAL


# --- config.json -----------------------------------------------------------------------------------------------------


def to_json(config: DecoderConfig, *, dtype: str, end_id: int | None) -> Json:
    """config.json; ``dtype`` is that of the weights, ``end_id`` the token that ends a text. Raises UserError."""
    of = family(config)
    found: Json = {
        "architectures": [of.architecture],
        "model_type": of.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_json(config),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }
    if config.rope_scaling == "yarn":  # releases 4 take the factor from this quotient
        found["max_position_embeddings"] = round(config.rope_original_length * config.rope_factor)
    if of is LLAMA:
        found |= {"attention_bias": False, "mlp_bias": False}
    if of in (MISTRAL, MIXTRAL):
        found["sliding_window"] = config.window or None
    if of in (QWEN2, QWEN3, QWEN3_MOE):
        found |= {"use_sliding_window": bool(config.window), "sliding_window": config.window or None}
        found |= {"max_window_layers": 0 if config.window else config.layers, "attention_bias": config.attention_bias}
    if of is MIXTRAL:
        found |= {"intermediate_size": config.expert_width, "num_local_experts": config.experts}
    if of is QWEN3_MOE:
        found |= {"num_experts": config.experts, "decoder_sparse_step": 1}
        found |= {"mlp_only_layers": list(range(config.dense_layers))}
    if of is GLM4_MOE:
        found |= {"n_routed_experts": config.experts, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
        found |= {"n_shared_experts": config.shared_expert_dim // config.expert_width}
        found |= {"first_k_dense_replace": config.dense_layers, "use_qk_norm": config.qk_norm}
        found |= {"partial_rotary_factor": 1.0, "attention_bias": config.attention_bias}
    if of in (QWEN3_MOE, GLM4_MOE):
        found |= {"moe_intermediate_size": config.expert_width, "norm_topk_prob": config.normalize_routing}
    if config.experts:
        found |= {"num_experts_per_tok": config.experts_per_token, "output_router_logits": False}
    return found


def from_json(found: Mapping[str, Any], where: str) -> DecoderConfig:
    """The architecture that a config.json describes; ``where`` names it. Raises UserError where it is another."""
    read = _Reader(found, where)
    architectures = read.get("architectures", [])
    of = FAMILIES.get(architectures[0]) if architectures else None
    if of is None:
        read.refuse("architectures", f"can't be trained; choose a model with one of {', '.join(FAMILIES)}")
    assert of is not None
    read.check(
        hidden_act="silu", mlp_bias=False, quantization_config=None, n_group=1, topk_group=1, routed_scaling_factor=1.0
    )
    if of not in (QWEN2, GLM4_MOE):
        read.check(attention_bias=False)
    heads = int(read.need("num_attention_heads"))
    dim, ffn_dim = int(read.need("hidden_size")), int(read.need("intermediate_size"))
    layers = int(read.need("num_hidden_layers"))
    width = int(found.get("head_dim") or dim // heads)
    return DecoderConfig(
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=int(read.get("num_key_value_heads", heads)),
        ffn_dim=ffn_dim,
        vocab_size=int(read.need("vocab_size")),
        head_size=0 if width * heads == dim else width,
        max_length=int(read.get("max_position_embeddings", 8192)),
        tie_embeddings=bool(read.get("tie_word_embeddings", False)),
        norm_eps=float(read.get("rms_norm_eps", 1e-6)),
        qk_norm=of in (QWEN3, QWEN3_MOE) or bool(of is GLM4_MOE and found.get("use_qk_norm")),
        attention_bias=of is QWEN2 or bool(of is GLM4_MOE and found.get("attention_bias")),
        window=_window(read, of, layers),
        **_rope(read),
        **(_experts(read, of, layers) if of.experts else {}),
    )


def _experts(read: _Reader, of: Family, layers: int) -> dict[str, Any]:
    count = next(
        (read.found[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if read.get(key)), 0
    )
    fields: dict[str, Any] = {
        "experts": int(count or read.need("num_experts")),
        "experts_per_token": int(read.need("num_experts_per_tok")),
        "balance_rate": 0.0,  # none of these families but GLM's has the bias
    }
    if of is MIXTRAL:
        return fields
    fields |= {
        "expert_dim": int(read.need("moe_intermediate_size")),
        "normalize_routing": bool(read.get("norm_topk_prob", of is GLM4_MOE)),
    }
    if of is GLM4_MOE:
        shared = int(read.need("n_shared_experts"))
        return fields | {
            "routing": "sigmoid",
            "shared_expert_dim": shared * fields["expert_dim"],
            "dense_layers": int(read.need("first_k_dense_replace")),
            "balance_rate": 1e-3,
        }
    read.check(decoder_sparse_step=1)
    dense = sorted(read.get("mlp_only_layers", []))
    if dense != list(range(len(dense))):
        read.refuse("mlp_only_layers", f"can't be trained: only the first of {layers} layers can be without experts")
    return fields | {"dense_layers": len(dense)}


def _window(read: _Reader, of: Family, layers: int) -> int:
    """How far a token sees, where all layers agree; 0 for all before it."""
    window = read.get("sliding_window", None)
    if not window or not read.get("use_sliding_window", of in (MISTRAL, MIXTRAL)):
        return 0
    if of in (QWEN2, QWEN3):
        kinds = read.get("layer_types", None)
        first = int(read.get("max_window_layers", 28))
        sliding = sum(kind == "sliding_attention" for kind in kinds) if kinds else max(layers - first, 0)
        if sliding == 0:
            return 0
        if sliding < layers:
            read.refuse("sliding_window", f"holds for {sliding} of {layers} layers, and can only be trained for all")
    return int(window)


def _scaling_to_json(config: DecoderConfig) -> Json | None:
    if config.rope_scaling == "none":
        return None
    found: Json = {
        "rope_type": config.rope_scaling,
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.rope_original_length,
    }
    if config.rope_scaling == "llama3":
        return found | {"low_freq_factor": config.rope_low_frequency, "high_freq_factor": config.rope_high_frequency}
    return found | {"beta_fast": config.rope_beta_fast, "beta_slow": config.rope_beta_slow}


def _rope(read: _Reader) -> dict[str, Any]:
    """RoPE as releases 4 write it (rope_theta, rope_scaling) and as release 5 does (rope_parameters)."""
    rope = read.get("rope_parameters", None) or {
        **(read.get("rope_scaling", None) or {}),
        "rope_theta": read.get("rope_theta", 10_000.0),
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or read.get("partial_rotary_factor", 1.0)
    special = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key)]
    if partial != 1.0 or special or not rope.get("truncate", True) or kind not in ("default", "llama3", "yarn"):
        raise UserError(f"{read.where}: RoPE {rope} can't be trained: it is not plain, llama3 or yarn over whole heads")
    fields: dict[str, Any] = {"rope_theta": float(rope["rope_theta"])}
    if kind == "default":
        return fields
    original = rope.get("original_max_position_embeddings") or read.need("max_position_embeddings")
    fields |= {"rope_scaling": kind, "rope_factor": float(rope["factor"]), "rope_original_length": int(original)}
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return fields | {"rope_low_frequency": low, "rope_high_frequency": high}
    return fields | {
        "rope_beta_fast": float(rope.get("beta_fast") or 32),
        "rope_beta_slow": float(rope.get("beta_slow") or 1),
    }


@dataclass(frozen=True, slots=True)
class _Reader:
    found: Mapping[str, Any]
    where: str

    def get(self, key: str, default: Any = None) -> Any:
        value = self.found.get(key, default)
        return default if value is None else value

    def need(self, key: str) -> Any:
        if self.found.get(key) is None:
            raise UserError(f"{self.where}: {key} is missing")
        return self.found[key]

    def check(self, **only: Any) -> None:
        for key, value in only.items():
            if self.get(key, value) != value:
                self.refuse(key, f"can't be trained; only {value} can")

    def refuse(self, key: str, why: str) -> None:
        raise UserError(f"{self.where}: {key} {self.found.get(key)} {why}")


# --- names -----------------------------------------------------------------------------------------------------------

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.query.bias": "self_attn.q_proj.bias",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.key.bias": "self_attn.k_proj.bias",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.value.bias": "self_attn.v_proj.bias",
    "attention.output.weight": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
    "ffn.shared.gate.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.up.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.down.weight": "mlp.shared_experts.down_proj.weight",
}


@dataclass(frozen=True, slots=True)
class Counterpart:
    """A tensor of the training state and what it is in a checkpoint: one tensor of the same shape, or, of the experts,
    one for each index of the first dimension."""

    name: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    stacked: bool = False  # the experts' matrices
    exact: bool = False  # keeps float32, whatever the precision of the rest


def counterparts(config: DecoderConfig, of: Family) -> tuple[Counterpart, ...]:
    """All tensors of a checkpoint of this architecture, in the order of the module."""
    found = []
    for weight in weights(config):
        outside = _OUTSIDE.get(weight.name)
        if outside is not None:
            found.append(Counterpart(weight.name, weight.shape, (outside,)))
            continue
        _, layer, rest = weight.name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if rest == "ffn.router.weight":
            found.append(Counterpart(weight.name, weight.shape, (prefix + of.router,)))
            if of.bias:  # of a model without balancing it is 0
                bias = f"blocks.{layer}.ffn.router_bias"
                found.append(Counterpart(bias, (config.experts,), (prefix + of.bias,), exact=True))
        elif rest.startswith("ffn.experts."):
            matrix = of.matrices[("gate", "up", "down").index(rest.rsplit(".", 1)[1])]
            names = [prefix + of.experts.format(expert=expert, matrix=matrix) for expert in range(config.experts)]
            found.append(Counterpart(weight.name, weight.shape, tuple(names), stacked=True))
        else:
            found.append(Counterpart(weight.name, weight.shape, (prefix + _LAYER[rest],)))
    return tuple(found)
