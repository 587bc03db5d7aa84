"""Finds the weights that servers of an evaluation read, whatever kind of checkpoint they are in."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def served_model(path: Path, folder: Path) -> Iterator[Path]:
    """Give the Hugging Face directory of a model: itself, or of a Megatron checkpoint (converted, or `step_N` of a run)
    one that is in `folder` while the block runs. Raise ValueError where there is no room for it."""
    if not (path / "megatron").is_dir():
        yield path
        return
    from megatron_rl.checkpoint.convert import Job, convert  # torch

    converted = folder / ".weights"
    shutil.rmtree(converted, ignore_errors=True)  # of a process that was killed
    log.info("%s is a Megatron checkpoint; converting it for the servers", path)
    try:
        convert(Job(source=path, destination=converted, to_megatron=False))
        yield converted
    finally:
        shutil.rmtree(converted, ignore_errors=True)
