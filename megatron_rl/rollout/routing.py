"""Routed experts as SGLang answers them: text to array."""

import base64
import binascii
from dataclasses import dataclass

import numpy as np

from megatron_rl.families import Architecture

MAX_EXPERTS = 256  # an expert's number is kept in a byte


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedShape:
    """What a model's routed experts look like: [positions, num_layers, topk] numbers below num_experts. moe_layers:
    those that have experts; in others the numbers mean nothing."""

    num_layers: int
    moe_layers: tuple[int, ...]
    topk: int
    num_experts: int


def routed_shape(architecture: Architecture) -> RoutedShape:
    """ValueError when the model has no experts, or more than can be replayed."""
    if not architecture.num_experts:
        raise ValueError("rollout.router_replay is for models with experts, and this one has none; set it to false")
    if architecture.num_experts > MAX_EXPERTS:
        raise ValueError(
            f"rollout.router_replay works for up to {MAX_EXPERTS} experts, the model has "
            f"{architecture.num_experts}; set it to false"
        )
    return RoutedShape(
        num_layers=architecture.num_hidden_layers,
        moe_layers=tuple(filter(architecture.is_moe_layer, range(architecture.num_hidden_layers))),
        topk=architecture.num_experts_per_tok,
        num_experts=architecture.num_experts,
    )


def decode_routed_experts(text: str, num_positions: int, shape: RoutedShape) -> np.ndarray:
    """uint8 [num_positions, layers, topk] from base64 of little-endian int32. ValueError for what cannot be that."""
    try:
        flat = np.frombuffer(base64.b64decode(text, validate=True), "<i4")
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"routed_experts must be base64 of int32, got {str(text)[:40]!r} ({error})") from None
    expected = (num_positions, shape.num_layers, shape.topk)
    if flat.size != np.prod(expected):
        raise ValueError(
            f"routed_experts holds {flat.size} numbers, expected [prompt + output - 1, layers, topk] = {expected}"
        )
    experts = flat.reshape(expected)
    chosen = experts[:, list(shape.moe_layers)]
    if chosen.size and (chosen.min() < 0 or chosen.max() >= shape.num_experts):
        raise ValueError(
            f"routed_experts must be in [0, {shape.num_experts}), got {chosen.min()} to {chosen.max()}: the server "
            "runs another model"
        )
    ordered = np.sort(chosen, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        position, layer = np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any(axis=-1))[0]
        raise ValueError(
            f"routed_experts names an expert twice at position {position} in layer {shape.moe_layers[layer]} "
            f"({chosen[position, layer].tolist()}): the server does not record this model's routing"
        )
    return experts.astype(np.uint8)
