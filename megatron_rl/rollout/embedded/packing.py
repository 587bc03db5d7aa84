"""Raw tensors under Hugging Face names -> the packed weights that `model.py` multiplies with, and back.

Shapes: H hidden, V vocabulary, E experts, W width of an MLP. `places` is the one description of where a raw tensor
lives in the packed weights: packing copies into those views, reading back looks at them.
"""

import torch
from torch import Tensor

from megatron_rl.families import Architecture
from megatron_rl.rollout.embedded.weights import (
    READABLE_DTYPES,
    LayerWeights,
    Mlp,
    ModelWeights,
    expected_tensors,
    output_weight,
    some,
)


class Packing:
    """A model's packed weights while they are filled, in any order; one copy of the model and one tensor of memory."""

    def __init__(self, config: Architecture, dtype: torch.dtype) -> None:
        self._config = config
        self._expected = expected_tensors(config)
        self._missing = set(self._expected)
        self._weights = _blank(config, dtype)
        self._places = places(self._weights, config)

    def put(self, name: str, tensor: Tensor) -> None:
        """`admit` and `copy`."""
        self.admit(name, tensor)
        self.copy(name, tensor)

    def admit(self, name: str, tensor: Tensor) -> None:
        """ValueError when a tensor is unknown, came before, or is not what it must be; else it counts as having come,
        and `copy` must follow."""
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
        """Lay it out in its place, which takes far longer than `admit`."""
        if name in self._places:
            self._places[name].copy_(tensor)
        if name == output_weight(self._config):
            self._weights.head.copy_(_head(tensor, self._config.norm_head))

    def finish(self) -> ModelWeights:
        """The weights, once every tensor has come. ValueError names those that have not."""
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
    """Views of the packed weights in the shapes of the raw tensors, by name.

    The output weight is absent when `norm_head` is set: its norms are divided out and its raw values lost.
    """
    found = {"model.word_embeddings.weight": weights.embedding, "model.norm.weight": weights.final_norm}
    if not config.tie_word_embeddings and not config.norm_head:
        found["lm_head.weight"] = weights.head.t()

    def add_mlp(prefix: str, mlp: Mlp) -> None:
        width = mlp.down.shape[0]
        found[f"{prefix}.gate_proj.weight"] = mlp.gate_up[:, :width].t()
        found[f"{prefix}.up_proj.weight"] = mlp.gate_up[:, width:].t()
        found[f"{prefix}.down_proj.weight"] = mlp.down.t()

    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        found[f"{prefix}.input_layernorm.weight"] = layer.input_norm
        found[f"{prefix}.attention.query_key_value.weight"] = layer.qkv.t()
        found[f"{prefix}.attention.dense.weight"] = layer.dense.t()
        found[f"{prefix}.post_attention_layernorm.weight"] = layer.mlp_norm
        if layer.router is not None:
            found[f"{prefix}.mlp.gate.weight"] = layer.router[:, : config.num_experts].t()
        if layer.mlp is not None:
            add_mlp(f"{prefix}.mlp.shared_experts" if config.is_moe_layer(index) else f"{prefix}.mlp", layer.mlp)
        for expert, mlp in enumerate(layer.experts):
            add_mlp(f"{prefix}.mlp.experts.{expert}", mlp)
    return found


def _blank(config: Architecture, dtype: torch.dtype) -> ModelWeights:
    """Memory for the packed weights; what no tensor fills, the router's spare columns, is zero."""
    h, d = config.hidden_size, config.head_dim
    nq, nkv = config.num_attention_heads, config.num_key_value_heads

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def mlp(width: int) -> Mlp:
        return Mlp(gate_up=empty(h, 2 * width), down=empty(width, h))

    def layer(is_moe: bool) -> LayerWeights:
        everyones = config.shared_intermediate_size if is_moe else config.intermediate_size
        # A multiple of 16: in a product of 5 to 11 columns some processors' kernels give a row bits that depend on
        # its place.
        columns = -(-config.num_experts // 16) * 16
        return LayerWeights(
            input_norm=empty(h),
            qkv=empty(h, (nq + 2 * nkv) * d),
            dense=empty(nq * d, h),
            mlp_norm=empty(h),
            mlp=None if is_moe and not config.num_shared_experts else mlp(everyones),
            router=torch.zeros(h, columns) if is_moe else None,
            experts=tuple(mlp(config.moe_intermediate_size) for _ in range(config.num_experts if is_moe else 0)),
        )

    return ModelWeights(
        embedding=empty(config.vocab_size, h),
        layers=tuple(layer(config.is_moe_layer(index)) for index in range(config.num_hidden_layers)),
        final_norm=empty(h),
        head=torch.empty(h, config.vocab_size),
    )


def _head(raw: Tensor, norm_head: bool) -> Tensor:
    """Raw output weight [V, H] -> [H, V] in fp32; norm_head divides each hidden column by its norm over V."""
    weight = raw.to(torch.float32, copy=norm_head)
    if norm_head:
        weight /= torch.linalg.vector_norm(weight, dim=0, keepdim=True) + 1e-7
    return weight.t()
