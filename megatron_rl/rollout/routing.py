"""Routed experts as SGLang answers them: text to array."""

import base64
import binascii
from dataclasses import dataclass

import numpy as np

from megatron_rl.config.bailing import BailingConfig

MAX_EXPERTS = 256  # an expert's number is kept in a byte


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedShape:
    """What a model's routed experts look like: [positions, num_layers, topk] numbers below num_experts. The first
    num_dense_layers have no experts; there the numbers mean nothing."""

    num_layers: int
    num_dense_layers: int
    topk: int
    num_experts: int


def routed_shape(bailing: BailingConfig) -> RoutedShape:
    """ValueError when the model has more experts than can be replayed."""
    if bailing.num_experts > MAX_EXPERTS:
        raise ValueError(
            f"rollout.router_replay works for up to {MAX_EXPERTS} experts, the model has {bailing.num_experts}; set it "
            "to false"
        )
    return RoutedShape(
        num_layers=bailing.num_hidden_layers,
        num_dense_layers=min(bailing.first_k_dense_replace, bailing.num_hidden_layers),
        topk=bailing.num_experts_per_tok,
        num_experts=bailing.num_experts,
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
    chosen = experts[:, shape.num_dense_layers :]
    if chosen.size and (chosen.min() < 0 or chosen.max() >= shape.num_experts):
        raise ValueError(
            f"routed_experts must be in [0, {shape.num_experts}), got {chosen.min()} to {chosen.max()}: the server "
            "runs another model"
        )
    ordered = np.sort(chosen, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        position, layer = np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any(axis=-1))[0]
        raise ValueError(
            f"routed_experts names an expert twice at position {position} in layer {layer + shape.num_dense_layers} "
            f"({chosen[position, layer].tolist()}): the server does not record this model's routing"
        )
    return experts.astype(np.uint8)
