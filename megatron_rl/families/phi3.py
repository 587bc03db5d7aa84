"""This module is the family of Phi-4 (14B), and of models of Phi-3 without longrope and sliding windows.

It is Llama with queries, keys and values in one tensor, and an MLP's gate and what it gates in another.
"""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_head_dim, check_neutral, common_fields
from megatron_rl.families.tensors import TensorNames
from megatron_rl.parsing import shown

_DEFAULTS = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    check_neutral(values, {"attention_bias": (None, False)}, " (Phi-3)")
    check_head_dim(values, " (Phi-3)")
    found = common_fields(values, _DEFAULTS)
    if found["rotary"]["kind"] != "default":  # transformers takes yarn for another name of longrope
        raise ValueError(f"rope_type must be 'default' (Phi-3), got {shown(found['rotary']['kind'])}")
    return found


PHI3 = Family(
    key="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    read=_read,
    tensors=TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("gate_up_proj.weight",)),
)
