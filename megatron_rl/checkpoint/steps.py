"""This module handles the directory of a run's checkpoints: `step_N/`, `latest`, and what a save or a kill leaves
beside them.

`latest` is a file with the name of the newest whole checkpoint. `.step_N.partial` is one that is being written,
`step_N.damaged` one that was found to be. Other names are somebody's own copies.
"""

import re
import shutil
from pathlib import Path

from megatron_rl.checkpoint.checksums import sync
from megatron_rl.checkpoint.newest import newest
from megatron_rl.files import whole_file

_STEP = re.compile(r"step_\d+")


def refuse_to_overwrite(directory: Path, resume: bool) -> None:
    """Raise ValueError when a run's checkpoints would be overwritten, or when `resume` would silently start anew."""
    if newest(directory) is not None:
        if not resume:
            raise ValueError(
                f"{directory.parent} holds a run; add --resume to continue it, or set run_dir to a new folder"
            )
    elif resume and any(directory.glob("step_*")):
        raise ValueError(
            f"{directory} has checkpoints but no file 'latest'; write the name of the one to resume from into it"
        )


def candidates(directory: Path) -> list[Path]:
    """List the checkpoint that `latest` names, and those of earlier steps, the newest first."""
    latest = newest(directory)
    if latest is None:
        return []
    limit = _step(latest) if _STEP.fullmatch(latest.name) else 0
    earlier = [path for path in _step_directories(directory) if _step(path) < limit]
    return [latest, *sorted(earlier, key=_step, reverse=True)]


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step}"


def partial_path(directory: Path, step: int) -> Path:
    return directory / f".step_{step}.partial"


def remove_partial(directory: Path) -> None:
    for path in directory.glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def point_to(path: Path) -> None:
    """Make `latest` name a checkpoint, once that is there for certain."""
    directory = path.parent
    sync(directory)
    with whole_file(directory / "latest", is_durable=True) as file:
        file.write(path.name)
    sync(directory)


def set_aside(path: Path) -> None:
    """Move a checkpoint out of the way of the next save of that step, and keep it for inspection."""
    if path.exists():
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def forget_old(latest: Path, keep_last: int, keep_every: int, best: int | None = None) -> None:
    """Delete all but `latest`, the `keep_last` - 1 most recent before it, those of every `keep_every`th step, and that
    of step `best`."""
    saved = [path for path in _step_directories(latest.parent) if path != latest]
    saved.sort(key=lambda path: path.stat().st_mtime)
    for path in saved[: max(0, len(saved) - (keep_last - 1))]:
        if _step(path) != best and (not keep_every or _step(path) % keep_every):
            shutil.rmtree(path, ignore_errors=True)


def _step_directories(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if _STEP.fullmatch(path.name)]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
