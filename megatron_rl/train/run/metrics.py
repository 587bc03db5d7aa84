"""Metrics of a run: metrics.jsonl, TensorBoard, and one line per step for the person at the terminal."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from megatron_rl.files import whole_file
from megatron_rl.parsing import bounded_lines, parse_json

T = TypeVar("T")

console = Console(highlight=False)


def bar(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, with a progress bar while they are gone through; on rank 0 at a terminal."""
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    return track(items, what, console=console, transient=True, disable=not shown)


class MetricsLog:
    """Appends one row per step to `run_dir/metrics.jsonl` and to `run_dir/tensorboard/`. `close()` flushes both.

    `num_starts` in a row says how often the run had been started.
    """

    def __init__(self, run_dir: Path, first_step: int, see: Callable[[dict[str, Any]], object]) -> None:
        """Rows of step `first_step` and later, left by a run that was killed after its checkpoint, are dropped.

        see: is given each row of the steps before, in their order. None of them is kept in memory.
        """
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        self._num_starts = 1
        with whole_file(self._path) as file:
            for row in metric_rows(self._path):
                if row["step"] < first_step:
                    file.write(json.dumps(row) + "\n")
                    self._num_starts = max(self._num_starts, 1 + row.get("num_starts", 1))
                    see(row)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, row: dict[str, Any]) -> None:
        """row["step"] numbers it; numbers go to TensorBoard as well. A number that is not finite becomes null."""
        row = row | {"num_starts": self._num_starts}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):  # a full disk was told when it was written to
                file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that was cut short by a kill is left out."""
    return list(metric_rows(path))


def metric_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one at a time; none where there is no file."""
    if path.is_file():
        with path.open("rb") as file:
            for line in bounded_lines(file, path):
                try:
                    row = parse_json(line)
                except ValueError:
                    return
                yield row
