"""What the responses in a folder depend on, so that `--resume` never mixes those of two models or two settings."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_rl.config.evaluation import BenchmarkSection, EvaluateConfig

_NUM_TOLD = 3


def settings_of(config: EvaluateConfig, benchmarks: Mapping[str, BenchmarkSection]) -> dict[str, Any]:
    """Not among them: how fast it goes, and how many samples are taken, since more can follow."""
    rollout = config.rollout
    return {
        "model": {
            "path": str(config.model.path.resolve()),
            "dtype": config.model.dtype,
            "files": {file.name: _state(file) for file in sorted(config.model.path.iterdir()) if file.is_file()},
        },
        "sampling": {
            "engine": rollout.engine,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "max_prompt_tokens": rollout.max_prompt_tokens,
            "max_response_tokens": rollout.max_response_tokens,
            "seed": config.seed,
        },
        "reward": config.reward.model_dump(
            mode="json", exclude={"workers", "max_error_share", "overlong_buffer_tokens"}
        ),
        "benchmarks": {name: _benchmark(section) for name, section in benchmarks.items()},
    }


def claim_folder(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Write `folder/settings.json`. ValueError when the folder holds an evaluation that may not be gone on with, or
    files that no evaluation wrote.

    With `resume` benchmarks may be new, and those that are there already are kept.
    """
    path = folder / "settings.json"
    if path.exists():
        if not resume:
            raise ValueError(f"{folder} holds an evaluation; add --resume to go on with it, or name another --output")
        before = _read(path)
        known = before["benchmarks"]
        settings = settings | {"benchmarks": known | settings["benchmarks"]}
        _refuse_differences(folder, before, settings | {"benchmarks": {n: settings["benchmarks"][n] for n in known}})
    else:
        for name in settings["benchmarks"]:
            if (folder / f"{name}.jsonl").exists():
                raise ValueError(f"{folder}/{name}.jsonl was written by no evaluation; name another --output")
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=1))
    os.replace(partial, path)


def _refuse_differences(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    then, here = dict(_leaves(before)), dict(_leaves(now))
    changed = [key for key in then | here if then.get(key) != here.get(key)]
    if changed:
        told = "; ".join(f"{key} was {then.get(key)!r}, now {here.get(key)!r}" for key in changed[:_NUM_TOLD])
        more = f"; and {len(changed) - _NUM_TOLD} more" if len(changed) > _NUM_TOLD else ""
        raise ValueError(
            f"{folder} holds an evaluation with other settings: {told}{more}; set them as they were, or name another "
            "--output"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if found["benchmarks"] is not None else {}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not what an evaluation writes; name another --output") from None


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _state(file: Path) -> str:
    """Cheap, and another one whenever the file was written again: hashing the weights would take minutes."""
    found = file.stat()
    return f"{found.st_size} bytes of {datetime.fromtimestamp(found.st_mtime, UTC).isoformat()}"


def _benchmark(section: BenchmarkSection) -> dict[str, Any]:
    if not section.path.is_file():
        raise ValueError(f"data file {section.path} does not exist")
    return {
        "sha256": hashlib.sha256(section.path.read_bytes()).hexdigest(),
        "reward": section.reward,
        "prompts": section.prompts,
    }
