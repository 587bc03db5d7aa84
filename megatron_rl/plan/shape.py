"""This module reads the shape of a configuration's model, before the model is there."""

from pathlib import Path

from megatron_rl.config.distillation import DistillationSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.model import ServedModelSection, ServingSection
from megatron_rl.config.schema import RolloutPhase, RunConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.families import Architecture, load_architecture, read_architecture


def shape_of(config: RunConfig | RolloutPhase | EvaluateConfig) -> tuple[Architecture, Path | None]:
    """Return the shape of model.path or the first candidate. While these have no config.json, return that of
    model.shape and its path as the second. ValueError when there is none of them."""
    return _shape(_models(config), _served(config).shape, "model")


def teacher_shape(section: DistillationSection) -> Architecture:
    """Return the shape of a teacher policy, found as by `shape_of`."""
    return _shape([section.path], section.shape, "distillation")[0]


def _shape(here: list[Path], shape: Path | None, name: str) -> tuple[Architecture, Path | None]:
    """Return the shape of the first of these models that has a config.json. While none has, return that of `shape` and
    its path as the second. name: that of the section."""
    found = [path for path in here if (path / "config.json").is_file()]
    if found or shape is None:
        return load_architecture((found or here)[0]), None
    path = shape / "config.json" if shape.is_dir() else shape
    if not path.is_file():
        raise ValueError(f"{name}.shape {shape} is neither a config.json nor a folder that has one")
    return read_architecture(path), path


def _models(config: RunConfig | RolloutPhase | EvaluateConfig) -> list[Path]:
    """List where this configuration's model may lie; never empty."""
    if isinstance(config, SelectConfig):
        candidates = config.candidates
        if isinstance(candidates, Path):
            return [*sorted(candidates.iterdir()), candidates] if candidates.is_dir() else [candidates]
        if not candidates:
            raise ValueError("candidates names no directory")
        return list(candidates)
    model = _served(config)
    assert isinstance(model, ServedModelSection)
    return [model.path]


def _served(config: RunConfig | RolloutPhase | EvaluateConfig) -> ServingSection:
    return config.serving if isinstance(config, RolloutPhase) else config.model
