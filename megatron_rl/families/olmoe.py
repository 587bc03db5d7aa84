"""This module is the family of OLMoE: Llama whose MLPs are mixtures of experts, with RMS norm over all queries and over
all keys of a token.

SGLang writes three of the published values into its code (0.5.21, models/olmoe.py), so others are refused.
"""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.bounds import MAX_WIDTH
from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_head_dim, check_neutral, common_fields, count, require
from megatron_rl.families.tensors import TensorNames

_DEFAULTS = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    require(values, ("num_experts", "num_experts_per_tok", "intermediate_size"))
    as_published = {
        "attention_bias": (None, False),
        "norm_topk_prob": (None, False),
        "rms_norm_eps": (None, 1e-5),
        "num_key_value_heads": (None, values.get("num_attention_heads")),
    }
    check_neutral(values, as_published, " (OLMoE)")
    check_head_dim(values, " (OLMoE)")
    return common_fields(values, _DEFAULTS) | {
        "qk_norm": True,
        "qk_norm_joins_heads": True,
        "intermediate_size": 0,  # config.json's is that of an expert, and no layer is dense
        "num_experts": count(values, "num_experts", 1, 2**16),
        "num_experts_per_tok": count(values, "num_experts_per_tok", 1, 2**16),
        "moe_intermediate_size": count(values, "intermediate_size", 1, MAX_WIDTH),
        "norm_topk_prob": False,
    }


OLMOE = Family(
    key="olmoe",
    architectures=("OlmoeForCausalLM",),
    model_types=("olmoe",),
    read=_read,
    tensors=TensorNames(),
)
