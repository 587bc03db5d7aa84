"""Defines the section `tracking`: which programs draw the numbers of a run, besides the run's own report."""

from typing import Literal

from pydantic import Field, field_validator

from megatron_rl.config.section import Section

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class TrackingSection(Section):
    """Names programs to which a run tells every number of its metrics.jsonl too. A failure of one costs a warning."""

    to: tuple[TrackerName, ...] = Field(
        default=("tensorboard",),
        description="tensorboard writes into run_dir/tensorboard; wandb and trackio are extras of the package",
    )
    project: str = Field(default="megatron_rl", min_length=1, description="of wandb and trackio: what it is part of")
    name: str = Field(default="", description="of wandb and trackio: what the run is called; default: as run_dir")
    group: str = Field(default="", description="of wandb and trackio: runs that belong together, such as seeds")
    tags: tuple[str, ...] = Field(default=(), description="of wandb and trackio: words by which runs are found")

    @field_validator("to")
    @classmethod
    def _check_twice(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"names {name} more than once; each tracker once")
        return names
