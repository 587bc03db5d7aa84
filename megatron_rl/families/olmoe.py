"""This module is the family of OLMoE: Llama whose MLPs are mixtures of experts, with RMS norm over all queries and over
all keys of a token.

SGLang writes three of the published values into its code (0.5.21, models/olmoe.py), so others are refused.
"""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.expert_fields import experts_of_all_layers
from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_head_dim, check_neutral, common_fields
from megatron_rl.families.tensors import TensorNames

_DEFAULTS = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    experts = experts_of_all_layers(values, "num_experts")
    as_published = {
        "attention_bias": (None, False),
        "norm_topk_prob": (None, False),
        "rms_norm_eps": (None, 1e-5),
        "num_key_value_heads": (None, values.get("num_attention_heads")),
    }
    check_neutral(values, as_published, " (OLMoE)")
    check_head_dim(values, " (OLMoE)")
    flags = {"qk_norm": True, "qk_norm_joins_heads": True, "norm_topk_prob": False}
    return common_fields(values, _DEFAULTS) | experts | flags


OLMOE = Family(
    key="olmoe",
    architectures=("OlmoeForCausalLM",),
    model_types=("olmoe",),
    read=_read,
    tensors=TensorNames(),
)
