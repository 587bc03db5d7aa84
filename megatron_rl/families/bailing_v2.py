"""This module is the family BailingMoE, version 2: Ling-mini-2.0, Ring-mini-2.0, their flash and 1T sisters.

The facts are from the vendor's code (github.com/inclusionAI/Ring-V2, models/, commit 96366fa). Dropout is left out as
in version 1.
"""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.bailing import tell_of_dropout
from megatron_rl.families.bounds import MAX_WIDTH
from megatron_rl.families.expert_fields import experts_by_sigmoid
from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_neutral, common_fields, count, flag, require
from megatron_rl.families.tensors import TensorNames
from megatron_rl.parsing import shown

_REQUIRED = (
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
)
_VERSION_2 = {
    "use_qkv_bias": (None, False),
    "score_function": (None, "sigmoid"),
    "norm_topk_prob": (None, True),
    "norm_head": (None, False),
    "router_type": (None, "topN"),
    "multi_gate": (None, False),
    "router_dtype": (None, "fp32"),
    "use_rmsnorm": (None, True),
    "rope_interleave": (None, False),
}
_DEFAULTS = {"head_dim": 128, "rope_theta": 600000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    check_neutral(values, _VERSION_2, " (BailingMoE version 2)")
    require(values, _REQUIRED)
    width = count(values, "moe_intermediate_size", 1, MAX_WIDTH)
    check_neutral(values, {"moe_shared_expert_intermediate_size": (None, width)}, ", as moe_intermediate_size is")
    found = common_fields(values, _DEFAULTS, partial_rotary=True, further_tokens=True)
    _check_rotated_part(values, found)
    tell_of_dropout(values)
    found |= experts_by_sigmoid(values, "num_experts", "num_shared_experts")
    return found | {
        "qk_norm": flag(values, "use_qk_norm", default=True),
        "expert_bias": flag(values, "moe_router_enable_expert_bias", default=True),
    }


def _check_rotated_part(values: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ValueError where `rotary_dim`, which some servers read, is not the part that `partial_rotary_factor`
    says."""
    width, head_dim = values.get("rotary_dim"), found["head_dim"]
    if width is not None and isinstance(head_dim, int) and width != round(head_dim * found["rotary"]["fraction"]):
        raise ValueError(
            f"rotary_dim {shown(width)} must be head_dim {head_dim} times partial_rotary_factor "
            f"{found['rotary']['fraction']:g}"
        )


BAILING_MOE_V2 = Family(
    key="bailing_moe_v2",
    architectures=("BailingMoeV2ForCausalLM",),
    # The published files have version 1's.
    model_types=("bailing_moe_v2", "bailing_moe"),
    read=_read,
    is_unscaled_on_cpu=True,
    remote_code=True,
    tensors=TensorNames(
        embedding="model.word_embeddings.weight",
        qkv=("attention.query_key_value",),
        output="attention.dense.weight",
        qk_norms=("attention.query_layernorm.weight", "attention.key_layernorm.weight"),
    ),
)
