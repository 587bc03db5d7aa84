"""Defines the section `tracking`: which programs draw the numbers of a run, besides the run's own report."""

from typing import Literal

from pydantic import Field, field_validator

from megatron_rl.config.section import Section

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class TrackingSection(Section):
    """Names programs to which a run tells every number of its metrics.jsonl too. A failure of one costs a warning."""

    to: tuple[TrackerName, ...] = Field(
        default=("tensorboard",),
        description='Experiment trackers that get every number of metrics.jsonl. "tensorboard": writes to '
        'run_dir/tensorboard. "wandb", "trackio": extras of this package. Empty: none.',
    )
    project: str = Field(default="megatron_rl", min_length=1, description="Name of the project, for wandb and trackio.")
    name: str = Field(default="", description='Name of the run, for wandb and trackio. "": the name of run_dir.')
    group: str = Field(
        default="",
        description='Name of the group of runs, such as seeds of one experiment, for wandb and trackio. "": no group.',
    )
    tags: tuple[str, ...] = Field(default=(), description="Tags of the run, for wandb and trackio.")

    @field_validator("to")
    @classmethod
    def _check_twice(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"names {name} more than once; each tracker once")
        return names
