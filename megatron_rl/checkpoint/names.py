"""The one name table between Hugging Face BailingMoE tensors and Megatron parameters, used in both directions.

Megatron names here are *canonical*: those of an undivided model (global layer and expert numbers) built from local
layers. `canonical_name` maps a rank's own parameter names to them.
"""

import re
from dataclasses import dataclass

from megatron_rl.checkpoint.layout import Chunked, GateUp, GroupedQkv, Replicated, TensorLayout, Vocabulary
from megatron_rl.config.bailing import BailingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    hf_shape: the shape of each of the Hugging Face tensors.
    expert: divided over the expert- and expert-tensor-parallel groups instead of the tensor-parallel group.
    """

    megatron: str
    hf: tuple[str, ...]
    hf_shape: tuple[int, ...]
    layout: TensorLayout
    expert: bool = False


def name_table(model: BailingConfig) -> dict[str, Mapping]:
    """Every parameter of the model by its canonical Megatron name."""
    h, v = model.hidden_size, model.vocab_size
    entries = [
        Mapping(
            megatron="embedding.word_embeddings.weight",
            hf=("model.word_embeddings.weight",),
            hf_shape=(v, h),
            layout=Vocabulary(v),
        ),
        Mapping(
            megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",), hf_shape=(h,), layout=Replicated()
        ),
        Mapping(megatron="output_layer.weight", hf=("lm_head.weight",), hf_shape=(v, h), layout=Vocabulary(v)),
    ]
    for layer in range(model.num_hidden_layers):
        entries += _layer(model, layer)
    return {entry.megatron: entry for entry in entries}


def _layer(model: BailingConfig, layer: int) -> list[Mapping]:
    h, d = model.hidden_size, model.head_dim
    nq, nk = model.num_attention_heads, model.num_key_value_heads
    mcore, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    entries = [
        Mapping(
            megatron=mcore + "input_layernorm.weight",
            hf=(hf + "input_layernorm.weight",),
            hf_shape=(h,),
            layout=Replicated(),
        ),
        Mapping(
            megatron=mcore + "self_attention.linear_qkv.weight",
            hf=(hf + "attention.query_key_value.weight",),
            hf_shape=((nq + 2 * nk) * d, h),
            layout=GroupedQkv(dim=0, num_query_heads=nq, num_kv_heads=nk, head_dim=d),
        ),
        Mapping(
            megatron=mcore + "self_attention.linear_proj.weight",
            hf=(hf + "attention.dense.weight",),
            hf_shape=(h, nq * d),
            layout=Chunked(dim=1),
        ),
        Mapping(
            megatron=mcore + "pre_mlp_layernorm.weight",
            hf=(hf + "post_attention_layernorm.weight",),
            hf_shape=(h,),
            layout=Replicated(),
        ),
    ]
    if not model.is_moe_layer(layer):
        return entries + _mlp(mcore + "mlp.", hf + "mlp.", h, model.intermediate_size)
    entries.append(
        Mapping(
            megatron=mcore + "mlp.router.weight",
            hf=(hf + "mlp.gate.weight",),
            hf_shape=(model.num_experts, h),
            layout=Replicated(),
        )
    )
    for expert in range(model.num_experts):
        megatron, source = f"{mcore}mlp.experts.{expert}.", f"{hf}mlp.experts.{expert}."
        entries += _mlp(megatron, source, h, model.moe_intermediate_size, expert=True)
    if model.num_shared_experts:
        shared = (mcore + "mlp.shared_experts.", hf + "mlp.shared_experts.")
        entries += _mlp(*shared, h, model.shared_intermediate_size)
    return entries


def _mlp(mcore: str, hf: str, hidden: int, intermediate: int, expert: bool = False) -> list[Mapping]:
    return [
        Mapping(
            megatron=mcore + "linear_fc1.weight",
            hf=(hf + "gate_proj.weight", hf + "up_proj.weight"),
            hf_shape=(intermediate, hidden),
            layout=GateUp(),
            expert=expert,
        ),
        Mapping(
            megatron=mcore + "linear_fc2.weight",
            hf=(hf + "down_proj.weight",),
            hf_shape=(hidden, intermediate),
            layout=Chunked(dim=1),
            expert=expert,
        ),
    ]


# How Transformer Engine's fused modules call what the local modules call otherwise.
_ALIASES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r"mlp.experts.\2.\1.weight"),
    (re.compile(r"mlp\.experts\.local_experts\.(\d+)\."), r"mlp.experts.\1."),
)
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.")


def canonical_name(local_name: str, layer_offset: int, expert_offset: int) -> str:
    """The canonical name of a rank's parameter, whose first layer and expert have these global numbers."""
    name = local_name
    for pattern, replacement in _ALIASES:
        name = pattern.sub(replacement, name)
    name = _LAYER.sub(lambda m: f"decoder.layers.{int(m[1]) + layer_offset}.", name)
    return _EXPERT.sub(lambda m: f"mlp.experts.{int(m[1]) + expert_offset}.", name)
