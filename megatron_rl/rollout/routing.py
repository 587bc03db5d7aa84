"""Decodes the routed experts of SGLang's answers into arrays, and computes how many bytes of them a step has."""

import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pybase64

from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.config.schema import RlConfig
from megatron_rl.families import Architecture

MAX_EXPERTS = 256  # an expert's number is kept in a byte
# The most bytes of routed experts that one step may send. Rank 0 reads 0.13 GB of them per second of CPU time
# (docs/host.md), so this many take two thirds of a rollout phase of the paper's run.
MOST_WIRE_BYTES = 25e9


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedShape:
    """Describes a model's routed experts: [positions, num_layers, topk] numbers below num_experts. moe_layers: those
    that have experts; in others the numbers mean nothing."""

    num_layers: int
    moe_layers: tuple[int, ...]
    topk: int
    num_experts: int

    def of_moe_layers(self, experts: np.ndarray) -> np.ndarray:
        """Return experts[:, moe_layers], without a copy where these follow each other."""
        first, last = self.moe_layers[0], self.moe_layers[-1]
        follow = len(self.moe_layers) == last - first + 1
        return experts[:, first : last + 1] if follow else experts[:, list(self.moe_layers)]

    @property
    def kept_bytes(self) -> int:
        """The bytes of one position, as rank 0 keeps it: a byte for each expert."""
        return self.num_layers * self.topk

    @property
    def wire_bytes(self) -> float:
        """The bytes of one position, as a server sends it: int32 in base64."""
        return self.kept_bytes * 4 * 4 / 3


def routed_shape(architecture: Architecture) -> RoutedShape:
    """Return the shape of a model's routed experts. Raise ValueError when the model has no experts, or more than can be
    replayed."""
    if not architecture.num_moe_layers:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRouting:
    """Measures the routed experts of a step that go through rank 0. tokens: of responses; prompts are not counted.
    wire_bytes: as servers send them. kept_bytes: in the memory of rank 0, and in the journal of the step."""

    tokens: int
    wire_bytes: int
    kept_bytes: int

    def problems(self, shape: RoutedShape) -> Iterator[str]:
        """Yield a message when it is more than rank 0 can carry."""
        if self.wire_bytes > MOST_WIRE_BYTES:
            most = int(self.tokens * MOST_WIRE_BYTES / self.wire_bytes)
            yield (
                f"rollout.router_replay sends {self.wire_bytes / 1e9:.1f} GB through rank 0 in every step, for "
                f"{self.tokens:,} tokens x {shape.num_layers} layers x {shape.topk} experts, and it carries "
                f"{MOST_WIRE_BYTES / 1e9:g} GB; set rollout.router_replay = false, or sample at most {most:,} tokens "
                "in a step (budget.tokens, or without a budget rollout.prompts_per_step and max_response_tokens)"
            )


def step_routing(config: RlConfig, shape: RoutedShape, world_size: int) -> StepRouting:
    """Measure the routed experts for the tokens of the budget; for an algorithm without one, for those of the longest
    responses."""
    rollout = config.rollout
    tokens = rollout.prompts_per_step * rollout.samples_per_prompt * rollout.max_response_tokens
    if chosen_algorithm(config.algorithm).uses_budget:
        tokens = sum(config.phase_budgets(world_size))
    return StepRouting(tokens=tokens, wire_bytes=round(tokens * shape.wire_bytes), kept_bytes=tokens * shape.kept_bytes)


def decode_routed_experts(text: str, num_positions: int, shape: RoutedShape) -> np.ndarray:
    """Decode uint8 [num_positions, layers, topk] from base64 of little-endian int32. Raise ValueError for what cannot
    be that."""
    try:
        flat = np.frombuffer(pybase64.b64decode(text, validate=True), "<i4")
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"routed_experts must be base64 of int32, got {str(text)[:40]!r} ({error})") from None
    expected = (num_positions, shape.num_layers, shape.topk)
    if flat.size != np.prod(expected):
        raise ValueError(
            f"routed_experts holds {flat.size} numbers, expected [prompt + output - 1, layers, topk] = {expected}"
        )
    experts = flat.reshape(expected)
    chosen = shape.of_moe_layers(experts)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= shape.num_experts):
        raise ValueError(
            f"routed_experts must be in [0, {shape.num_experts}), got {chosen.min()} to {chosen.max()}: the server "
            "runs another model"
        )
    found = experts.astype(np.uint8)
    repeats = _repeats(shape.of_moe_layers(found))
    if repeats.any():
        position, layer = np.argwhere(repeats)[0]
        raise ValueError(
            f"routed_experts names an expert twice at position {position} in layer {shape.moe_layers[layer]} "
            f"({chosen[position, layer].tolist()}): the server does not record this model's routing"
        )
    return found


def _repeats(chosen: np.ndarray) -> np.ndarray:
    """Find where an expert is named twice, bool [positions, layers], in uint8 [positions, layers, topk]."""
    # A comparison of each two columns of bytes takes a seventh of the time of sorting.
    columns = np.ascontiguousarray(chosen.reshape(-1, chosen.shape[-1]).T)
    found = np.zeros(columns.shape[1], bool)
    for one, other in combinations(columns, 2):
        found |= one == other
    return found.reshape(chosen.shape[:-1])
