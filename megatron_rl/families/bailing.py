"""This module is the family BailingMoE, version 1: Ling-lite, Ling-plus and Ring-lite.

Dropout is read and left out. The released modelling code (github.com/inclusionAI/Ring, models/modeling_bailing_moe.py)
never applies `embedding_dropout` and `output_dropout`, and `attention_dropout` only while it trains; servers apply
none. Training here has none either, since a policy with dropout is not the one that sampled.
"""

from collections.abc import Mapping
from typing import Any

from megatron_rl.families.bounds import MAX_WIDTH
from megatron_rl.families.family import Family
from megatron_rl.families.fields import check_neutral, common_fields, count, first_dense_layers, require, tell
from megatron_rl.families.tensors import TensorNames
from megatron_rl.parsing import shown

# Ling-lite-base asks for 0.1 after the embedding and after each block, the chat models for none.
_DROPOUTS = ("attention_dropout", "embedding_dropout", "output_dropout")
_VERSION_1 = {
    "use_qkv_bias": (None, False),
    "use_qk_norm": (None, False),
    "partial_rotary_factor": (None, 1),
    "rotary_dim": (None,),
    "score_function": (None, "softmax"),
    "moe_router_enable_expert_bias": (None, False),
    "routed_scaling_factor": (None, 1),
    "n_group": (None, 0, 1),
    "topk_group": (None, 0, 1),
}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    check_neutral(values, _VERSION_1, " (BailingMoE version 1)")
    require(values, ("moe_intermediate_size", "num_experts", "num_experts_per_tok"))
    found = common_fields(values, {"initializer_range": 0.006, "rms_norm_eps": 1e-5})
    count(values, "num_experts", 1, 2**16)
    shared, width = count(values, "num_shared_experts", 0, 4096), values["moe_intermediate_size"]
    found |= {
        "dense_layers": first_dense_layers(values),
        "num_experts": values["num_experts"],
        "num_experts_per_tok": count(values, "num_experts_per_tok", 1, 2**16),
        "moe_intermediate_size": count(values, "moe_intermediate_size", 1, MAX_WIDTH),
        # The shared experts make one MLP of their joint width.
        "shared_intermediate_size": shared * width,
    }
    if found["num_experts_per_tok"] == 1 and values.get("norm_topk_prob") is not False:
        raise ValueError(
            "num_experts_per_tok 1 with norm_topk_prob gives the one expert a weight of 1, where the released code has "
            "its probability; set norm_topk_prob = false in config.json"
        )
    found |= {name: values[name] for name in ("norm_topk_prob", "norm_head") if values.get(name) is not None}
    tell_of_dropout(values)
    return found


def tell_of_dropout(values: Mapping[str, Any]) -> None:
    """Tell that dropout which config.json asks for is left out."""
    dropouts = ", ".join(f"{name} {shown(values[name])}" for name in _DROPOUTS if values.get(name))
    if dropouts:
        tell(f"config.json asks for {dropouts}; training and servers here run without dropout")


BAILING_MOE = Family(
    key="bailing_moe",
    architectures=("BailingMoeForCausalLM",),
    model_types=("bailing_moe",),
    read=_read,
    remote_code=True,
    tensors=TensorNames(
        embedding="model.word_embeddings.weight",
        qkv=("attention.query_key_value",),
        output="attention.dense.weight",
    ),
)
