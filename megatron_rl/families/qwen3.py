"""This module is the family of dense Qwen3: Llama with RMS norm on the queries and keys of each head."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_neutral, common_fields
from megatron_rl.families.tensors import TensorNames

_DEFAULTS = {"tie_word_embeddings": False, "head_dim": 128}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    check_neutral(values, {"attention_bias": (None, False)}, " (Qwen3)")
    return common_fields(values, _DEFAULTS) | {"qk_norm": True}


QWEN3 = Family(
    key="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    read=_read,
    tensors=TensorNames(),
)
