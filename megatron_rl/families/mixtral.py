"""This module is the family of Mixtral: Mistral whose MLPs are mixtures of experts, without a shared expert."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.expert_fields import experts_of_all_layers
from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_head_dim, check_neutral, common_fields
from megatron_rl.families.tensors import TensorNames

_DEFAULTS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": False}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    # Noise on what routers read, while transformers trains: then the policy is not the one that sampled.
    check_neutral(values, {"router_jitter_noise": (None, 0)}, " (Mixtral)")
    experts = experts_of_all_layers(values, "num_local_experts")
    check_head_dim(values, " (Mixtral)")
    return common_fields(values, _DEFAULTS) | experts | {"norm_topk_prob": True}


MIXTRAL = Family(
    key="mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    read=_read,
    tensors=TensorNames(
        router="block_sparse_moe.gate.weight",
        experts="block_sparse_moe.experts.{}.",
        gate_up=("w1.weight", "w3.weight"),
        down="w2.weight",
    ),
)
