"""Defines the section `lora`: small trained factors beside frozen weights, and what does not go with them."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megatron_rl.config.layout import Layout
from megatron_rl.config.model import ModelSection
from megatron_rl.config.section import Section
from megatron_rl.families import Architecture

# Parts of a layer whose projections get adapters, as model.recompute_modules names them; experts are the routed ones.
LoraTarget = Literal["attention", "mlp", "shared_experts", "experts"]
TARGETS: tuple[LoraTarget, ...] = ("attention", "mlp", "shared_experts", "experts")


class LoraSection(Section):
    rank: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=32,
        description="Rank of every adapter: the inner dimension of its two factors. Grouped experts in bfloat16 need "
        "a multiple of 8.",
    )
    alpha: float = Field(
        default=16.0,
        gt=0,
        description="Scaling of the adapters: the product of the two factors is multiplied by alpha / sqrt(rank) "
        "(rsLoRA).",
    )
    targets: tuple[LoraTarget, ...] = Field(
        default=TARGETS,
        min_length=1,
        description='Modules that get adapters, of those that the model has. "attention": its two projections '
        '(queries, keys and values are one). "mlp": the MLP of dense layers (gate and up are one). "shared_experts": '
        'the shared experts. "experts": the routed experts, an adapter for each. Router, norms, embedding and head '
        "stay frozen.",
    )

    @field_validator("targets")
    @classmethod
    def _in_order(cls, targets: tuple[LoraTarget, ...]) -> tuple[LoraTarget, ...]:
        return tuple(target for target in TARGETS if target in targets)

    @property
    def scale(self) -> float:
        """Give the number by which the product of the factors is multiplied."""
        return self.alpha / math.sqrt(self.rank)

    def targets_of_layer(self, architecture: Architecture, layer: int) -> set[LoraTarget]:
        """Tell which of the targets a layer has."""
        present: set[LoraTarget] = {"attention"}
        if architecture.is_moe_layer(layer):
            present |= {"experts", "shared_experts"} if architecture.shared_intermediate_size else {"experts"}
        else:
            present.add("mlp")
        return present & set(self.targets)

    def targets_of(self, architecture: Architecture) -> list[LoraTarget]:
        """List the targets that any layer has, in their order."""
        layers = range(architecture.num_hidden_layers)
        present = {target for layer in layers for target in self.targets_of_layer(architecture, layer)}
        return [target for target in self.targets if target in present]

    def layer_parameters(self, architecture: Architecture, layout: Layout, layer: int) -> tuple[int, int]:
        """Count what one rank has of a layer's adapters: outside of routed experts, and in them.

        Of a weight [out, in], cut into n parts, it has rank (in + out / n) where its rows are cut, else
        rank (in / n + out).
        """
        h, t, e = architecture.hidden_size, layout.tensor, layout.expert_tensor
        q = architecture.num_attention_heads * architecture.head_dim
        k = architecture.num_key_value_heads * architecture.head_dim
        moe = architecture.moe_intermediate_size // e
        experts = architecture.num_experts // layout.expert
        numbers = {
            "attention": h + (q + 2 * k) // t + q // t + h,
            "mlp": 2 * h + 3 * architecture.intermediate_size // t,
            "shared_experts": 2 * h + 3 * architecture.shared_intermediate_size // t,
            "experts": experts * (2 * h + 3 * moe),
        }
        found = {target: self.rank * numbers[target] for target in self.targets_of_layer(architecture, layer)}
        routed = found.pop("experts", 0)
        return sum(found.values()), routed

    def num_parameters(self, architecture: Architecture) -> int:
        """Count the parameters of all adapters of a model."""
        alone = Layout(world_size=1)
        return sum(
            sum(self.layer_parameters(architecture, alone, layer)) for layer in range(architecture.num_hidden_layers)
        )

    def num_active_parameters(self, architecture: Architecture) -> int:
        """Count the parameters of the adapters that a token passes through."""
        alone, active = Layout(world_size=1), 0.0
        for layer in range(architecture.num_hidden_layers):
            dense, routed = self.layer_parameters(architecture, alone, layer)
            share = architecture.num_experts_per_tok / architecture.num_experts if routed else 0.0
            active += dense + routed * share
        return round(active)


def lora_problems(lora: LoraSection, model: ModelSection, architecture: Architecture, layout: Layout) -> Iterator[str]:
    """Tell what adapters cannot do with this model and these settings, each with its remedy."""
    if model.layers == "transformer_engine" or model.fp8 != "none":
        yield "[lora] works with local layers only; set model.layers = 'local' and model.fp8 = 'none'"
    if model.expert_weight_gradient != "torch":
        yield (
            f"model.expert_weight_gradient = '{model.expert_weight_gradient}' is about gradients that frozen experts "
            "do not have; leave it out, or take [lora] out"
        )
    if not 0 < layout.pipeline * layout.virtual_pipeline <= architecture.num_hidden_layers:
        return  # which is refused by itself
    first = 0
    for stage, size in enumerate(layout.layers_per_stage(architecture.num_hidden_layers)):
        if not any(lora.targets_of_layer(architecture, layer) for layer in range(first, first + size)):
            yield (
                f"lora.targets {list(lora.targets)} names nothing that layers {first} to {first + size - 1} (pipeline "
                f"stage {stage}) have, so nothing would be trained there; add 'attention'"
            )
        first += size
