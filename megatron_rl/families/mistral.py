"""This module is the family of Mistral without sliding windows: 7B from version 0.2 on, Nemo, Small 3."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.family import Family
from megatron_rl.families.fields import common_fields
from megatron_rl.families.tensors import TensorNames

_DEFAULTS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    # For transformers a file that does not say otherwise has windows of 4,096 tokens.
    return common_fields({"sliding_window": 4096, **values}, _DEFAULTS)


MISTRAL = Family(
    key="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    read=_read,
    tensors=TensorNames(),
)
