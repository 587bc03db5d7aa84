"""The weights as `model.py` multiplies with them, and the raw tensors that they are made of.

Shapes: H hidden, V vocabulary, d head_dim, E experts, I expert width, W width of an MLP that sees every token (the
shared expert of a mixture-of-experts layer, or the MLP of a dense one).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.families import Architecture

READABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer layer; matrices are stored [in, out], ready for `x @ w`."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [H, (nq + 2 nkv) d]
    dense: Tensor  # [nq d, H]
    mlp_norm: Tensor  # [H]
    mlp: "Mlp | None"  # over every token; None in a mixture-of-experts layer without shared experts
    router: Tensor | None  # [H, at least E] fp32, zero columns behind E; None in a dense layer
    experts: tuple["Mlp", ...]  # E of width I; none in a dense layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    gate_up: Tensor  # [H, 2 W]: the gate columns, then the up columns
    down: Tensor  # [W, H]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    embedding: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [H]
    head: Tensor  # [H, V] fp32, already normalised when norm_head is set


def expected_tensors(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor name of the model under its Hugging Face name, with its shape."""
    h, d = config.hidden_size, config.head_dim
    nq, nkv = config.num_attention_heads, config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (config.vocab_size, h),
        "model.norm.weight": (h,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, h)

    def add_mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (width, h)
        shapes[f"{prefix}.up_proj.weight"] = (width, h)
        shapes[f"{prefix}.down_proj.weight"] = (h, width)

    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (h,)
        shapes[f"{layer}.attention.query_key_value.weight"] = ((nq + 2 * nkv) * d, h)
        shapes[f"{layer}.attention.dense.weight"] = (h, nq * d)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (h,)
        if not config.is_moe_layer(index):
            add_mlp(f"{layer}.mlp", config.intermediate_size)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (config.num_experts, h)
        for expert in range(config.num_experts):
            add_mlp(f"{layer}.mlp.experts.{expert}", config.moe_intermediate_size)
        if config.num_shared_experts:
            add_mlp(f"{layer}.mlp.shared_experts", config.shared_intermediate_size)
    return shapes


def output_weight(config: Architecture) -> str:
    """Name of the tensor that makes logits."""
    return "model.word_embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"


def some(names: list[str]) -> str:
    """At most three of them, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
