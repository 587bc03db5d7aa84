"""This module makes the one table of tensors and parameters, from a family's Hugging Face names to Megatron's. It is
used in both directions.

Megatron names here are *canonical*: those of an undivided model (global layer and expert numbers) built from local
layers. `canonical_name` maps a rank's own parameter names to them. `TensorMapping.stored` is the name in a distributed
checkpoint: that of Megatron's Transformer Engine layers, with the experts of a layer in one tensor [E, ...].
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.checkpoint.layout import Chunked, GateUp, GroupedQkv, Replicated, TensorLayout, Vocabulary
from megatron_rl.config.lora import LoraSection, LoraTarget
from megatron_rl.families import Architecture, family_of, tensor_shapes
from megatron_rl.families.tensors import TensorNames

EMBEDDING = "embedding.word_embeddings.weight"
# A router's bias. It is a buffer, where all else is a parameter.
EXPERT_BIAS = "mlp.router.expert_bias"
# Norms that Transformer Engine fuses into the linear layer behind them; the second in dense layers only.
STORED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMapping:
    """Describes one Megatron parameter and the Hugging Face tensors that it is made of.

    hf_shapes: the shape of each of the Hugging Face tensors.
    stored: its tensor in a distributed checkpoint. expert_index: its place along the first axis of that, for experts.
    expert: divided over the expert- and expert-tensor-parallel groups instead of the tensor-parallel group.
    is_float32: it is float32 whatever the model's type is, and no gradient changes it (a buffer of Megatron's).
    """

    megatron: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layout: TensorLayout
    stored: str
    expert_index: int | None = None
    is_float32: bool = False

    def dtype(self, of_model: torch.dtype) -> torch.dtype:
        """Return the parameter's type in a model of this type."""
        return torch.float32 if self.is_float32 else of_model

    @property
    def expert(self) -> bool:
        return self.expert_index is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the full Megatron tensor."""
        return (sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:])

    def stored_shape(self, num_experts: int) -> tuple[int, ...]:
        """Return the shape of its tensor in a distributed checkpoint, with the vocabulary unpadded."""
        return (num_experts, *self.shape) if self.expert else self.shape

    def stored_pieces(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Yield the pieces of its tensor in a distributed checkpoint that are each written at once: (numbers of Hugging
        Face tensors, offsets, sizes). There is one piece for each Hugging Face tensor where its rows lie together, else
        one piece of all."""
        first = 0
        for part, shape in enumerate(self.hf_shapes):
            offsets = (first, *[0] * (len(shape) - 1))
            if self.layout.interleaves:
                yield tuple(range(len(self.hf))), (0,) * len(shape), self.shape
                return
            if self.expert_index is None:
                yield (part,), offsets, shape
            else:
                yield (part,), (self.expert_index, *offsets), (1, *shape)
            first += shape[0]


def name_table(model: Architecture) -> dict[str, TensorMapping]:
    """List every parameter of the model by its canonical Megatron name."""
    shapes = tensor_shapes(model)
    entries = [
        TensorMapping(megatron=megatron, hf=hf, hf_shapes=tuple(shapes[name] for name in hf), layout=layout, **places)
        for megatron, hf, layout, places in _entries(model, family_of(model).tensors)
    ]
    return {entry.megatron: entry for entry in entries}


def hf_names(table: dict[str, TensorMapping]) -> dict[str, tuple[TensorMapping, int]]:
    """List every Hugging Face tensor by its name: the parameter that it is part of, and its number in
    `TensorMapping.hf`."""
    return {name: (entry, i) for entry in table.values() for i, name in enumerate(entry.hf)}


# The parts of a TensorMapping: megatron, hf, layout, and where it is stored.
_Entry = tuple[str, tuple[str, ...], TensorLayout, dict[str, Any]]


def _entry(megatron: str, hf: str | tuple[str, ...], layout: TensorLayout, stored: str = "") -> _Entry:
    return megatron, (hf,) if isinstance(hf, str) else hf, layout, {"stored": stored or megatron}


