"""Turns raw tensors under Hugging Face names into the packed weights that `model.py` multiplies with, and back.

Shapes: H hidden, V vocabulary, E experts, W width of an MLP. `places` is the one description of where a raw tensor
lives in the packed weights: packing copies into those views, reading back looks at them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_rl.families import Architecture, family_of, tensor_shapes
from megatron_rl.families.tensors import TensorNames
from megatron_rl.rollout.embedded.weights import (
    READABLE_DTYPES,
    LayerWeights,
    Mlp,
    ModelWeights,
    some,
)


class Packing:
    """Holds a model's packed weights while they are filled, in any order. It needs memory for one copy of the model and
    one tensor."""

    def __init__(self, config: Architecture, dtype: torch.dtype) -> None:
        self._config = config
        self._expected = tensor_shapes(config)
        names = family_of(config).tensors
        self._output_weight = names.embedding if config.tie_word_embeddings else names.head
        self._missing = set(self._expected)
        self._weights = _blank(config, dtype)
        self._places = places(self._weights, config)

    def put(self, name: str, tensor: Tensor) -> None:
        """Do `admit` and `copy`."""
        self.admit(name, tensor)
        self.copy(name, tensor)

    def admit(self, name: str, tensor: Tensor) -> None:
        """Check a tensor and count it as having come; `copy` must follow. Raise ValueError when it is unknown, came
        before, or is not what it must be."""
        if name not in self._expected:
            raise ValueError(f"tensor {name} is unknown to this model")
        if name not in self._missing:
            raise ValueError(f"tensor {name} came more than once")
        if tuple(tensor.shape) != self._expected[name]:
            raise ValueError(f"tensor {name} must have shape {self._expected[name]}, got {tuple(tensor.shape)}")
        if tensor.dtype not in READABLE_DTYPES:
            raise ValueError(f"tensor {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        # The sum is ten times faster to take, and tells in all but absurd cases.
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {name} holds values that are not finite")
        self._missing.discard(name)

    def copy(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor to its place, which takes far longer than `admit`."""
        if name in self._places:
            self._places[name].copy_(tensor)
        if name == self._output_weight:
            self._weights.head.copy_(_head(tensor, self._config.norm_head))

    def finish(self) -> ModelWeights:
        """Return the weights, once every tensor has come. Raise ValueError, which names those that have not."""
        if self._missing:
            raise ValueError(
                f"{len(self._missing)} of {len(self._expected)} tensors are missing: {some(sorted(self._missing))}"
            )
        return self._weights


def pack(tensors: dict[str, Tensor], config: Architecture, dtype: torch.dtype) -> ModelWeights:
    """Copy the tensors into matrices laid out for `model.py`; nothing of the result aliases a mapped file."""
    packing = Packing(config, dtype)
    for name, tensor in tensors.items():
        packing.put(name, tensor)
    return packing.finish()


def places(weights: ModelWeights, config: Architecture) -> dict[str, Tensor]:
    """Return views of the packed weights in the shapes of the raw tensors, by name.

    The output weight is absent when `norm_head` is set: its norms are divided out and its raw values lost.
    """
    names = family_of(config).tensors
    found = {names.embedding: weights.embedding, names.final_norm: weights.final_norm}
    if not config.tie_word_embeddings and not config.norm_head:
        found[names.head] = weights.head.t()

    def add_mlp(prefix: str, mlp: Mlp) -> None:
        parts = mlp.gate_up.chunk(len(names.gate_up), dim=1)
        found.update((prefix + name, part.t()) for name, part in zip(names.gate_up, parts, strict=True))
        found[prefix + names.down] = mlp.down.t()

    for index, layer in enumerate(weights.layers):
        prefix = names.layer.format(index)
        found[prefix + names.input_norm] = layer.input_norm
        found |= {prefix + name: view for name, view in _attention_places(layer, config, names)}
        found[prefix + names.output] = layer.dense.t()
        found[prefix + names.mlp_norm] = layer.mlp_norm
        if layer.router is not None:
            found[prefix + names.router] = layer.router[:, : config.num_experts].t()
        if layer.expert_bias is not None:
            found[prefix + names.expert_bias] = layer.expert_bias
        if layer.mlp is not None:
            add_mlp(prefix + (names.shared if config.is_moe_layer(index) else names.mlp), layer.mlp)
        for expert, mlp in enumerate(layer.experts):
            add_mlp(prefix + names.experts.format(expert), mlp)
    return found


def _attention_places(layer: LayerWeights, config: Architecture, names: TensorNames) -> Iterator[tuple[str, Tensor]]:
    """Yield the places of queries, keys and values, in one tensor or in three, as the family has them."""
    rows = names.qkv_rows(config)
    for name, weight in zip(names.qkv, layer.qkv.t().split(rows), strict=True):
        yield f"{name}.weight", weight
    if layer.qkv_bias is not None:
        for name, bias in zip(names.qkv, layer.qkv_bias.split(rows), strict=True):
            yield f"{name}.bias", bias
    if layer.qk_norms is not None:
        yield from zip(names.qk_norms, layer.qk_norms, strict=True)


def _blank(config: Architecture, dtype: torch.dtype) -> ModelWeights:
    """Allocate the packed weights. What no tensor fills, the router's spare columns, is zero."""
    h, d = config.hidden_size, config.head_dim
    nq, nkv = config.num_attention_heads, config.num_key_value_heads
    of_queries, of_keys = config.qk_norm_sizes

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def mlp(width: int) -> Mlp:
        return Mlp(gate_up=empty(h, 2 * width), down=empty(width, h))

    def layer(is_moe: bool) -> LayerWeights:
        everyones = config.shared_intermediate_size if is_moe else config.intermediate_size
        # A multiple of 16, since in products of 5 to 11 columns some processors' kernels give a row bits that depend
        # on its place. Kernels of the sigmoid do so too for a rest of columns, so there it is a multiple of 32.
        multiple = 32 if config.score_function == "sigmoid" else 16
        columns = -(-config.num_experts // multiple) * multiple
        return LayerWeights(
            input_norm=empty(h),
            qkv=empty(h, (nq + 2 * nkv) * d),
            qkv_bias=empty((nq + 2 * nkv) * d) if config.qkv_bias else None,
            qk_norms=(empty(of_queries), empty(of_keys)) if config.qk_norm else None,
            dense=empty(nq * d, h),
            mlp_norm=empty(h),
            mlp=mlp(everyones) if everyones else None,
            router=torch.zeros(h, columns) if is_moe else None,
            expert_bias=torch.empty(config.num_experts) if is_moe and config.expert_bias else None,
            experts=tuple(mlp(config.moe_intermediate_size) for _ in range(config.num_experts if is_moe else 0)),
        )

    return ModelWeights(
        embedding=empty(config.vocab_size, h),
        layers=tuple(layer(config.is_moe_layer(index)) for index in range(config.num_hidden_layers)),
        final_norm=empty(h),
        head=torch.empty(h, config.vocab_size),
    )


def _head(raw: Tensor, norm_head: bool) -> Tensor:
    """Turn the raw output weight [V, H] into [H, V] in fp32; norm_head divides each hidden column by its norm over
    V."""
    weight = raw.to(torch.float32, copy=norm_head)
    if norm_head:
        weight /= torch.linalg.vector_norm(weight, dim=0, keepdim=True) + 1e-7
    return weight.t()
