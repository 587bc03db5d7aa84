"""Handles the end of an epoch of supervised fine-tuning: its training loss, and the model as it is then."""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_rl.checkpoint.epochs import SFT_NOTE, epoch_path
from megatron_rl.files import link_directory
from megatron_rl.sync.all_ranks import on_all_ranks
from megatron_rl.train.run.context import TrainContext
from megatron_rl.train.step.trainer import StepResult


class EpochLoss:
    """Computes the loss per target token over the steps that hold chats of the epoch, those across its borders
    included. Skipped steps do not count."""

    def __init__(self, state: Sequence[float] = (0.0, 0)) -> None:
        self._sum, self._num_tokens = state

    @property
    def state(self) -> list[float]:
        """The state that a checkpoint keeps."""
        return [self._sum, self._num_tokens]

    def add(self, result: StepResult, ended: range, remain: int) -> list[float | None]:
        """Add a step. Return the loss of each epoch that ended in it; None when all of its steps were skipped.

        ended: these epochs. remain: chats that the step held of the next one.
        """
        counts = not result.skipped
        own = (result.metrics["loss"] * result.num_loss_tokens, result.num_loss_tokens) if counts else (0.0, 0)
        self._sum, self._num_tokens = self._sum + own[0], self._num_tokens + own[1]
        losses = []
        for epoch in ended:
            losses.append(self._sum / self._num_tokens if self._num_tokens else None)
            self._sum, self._num_tokens = own if remain or epoch != ended[-1] else (0.0, 0)
        return losses


class EpochDirectories:
    """Writes `run_dir/epochs/epoch_N`: Hugging Face directories, each there when it is whole, with what was measured
    then."""

    def __init__(self, context: TrainContext, num_epochs: int) -> None:
        self._context, self._num_epochs = context, num_epochs
        self._run_dir = context.config.run_dir

    def write(self, epoch: int, note: dict[str, float | None]) -> None:
        """Write the present weights, unless those of just this epoch are there: a run that was killed after it comes
        here again. Collective."""
        finite = {name: None if value is None or not math.isfinite(value) else value for name, value in note.items()}
        path, text = epoch_path(self._run_dir, epoch), json.dumps({"epoch": epoch, **finite}, indent=1) + "\n"
        if not self._agreed(_text(path / SFT_NOTE) == text):
            self._context.export(path, {SFT_NOTE: text})

    def link_last(self, link: Path) -> None:
        """Give the last directory another name, or write the present weights where somebody removed it. Collective."""
        last = epoch_path(self._run_dir, self._num_epochs)
        if self._agreed(last.is_dir()):
            on_all_ranks(
                partial(link_directory, last, link) if self._context.is_rank_zero else None, self._context.control
            )
        else:
            self._context.export(link)

    def _agreed(self, found: bool) -> bool:
        """Return what rank 0 found; file systems may show other ranks an older state."""
        return self._context.any_rank(self._context.is_rank_zero and found)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
