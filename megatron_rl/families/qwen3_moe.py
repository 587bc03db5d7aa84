"""This module is the family of Qwen3-MoE: Qwen3 whose MLPs are mixtures of experts, without a shared expert."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.bounds import MAX_WIDTH
from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_neutral, common_fields, count, require
from megatron_rl.families.rotary_fields import agreed
from megatron_rl.families.tensors import TensorNames
from megatron_rl.parsing import shown

_DEFAULTS = {"tie_word_embeddings": False}
_REQUIRED = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    check_neutral(
        values, {"attention_bias": (None, False), "shared_expert_intermediate_size": (None, 0)}, " (Qwen3-MoE)"
    )
    # transformers 5 writes the second name.
    names = ("num_experts", "num_local_experts")
    values = {**values, "num_experts": agreed(" or ".join(names), *(values.get(name) for name in names))}
    require(values, _REQUIRED)
    found = common_fields(values, _DEFAULTS)
    return found | {
        "qk_norm": True,
        "dense_layers": _dense_layers(values, count(values, "num_hidden_layers", 1, 4096)),
        "num_experts": count(values, "num_experts", 1, 2**16),
        "num_experts_per_tok": count(values, "num_experts_per_tok", 1, 2**16),
        "moe_intermediate_size": count(values, "moe_intermediate_size", 1, MAX_WIDTH),
        "norm_topk_prob": False if values.get("norm_topk_prob") is None else values["norm_topk_prob"],
    }


def _dense_layers(values: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """List the numbers of the layers without experts: those of `mlp_only_layers`, and all but each
    `decoder_sparse_step`-th."""
    step, named = count(values, "decoder_sparse_step", 1, 4096), values.get("mlp_only_layers")
    named = [] if named is None else named
    if not isinstance(named, list) or any(type(layer) is not int or not 0 <= layer < num_layers for layer in named):
        raise ValueError(f"mlp_only_layers must list layers from 0 to {num_layers - 1}, got {shown(named)}")
    return tuple(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)


QWEN3_MOE = Family(
    key="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    read=_read,
    tensors=TensorNames(),
)
