"""This module reads the fields of config.json about mixtures of experts, where several families have them alike."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.bounds import MAX_WIDTH
from megatron_rl.families.fields import count, first_dense_layers, require


def experts_of_all_layers(values: Mapping[str, Any], num_experts: str) -> dict[str, Any]:
    """Read the experts of a family that has no dense layer and no shared expert. num_experts: the name of the field
    with their number."""
    require(values, (num_experts, "num_experts_per_tok", "intermediate_size"))
    return {
        "intermediate_size": 0,  # config.json's is that of an expert
        "num_experts": count(values, num_experts, 1, 2**16),
        "num_experts_per_tok": count(values, "num_experts_per_tok", 1, 2**16),
        "moe_intermediate_size": count(values, "intermediate_size", 1, MAX_WIDTH),
    }


def experts_by_sigmoid(values: Mapping[str, Any], num_experts: str, num_shared: str) -> dict[str, Any]:
    """Read the experts of a family whose routers score each expert by a sigmoid. num_experts, num_shared: the names of
    the fields with their numbers."""
    width = count(values, "moe_intermediate_size", 1, MAX_WIDTH)
    experts_per_token = count(values, "num_experts_per_tok", 1, 2**16)
    return {
        "dense_layers": first_dense_layers(values),
        "num_experts": count(values, num_experts, 1, 2**16),
        "num_experts_per_tok": experts_per_token,
        "moe_intermediate_size": width,
        # The shared experts make one MLP of their joint width.
        "shared_intermediate_size": count(values, num_shared, 0, 4096) * width,
        "score_function": "sigmoid",
        # Some files say with 0 that there are no groups.
        "n_group": count(values, "n_group", 0, 2**16) or 1,
        "topk_group": count(values, "topk_group", 0, 2**16) or 1,
        # The score of a single expert is its weight.
        "norm_topk_prob": experts_per_token > 1,
        "routed_scaling_factor": 1.0 if (factor := values.get("routed_scaling_factor")) is None else factor,
    }
