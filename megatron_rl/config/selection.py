"""Defines the configuration of `megatron-rl select`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_rl.config.model import ServingSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.schema import RolloutPhase
from megatron_rl.config.section import Positive


class SelectionRollout(RolloutSection):
    prompts_per_step: Positive = Field(default=1, description="Not used: `prompts` sets the number of prompts.")


def _folder_or_list(candidates: object) -> object:
    listed = candidates if isinstance(candidates, list | tuple) else [candidates]
    if not all(isinstance(one, str | Path) for one in listed):
        raise ValueError("must be a folder of model directories, or a list of model directories")
    return candidates


class SelectConfig(RolloutPhase):
    """Configures `megatron-rl select`, which chooses one of several model directories by the token entropy of its
    policy."""

    model: ServingSection = ServingSection()
    rollout: SelectionRollout
    candidates: Annotated[Path | tuple[Path, ...], BeforeValidator(_folder_or_list)] = Field(
        description="Candidate models: a folder whose subdirectories are Hugging Face directories, or a list of such "
        "directories."
    )
    prompts: Annotated[int, Field(ge=2)] = Field(
        default=128,
        description="Number of prompts that every candidate answers: the first ones in the run's order of data.train, "
        "the same for all.",
    )
    band: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = Field(
        default=(0.3, 0.5),
        description="Lowest and highest token entropy of an acceptable candidate, in nats per token. The default is "
        "that of the C3PO paper.",
    )
    prefer: Literal["lowest", "highest", "accuracy", "validation_loss"] = Field(
        default="lowest",
        description='Which candidate within the band is chosen. "lowest", "highest": by token entropy. "accuracy": '
        'the highest accuracy. "validation_loss": the lowest validation_loss in its sft.json.',
    )
    require_band: bool = Field(
        default=False,
        description="Chooses none when no candidate is within the band. Otherwise the nearest to the band is chosen.",
    )

    @model_validator(mode="after")
    def _check(self) -> "SelectConfig":
        low, high = self.band
        if low >= high:
            raise ValueError(f"band must be [lowest, highest] with the first below the second, got [{low:g}, {high:g}]")
        if self.rollout.temperature != 1.0:
            raise ValueError(
                f"rollout.temperature must be 1, got {self.rollout.temperature:g}: the entropy is that of the policy "
                "itself, which only its own samples show; leave it out"
            )
        if self.rollout.urls:
            raise ValueError("servers are started with each candidate in turn; leave rollout.urls empty")
        return self