def _entries(model: Architecture, names: TensorNames) -> Iterator[_Entry]:
    vocabulary = Vocabulary(model.vocab_size)
    yield _entry(EMBEDDING, names.embedding, vocabulary)
    for layer in range(model.num_hidden_layers):
        yield from _layer(model, names, layer)
    yield _entry("decoder.final_layernorm.weight", names.final_norm, Replicated())
    if not model.tie_word_embeddings:
        yield _entry("output_layer.weight", names.head, vocabulary)


def _layer(model: Architecture, names: TensorNames, layer: int) -> Iterator[_Entry]:
    mcore, hf = f"decoder.layers.{layer}.", names.layer.format(layer)
    is_moe = model.is_moe_layer(layer)
    before, between = "input_layernorm.weight", "pre_mlp_layernorm.weight"
    yield _entry(mcore + before, hf + names.input_norm, Replicated(), mcore + STORED_NORMS[before])
    yield from _attention(model, names, mcore + "self_attention.", hf)
    stored = mcore + (between if is_moe else STORED_NORMS[between])
    yield _entry(mcore + between, hf + names.mlp_norm, Replicated(), stored)
    if not is_moe:
        yield from _mlp(names, mcore + "mlp.", hf + names.mlp)
        return
    yield _entry(mcore + "mlp.router.weight", hf + names.router, Replicated())
    if model.expert_bias:
        bias, theirs, layout, places = _entry(mcore + EXPERT_BIAS, hf + names.expert_bias, Replicated())
        yield bias, theirs, layout, places | {"is_float32": True}
    for expert in range(model.num_experts):
        for megatron, theirs, layout, _ in _mlp(names, "", hf + names.experts.format(expert)):
            places = {"stored": f"{mcore}mlp.experts.experts.{megatron}", "expert_index": expert}
            yield f"{mcore}mlp.experts.{expert}.{megatron}", theirs, layout, places
    if model.shared_intermediate_size:
        yield from _mlp(names, mcore + "mlp.shared_experts.", hf + names.shared)


def _attention(model: Architecture, names: TensorNames, mcore: str, hf: str) -> Iterator[_Entry]:
    layout = GroupedQkv(
        dim=0,
        num_query_heads=model.num_attention_heads,
        num_kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        separate=len(names.qkv) > 1,
    )
    for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
        yield _entry(f"{mcore}linear_qkv.{kind}", tuple(f"{hf}{name}.{kind}" for name in names.qkv), layout)
    if model.qk_norm:
        for own, theirs in zip(("q_layernorm.weight", "k_layernorm.weight"), names.qk_norms, strict=True):
            yield _entry(mcore + own, hf + theirs, Replicated())
    yield _entry(mcore + "linear_proj.weight", hf + names.output, Chunked(dim=1))


def _mlp(names: TensorNames, mcore: str, hf: str) -> Iterator[_Entry]:
    gate_up = tuple(hf + name for name in names.gate_up)
    yield _entry(mcore + "linear_fc1.weight", gate_up, GateUp(separate=len(gate_up) > 1))
    yield _entry(mcore + "linear_fc2.weight", hf + names.down, Chunked(dim=1))


# The two factors of an adapter: a weight [out, in] becomes weight + scale * lora_b [out, rank] lora_a [rank, in].
LORA_A, LORA_B = ".lora_a", ".lora_b"
_WEIGHT = ".weight"
# peft's wrappers around a model of transformers, in the names of what it saves.
_PEFT = "base_model.model."
_TARGETS: tuple[tuple[LoraTarget, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"\.self_attention\.linear_(qkv|proj)\.weight$")),
    ("mlp", re.compile(r"\.\d+\.mlp\.linear_fc[12]\.weight$")),
    ("shared_experts", re.compile(r"\.mlp\.shared_experts\.linear_fc[12]\.weight$")),
    ("experts", re.compile(r"\.mlp\.experts\.\d+\.linear_fc[12]\.weight$")),
)


