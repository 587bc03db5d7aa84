"""Keeps the validations of a run: what each found, in `run_dir/validation.jsonl`, and which step was the best.

A row has `step`, the number of completed steps that its weights come from, `seconds`, and under `benchmarks` what each
gave (results.py). The responses are in `run_dir/validation/step_N/NAME.jsonl`.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.evaluation.report import interval
from megatron_rl.evaluation.results import BenchmarkResult, finite
from megatron_rl.evaluation.statistics import Estimate
from megatron_rl.files import whole_file
from megatron_rl.parsing import bounded_lines, parse_json

Row = Mapping[str, Any]

_FOLDER = "validation"


class Validations:
    """Owns the file and the folder of a run's validations."""

    def __init__(self, run_dir: Path) -> None:
        """Read the file. Raise ValueError for one that holds no validations."""
        self._path, self._folder = run_dir / f"{_FOLDER}.jsonl", run_dir / _FOLDER
        self._rows = {row["step"]: row for row in read_validations(run_dir)}

    def forget_behind(self, step: int) -> None:
        """Delete what is there of later steps: a run that resumes from `step` trains these anew, and validates the new
        weights."""
        for folder in self._folder.glob("step_*"):
            number = folder.name.removeprefix("step_")
            if number.isdigit() and int(number) > step:
                shutil.rmtree(folder)
        if any(row > step for row in self._rows):
            self._rows = {number: row for number, row in self._rows.items() if number <= step}
            self._write()

    @property
    def rows(self) -> list[Row]:
        """Return the rows by rising step."""
        return [self._rows[step] for step in sorted(self._rows)]

    def folder(self, step: int) -> Path:
        """Return where the responses of the weights after `step` completed steps are."""
        return self._folder / f"step_{step:06d}"

    def add(self, step: int, seconds: float, results: Mapping[str, BenchmarkResult]) -> Row:
        """Keep what a validation found, in place of an earlier one of the same step."""
        benchmarks = finite({name: asdict(result) for name, result in results.items()})
        self._rows[step] = {"step": step, "seconds": seconds, "benchmarks": benchmarks}
        self._write()
        return self._rows[step]

    def _write(self) -> None:
        with whole_file(self._path) as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)


def read_validations(run_dir: Path) -> list[Row]:
    """Read the rows of a run's validations, in the order of the file; none where it has none. ValueError names a line
    that is no row."""
    path = run_dir / f"{_FOLDER}.jsonl"
    rows: list[Row] = []
    if path.is_file():
        with path.open("rb") as file:
            for number, line in enumerate(bounded_lines(file, path), start=1):
                try:
                    row = parse_json(line)
                    validation_metrics(row)
                    int(row["step"])
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f"{path} line {number} is no validation of a run; remove the file") from None
                rows.append(row)
    return rows


def validation_metrics(row: Row) -> dict[str, float]:
    """Give the numbers of a row by the names that they have among the metrics of a step."""
    found: dict[str, float] = {}
    for name, result in row["benchmarks"].items():
        for metric, end in (("validation", "value"), ("validation_low", "low"), ("validation_high", "high")):
            if result["average"][end] is not None:
                found[f"{metric}/{name}"] = float(result["average"][end])
    return found


def best_row(rows: Sequence[Row], benchmark: str) -> Row | None:
    """Find the row with the highest mean score, the first of several; None where none has the benchmark."""
    have = [row for row in rows if benchmark in row["benchmarks"]]
    return max(have, key=lambda row: row["benchmarks"][benchmark]["average"]["value"], default=None)


def told_score(row: Row, benchmark: str) -> str:
    """Say a benchmark's score with its interval."""
    ends = {end: value for end, value in row["benchmarks"][benchmark]["average"].items() if value is not None}
    return interval(Estimate(**{"low": -math.inf, "high": math.inf} | ends))
