"""Records what the responses in a folder depend on."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config.benchmarks import BenchmarkSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.data.rows import why_no_file
from megatron_rl.rollout.provenance import (
    model_settings,
    read_settings,
    refuse_differences,
    reward_settings,
    settings_of_agents,
)

_OF_PROMPTS = {"domain", "suffix", "system", "special_tokens", "template_arguments"}


def settings_of(config: EvaluateConfig, benchmarks: Mapping[str, BenchmarkSection]) -> dict[str, Any]:
    """Return the settings that responses depend on. Not among them are how fast it goes, and how many samples are
    taken, since more can follow."""
    rollout = config.rollout
    return {
        "model": model_settings(config.model.path, config.model.dtype),
        "sampling": {
            "engine": rollout.engine,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "max_prompt_tokens": rollout.max_prompt_tokens,
            "max_response_tokens": rollout.max_response_tokens,
            "seed": config.seed,
            **settings_of_agents(rollout),
        },
        "reward": reward_settings(config.reward),
        "benchmarks": {name: benchmark_settings(section) for name, section in benchmarks.items()},
    }


def checked_settings(folder: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Return what `folder/settings.json` will hold: with `resume` benchmarks may be new, and those that are there
    already are kept. Raise ValueError when the folder holds an evaluation that may not be resumed, or files that no
    evaluation wrote. Changes nothing."""
    path = folder / "settings.json"
    if not path.exists():
        for name in settings["benchmarks"]:
            if (folder / f"{name}.jsonl").exists():
                raise ValueError(f"{folder}/{name}.jsonl was written by no evaluation; name another --output")
        return settings
    if not resume:
        raise ValueError(f"{folder} holds an evaluation; add --resume to go on with it, or name another --output")
    before = read_settings(path, ["benchmarks"])
    known = before["benchmarks"]
    settings = settings | {"benchmarks": known | settings["benchmarks"]}
    compared = settings | {"benchmarks": {name: settings["benchmarks"][name] for name in known}}
    refuse_differences(f"{folder} holds an evaluation", before, compared)
    return settings


def benchmark_settings(section: BenchmarkSection) -> dict[str, Any]:
    """Return what the responses to a benchmark depend on. Raise ValueError when its file does not exist."""
    if not section.path.is_file():
        raise ValueError(why_no_file(section.path))
    return {
        "sha256": hashlib.sha256(section.path.read_bytes()).hexdigest(),
        "reward": section.reward,
        "prompts": section.prompts,
        # Named only where they are set, so that a folder older than these keys can be resumed.
        **section.model_dump(include=_OF_PROMPTS, exclude_defaults=True),
    }
