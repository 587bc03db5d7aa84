"""This module is the family of Llama 2 and 3, and of models with their architecture: SmolLM2."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_neutral, common_fields
from megatron_rl.families.tensors import TensorNames

_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    check_neutral(values, {"attention_bias": (None, False)}, " (Llama)")
    return common_fields(values, _DEFAULTS)


LLAMA = Family(
    key="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    read=_read,
    tensors=TensorNames(),
)
