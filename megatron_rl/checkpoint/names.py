"""The one name table between Hugging Face BailingMoE tensors and Megatron parameters, used in both directions.

Megatron names here are *canonical*: those of an undivided model (global layer and expert numbers) built from local
layers. `canonical_name` maps a rank's own parameter names to them. `TensorMapping.stored` is the name in a distributed
checkpoint: that of Megatron's Transformer Engine layers, with the experts of a layer in one tensor [E, ...].
"""

import re
from dataclasses import dataclass

from megatron_rl.checkpoint.layout import Chunked, GateUp, GroupedQkv, Replicated, TensorLayout, Vocabulary
from megatron_rl.families import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
# Norms that Transformer Engine fuses into the linear layer behind them; the second in dense layers only.
STORED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMapping:
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    hf_shape: the shape of each of the Hugging Face tensors.
    stored: its tensor in a distributed checkpoint. expert_index: its place along the first axis of that, for experts.
    expert: divided over the expert- and expert-tensor-parallel groups instead of the tensor-parallel group.
    """

    megatron: str
    hf: tuple[str, ...]
    hf_shape: tuple[int, ...]
    layout: TensorLayout
    stored: str
    expert_index: int | None = None

    @property
    def expert(self) -> bool:
        return self.expert_index is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the full Megatron tensor."""
        return (len(self.hf) * self.hf_shape[0], *self.hf_shape[1:])

    def stored_shape(self, num_experts: int) -> tuple[int, ...]:
        """Of its tensor in a distributed checkpoint, the vocabulary unpadded."""
        return (num_experts, *self.shape) if self.expert else self.shape

    def stored_part(self, part: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where `hf[part]` lies in that tensor, its rows in Megatron's order: (offsets, sizes)."""
        offsets = (part * self.hf_shape[0], *[0] * (len(self.hf_shape) - 1))
        if self.expert_index is None:
            return offsets, self.hf_shape
        return (self.expert_index, *offsets), (1, *self.hf_shape)


def name_table(model: Architecture) -> dict[str, TensorMapping]:
    """Every parameter of the model by its canonical Megatron name."""
    h, v = model.hidden_size, model.vocab_size
    entries = [
        _plain(EMBEDDING, "model.word_embeddings.weight", (v, h), Vocabulary(v)),
        *(entry for layer in range(model.num_hidden_layers) for entry in _layer(model, layer)),
        _plain("decoder.final_layernorm.weight", "model.norm.weight", (h,), Replicated()),
    ]
    if not model.tie_word_embeddings:
        entries.append(_plain("output_layer.weight", "lm_head.weight", (v, h), Vocabulary(v)))
    return {entry.megatron: entry for entry in entries}


def hf_names(table: dict[str, TensorMapping]) -> dict[str, tuple[TensorMapping, int]]:
    """Every Hugging Face tensor by its name: the parameter that it is part of, and its number in `TensorMapping.hf`."""
    return {name: (entry, i) for entry in table.values() for i, name in enumerate(entry.hf)}


def _plain(megatron: str, hf: str, shape: tuple[int, ...], layout: TensorLayout, stored: str = "") -> TensorMapping:
    return TensorMapping(megatron=megatron, hf=(hf,), hf_shape=shape, layout=layout, stored=stored or megatron)


def _layer(model: Architecture, layer: int) -> list[TensorMapping]:
    h, d = model.hidden_size, model.head_dim
    nq, nk = model.num_attention_heads, model.num_key_value_heads
    mcore, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    is_moe = model.is_moe_layer(layer)
    renamed = STORED_NORMS if not is_moe else {"input_layernorm.weight": STORED_NORMS["input_layernorm.weight"]}

    def stored(name: str) -> str:
        return mcore + renamed.get(name, name)

    entries = [
        _plain(
            mcore + "input_layernorm.weight",
            hf + "input_layernorm.weight",
            (h,),
            Replicated(),
            stored("input_layernorm.weight"),
        ),
        _plain(
            mcore + "self_attention.linear_qkv.weight",
            hf + "attention.query_key_value.weight",
            ((nq + 2 * nk) * d, h),
            GroupedQkv(dim=0, num_query_heads=nq, num_kv_heads=nk, head_dim=d),
        ),
        _plain(mcore + "self_attention.linear_proj.weight", hf + "attention.dense.weight", (h, nq * d), Chunked(dim=1)),
        _plain(
            mcore + "pre_mlp_layernorm.weight",
            hf + "post_attention_layernorm.weight",
            (h,),
            Replicated(),
            stored("pre_mlp_layernorm.weight"),
        ),
    ]
    if not is_moe:
        return entries + _mlp(mcore + "mlp.", hf + "mlp.", h, model.intermediate_size)
    entries.append(_plain(mcore + "mlp.router.weight", hf + "mlp.gate.weight", (model.num_experts, h), Replicated()))
    for expert in range(model.num_experts):
        names = (f"{mcore}mlp.experts.{expert}.", f"{hf}mlp.experts.{expert}.")
        entries += _mlp(*names, h, model.moe_intermediate_size, stored=f"{mcore}mlp.experts.experts.", expert=expert)
    if model.num_shared_experts:
        shared = (mcore + "mlp.shared_experts.", hf + "mlp.shared_experts.")
        entries += _mlp(*shared, h, model.shared_intermediate_size)
    return entries


def _mlp(
    mcore: str, hf: str, hidden: int, intermediate: int, stored: str = "", expert: int | None = None
) -> list[TensorMapping]:
    return [
        TensorMapping(
            megatron=mcore + "linear_fc1.weight",
            hf=(hf + "gate_proj.weight", hf + "up_proj.weight"),
            hf_shape=(intermediate, hidden),
            layout=GateUp(),
            stored=(stored or mcore) + "linear_fc1.weight",
            expert_index=expert,
        ),
        TensorMapping(
            megatron=mcore + "linear_fc2.weight",
            hf=(hf + "down_proj.weight",),
            hf_shape=(hidden, intermediate),
            layout=Chunked(dim=1),
            stored=(stored or mcore) + "linear_fc2.weight",
            expert_index=expert,
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
