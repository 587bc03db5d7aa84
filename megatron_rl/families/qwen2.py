"""This module is the family of Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.family import Family
from megatron_rl.families.fields import common_fields
from megatron_rl.families.tensors import TensorNames


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    return common_fields(values, {"tie_word_embeddings": False}) | {"qkv_bias": True}


QWEN2 = Family(
    key="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    read=_read,
    tensors=TensorNames(),
)
