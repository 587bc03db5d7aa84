"""Tells which command a configuration file is for."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.load import load_config, read_values
from megatron_rl.config.schema import RlConfig, SamplingConfig, SftConfig
from megatron_rl.config.section import Section
from megatron_rl.config.selection import SelectConfig

C = TypeVar("C", bound=Section)

KINDS: dict[str, type[Section]] = {
    "train": RlConfig,
    "sft": SftConfig,
    "rollout": SamplingConfig,
    "evaluate": EvaluateConfig,
    "select": SelectConfig,
}
# The sections that tell a file for each command from the others.
_MARKS = {
    "train": "[rollout], [budget] and [train]",
    "sft": "[data] of chats, [train] and no [rollout]",
    "rollout": "[data], [rollout] and a model or teacher",
    "evaluate": "[benchmarks]",
    "select": "candidates",
}


def kind_of(values: Mapping[str, Any]) -> type[Section]:
    """Tell the kind of a file by the sections that only its kind has."""
    if "benchmarks" in values:
        return EvaluateConfig
    if "candidates" in values:
        return SelectConfig
    if not {"rollout", "reward", "budget", "algorithm"} & values.keys():
        return SftConfig
    return RlConfig if {"budget", "train", "optimizer", "algorithm"} & values.keys() else SamplingConfig


def load_for(command: str, kind: type[C], path: Path, overrides: Iterable[str] = ()) -> C:
    """Read the configuration of a command. Raise ValueError where the file is for another command."""
    overrides = list(overrides)
    try:
        return load_config(kind, path, overrides)
    except ValueError:
        values = read_values(path, overrides)
        other = kind_of(values)
        if other is not kind and _has_all_keys(other, values):
            name = next(name for name, one in KINDS.items() if one is other)
            raise ValueError(
                f"{path} is for `megatron-rl {name}`, and this is `megatron-rl {command}`; run that command, or name a "
                f"file with {_MARKS[command]}"
            ) from None
        raise


def _has_all_keys(kind: type[Section], values: Mapping[str, Any]) -> bool:
    """Tell whether a kind of file knows every key, whatever else may be wrong."""
    try:
        kind.model_validate(values, context={"without_weights": True})
    except ValidationError as error:
        return not any(problem["type"] == "extra_forbidden" for problem in error.errors())
    return True
