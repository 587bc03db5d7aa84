"""Records the metrics of a run: metrics.jsonl, trackers, and one line per step for the person at the terminal."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from megatron_rl.files import whole_file
from megatron_rl.parsing import bounded_lines, parse_json
from megatron_rl.train.run.trackers import Trackers

T = TypeVar("T")

console = Console(highlight=False)


def bar(items: Sequence[T], what: str) -> Iterable[T]:
    """Return the items, with a progress bar while they are gone through; on rank 0 at a terminal."""
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    return track(items, what, console=console, transient=True, disable=not shown)


class MetricsLog:
    """Appends one row per step to `run_dir/metrics.jsonl`, and tells trackers. `close()` ends both.

    `num_starts` in a row says how often the run had been started.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        see: Callable[[dict[str, Any]], object],
        trackers: Trackers | None = None,
    ) -> None:
        """Drop rows of step `first_step` and later, left by a run that was killed after its checkpoint.

        see: is given each row of the steps before, in their order. None of them is kept in memory. trackers: closed
        with this.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        self._num_starts = 1
        with whole_file(self._path) as file:
            for row in metric_rows(self._path):
                if row["step"] < first_step:
                    file.write(json.dumps(row) + "\n")
                    self._num_starts = max(self._num_starts, 1 + row.get("num_starts", 1))
                    see(row)
                    if trackers is not None:
                        trackers.catch_up(row["step"], _numbers(row))
        self._file = self._path.open("a", encoding="utf-8")
        self._trackers = trackers

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; row["step"] numbers it. A number that is not finite becomes null."""
        row = row | {"num_starts": self._num_starts}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        self.track(row["step"], finite)

    def track(self, step: int, row: Mapping[str, Any]) -> None:
        """Tell the numbers of a row to trackers alone."""
        if self._trackers is not None:
            self._trackers.log(step, _numbers(row))

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()
        with contextlib.suppress(OSError):  # a full disk was told when it was written to
            self._file.close()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl. A last line that was cut short by a kill is left out."""
    return list(metric_rows(path))


def metric_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl one at a time, without a last line that was cut short; none where there is no
    file."""
    if path.is_file():
        with path.open("rb") as file:
            for line in bounded_lines(file, path):
                try:
                    row = parse_json(line)
                except ValueError:
                    return
                yield row
