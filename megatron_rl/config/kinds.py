"""Which command a configuration file is for, where that is not said."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.schema import RlConfig, SamplingConfig, SftConfig
from megatron_rl.config.section import Section
from megatron_rl.config.selection import SelectConfig


def kind_of(values: Mapping[str, Any]) -> type[Section]:
    """By the sections that only its kind has."""
    if "benchmarks" in values:
        return EvaluateConfig
    if "candidates" in values:
        return SelectConfig
    if "rollout" not in values:
        return SftConfig
    return RlConfig if {"budget", "train", "optimizer", "algorithm"} & values.keys() else SamplingConfig
