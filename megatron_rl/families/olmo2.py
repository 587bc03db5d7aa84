"""This module is the family of OLMo 2: Llama with its norms behind attention and MLP.

Queries and keys have RMS norms too, over all heads of a token together.
"""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_head_dim, check_neutral, common_fields
from megatron_rl.families.tensors import TensorNames

_DEFAULTS = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    check_neutral(values, {"attention_bias": (None, False)}, " (OLMo 2)")
    check_head_dim(values, " (OLMo 2)")
    flags = {"qk_norm": True, "qk_norm_joins_heads": True, "norms_outputs": True}
    return common_fields(values, _DEFAULTS) | flags


OLMO2 = Family(
    key="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    read=_read,
    tensors=TensorNames(input_norm="post_attention_layernorm.weight", mlp_norm="post_feedforward_layernorm.weight"),
)