def lora_target(name: str) -> LoraTarget | None:
    """Return which of `lora.targets` a parameter with this canonical name belongs to; None for one that cannot have an
    adapter."""
    return next((target for target, pattern in _TARGETS if pattern.search(name)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Holds an adapted weight and its two factors, each as a TensorMapping of its own.

    A fused weight has one adapter. queries, keys and values share one `lora_a`, as do gate and up, and the rows of
    `lora_b` are divided as those of the weight are: so a column-parallel weight's `lora_b` has the weight's layout and
    every rank has all of `lora_a`, and a row-parallel weight's `lora_a` is cut as the weight and every rank has all of
    `lora_b`. In Hugging Face names the shared `lora_a` has that of the first tensor; `peft_names` has all of them.
    """

    weight: TensorMapping
    a: TensorMapping
    b: TensorMapping

    def peft_names(self) -> Iterator[tuple[str, str, str]]:
        """Yield, of each Hugging Face tensor of the weight, its name and those of its factors as peft calls them."""
        for name, b in zip(self.weight.hf, self.b.hf, strict=True):
            yield name, _peft_name(name, "A"), b


def _peft_name(weight: str, factor: str) -> str:
    return f"{_PEFT}{weight.removesuffix(_WEIGHT)}.lora_{factor}.weight"


def adapters(model: Architecture, lora: LoraSection) -> dict[str, Adapter]:
    """List every adapter by the canonical name of its weight."""
    return {
        name: _adapter(entry, lora.rank)
        for name, entry in name_table(model).items()
        if lora_target(name) in lora.targets
    }


def adapter_table(model: Architecture, lora: LoraSection) -> dict[str, TensorMapping]:
    """List every factor of every adapter by its canonical name."""
    return {entry.megatron: entry for found in adapters(model, lora).values() for entry in (found.a, found.b)}


def _adapter(weight: TensorMapping, rank: int) -> Adapter:
    columns = weight.shape[1]
    peft_b = tuple(_peft_name(name, "B") for name in weight.hf)
    if weight.layout == Chunked(dim=1):
        a_layout: TensorLayout = weight.layout
        b_layout: TensorLayout = Replicated()
    else:
        a_layout, b_layout = Replicated(), weight.layout
    return Adapter(
        weight=weight,
        a=_factor(weight, LORA_A, (_peft_name(weight.hf[0], "A"),), ((rank, columns),), a_layout),
        b=_factor(weight, LORA_B, peft_b, tuple((shape[0], rank) for shape in weight.hf_shapes), b_layout),
    )


def _factor(
    weight: TensorMapping, suffix: str, hf: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], layout: TensorLayout
) -> TensorMapping:
    return TensorMapping(
        megatron=weight.megatron.removesuffix(_WEIGHT) + suffix,
        hf=hf,
        hf_shapes=shapes,
        layout=layout,
        stored=weight.stored.removesuffix(_WEIGHT) + suffix,
        expert_index=weight.expert_index,
    )


# Transformer Engine's fused modules name some parameters differently from the local modules.
_ALIASES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r"mlp.experts.\2.\1.weight"),
    (re.compile(r"mlp\.experts\.local_experts\.(\d+)\."), r"mlp.experts.\1."),
)
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.")


def canonical_name(local_name: str, layer_offset: int, expert_offset: int) -> str:
    """Return the canonical name of a parameter of a rank whose first layer and expert have these global numbers."""
    name = local_name
    for pattern, replacement in _ALIASES:
        name = pattern.sub(replacement, name)
    name = _LAYER.sub(lambda m: f"decoder.layers.{int(m[1]) + layer_offset}.", name)
    return _EXPERT.sub(lambda m: f"mlp.experts.{int(m[1]) + expert_offset}.", name)
