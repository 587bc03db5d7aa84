"""Defines the weights as `model.py` multiplies with them, and the raw tensors that they are made of.

Shapes: H hidden, V vocabulary, d head_dim, E experts, I expert width, W width of an MLP that sees every token (the
shared expert of a mixture-of-experts layer, or the MLP of a dense one).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

READABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Holds one transformer layer; matrices are stored [in, out], ready for `x @ w`."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [H, (nq + 2 nkv) d]: all queries, all keys, all values
    qkv_bias: Tensor | None  # [(nq + 2 nkv) d]
    qk_norms: tuple[Tensor, Tensor] | None  # of queries and of keys: [d] each, or [nq d] and [nkv d]
    dense: Tensor  # [nq d, H]
    mlp_norm: Tensor  # [H]
    mlp: "Mlp | None"  # over every token; None in a mixture-of-experts layer without shared experts
    router: Tensor | None  # [H, at least E] fp32, zero columns behind E; None in a dense layer
    expert_bias: Tensor | None  # [E] fp32, added to scores for the choice alone
    experts: tuple["Mlp", ...]  # E of width I; none in a dense layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    gate_up: Tensor  # [H, 2 W]: the gate columns, then the up columns
    down: Tensor  # [W, H]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    embedding: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [H]
    head: Tensor  # [H, V] fp32, already normalised when norm_head is set


def some(names: list[str]) -> str:
    """Name at most three of the names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
