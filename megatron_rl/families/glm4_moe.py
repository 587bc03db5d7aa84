"""This module is the family of GLM-4.5, 4.6 and 4.7, and of GLM-4.5-Air: mixtures of experts with sigmoid routers."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.expert_fields import experts_by_sigmoid
from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_neutral, common_fields, count, flag, require
from megatron_rl.families.tensors import TensorNames

_REQUIRED = (
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
)
_DEFAULTS = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "partial_rotary_factor": 0.5}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    require(values, _REQUIRED)
    check_neutral(values, {"norm_topk_prob": (None, True)}, " (GLM-4.5)")
    # transformers divides the score of a single expert by itself; Architecture cannot say so.
    count(values, "num_experts_per_tok", 2, 2**16)
    found = common_fields(values, _DEFAULTS, partial_rotary=True, further_tokens=True)
    found |= experts_by_sigmoid(values, "n_routed_experts", "n_shared_experts")
    return found | {
        "qkv_bias": flag(values, "attention_bias", default=False),
        "qk_norm": flag(values, "use_qk_norm", default=False),
        "expert_bias": True,
    }


GLM4_MOE = Family(
    key="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    model_types=("glm4_moe",),
    read=_read,
    tensors=TensorNames(expert_bias="mlp.gate.e_score_correction_bias"),
)
