"""Curates prompts: every row alone first, then rows against each other, then what models made of them."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from megatron_rl.data.curation.config import CurationConfig
from megatron_rl.data.curation.contamination import build_index
from megatron_rl.data.curation.difficulty import Difficulty, read_difficulty
from megatron_rl.data.curation.inspect import Dropped
from megatron_rl.data.curation.mapping import has_column, left_out
from megatron_rl.data.curation.output import DROPPED, KEPT, REPORT, whole_output
from megatron_rl.data.curation.report import Report, SourceCount
from megatron_rl.data.curation.sources import parsed, read_pieces
from megatron_rl.data.curation.verdicts import Verdicts, check_measured, find_twins, record_reader
from megatron_rl.data.curation.workers import Task, inspected, peak_rss_bytes

Progress = Callable[[str, int], None]  # stage, rows so far

_RECORDS = "records.jsonl"  # of every row that is not dropped for itself
_JUDGE_MALFORMED_FROM_ROWS = 1000


def curate(config: CurationConfig, force: bool = False, progress: Progress = lambda stage, rows: None) -> Report:
    """Write kept.jsonl, dropped.jsonl and report.json to config.output. Raise ValueError for what a user has to
    correct."""
    with whole_output(config.output, force) as folder:
        return _Curation(config, folder, progress).run()


class _Curation:
    """Carries out one run. Of a row that is not dropped for itself, memory holds a ROW and its bands; its record is on
    disk."""

    def __init__(self, config: CurationConfig, folder: Path, progress: Progress) -> None:
        self._config = config
        self._folder = folder
        self._progress = progress
        self._num_rows: Counter[int] = Counter()
        self._dropped: list[Counter[str]] = [Counter() for _ in config.source]
        self._first_malformed: dict[int, str] = {}
        self._files: list[str] = []
        self._difficulty: Difficulty | None = None
        self._worker_peak_bytes = 0
        self._left_out: dict[int, list[str]] = {}

    def run(self) -> Report:
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        self._difficulty = read_difficulty(self._config.difficulty)
        with (self._folder / DROPPED).open("w", encoding="utf-8") as dropped:
            rows, bands = self._inspect(dropped)
            seconds["rows"] = time.perf_counter() - started
            with (self._folder / _RECORDS).open("rb") as records:
                verdicts = self._judge(rows, bands, records)
                del bands
                seconds["duplicates"] = time.perf_counter() - started - seconds["rows"]
                self._write(verdicts, records, dropped)
        seconds["writing"] = time.perf_counter() - started - sum(seconds.values())
        report = self._report(seconds)
        text = json.dumps(report.as_json() | {"config": self._config.model_dump(mode="json")}, indent=2)
        (self._folder / REPORT).write_text(text + "\n", encoding="utf-8")
        return report

    def _inspect(self, dropped: TextIO) -> tuple[np.ndarray, np.ndarray]:
        """Return ROW and bands of the rows that are not dropped for themselves; their records and the others' are
        written."""
        index = build_index(self._config.benchmark, self._config.contamination)
        rows, bands = [], []
        with (self._folder / _RECORDS).open("wb") as records:
            for (source, _, piece), result, peak_bytes in inspected(self._tasks(), self._config, index):
                records.write(result.lines)
                dropped.writelines(row.as_line() for row in result.dropped)
                rows.append(result.rows)
                bands.append(result.bands)
                self._num_rows[source] += len(piece.rows)
                self._count(source, result.dropped)
                self._worker_peak_bytes = max(self._worker_peak_bytes, peak_bytes)
                if self._num_rows[source] >= _JUDGE_MALFORMED_FROM_ROWS:
                    self._check_layout(source)
                self._progress("rows", self._num_rows.total())
        for source in range(len(self._config.source)):
            self._check_layout(source)
        return np.concatenate(rows), np.concatenate(bands)

    def _tasks(self) -> Iterator[Task]:
        for number, source in enumerate(self._config.source):
            unseen, columns = set(source.meta), dict[str, None]()
            for piece in read_pieces(source):
                if not self._files or self._files[-1] != piece.file:
                    self._files.append(piece.file)
                if unseen or not columns:
                    rows = [row for raw in piece.rows if (row := _row_of(raw)) is not None]
                    unseen -= {column for column in unseen if any(has_column(row, column) for row in rows)}
                    columns |= dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row)
                yield number, len(self._files) - 1, piece
            self._left_out[number] = left_out(columns, source.layout())
            if unseen and columns:  # a source without rows is told of as such
                raise ValueError(
                    f"{source.name}: meta names {', '.join(sorted(unseen))}, and no row has such a column; rows have "
                    f"{', '.join(columns)}"
                )

    def _count(self, source: int, dropped: Sequence[Dropped]) -> None:
        self._dropped[source].update(row.reason for row in dropped)
        for row in dropped:
            if row.reason == "malformed":
                self._first_malformed.setdefault(source, f"{row.file}:{row.line}: {row.details['details']}")

    def _check_layout(self, source: int) -> None:
        name, num_rows = self._config.source[source].name, self._num_rows[source]
        if not num_rows:
            raise ValueError(f"{name} has no rows; take it out of the sources")
        malformed = self._dropped[source]["malformed"]
        if malformed > self._config.max_malformed_share * num_rows:
            raise ValueError(
                f"{name}: {malformed} of {num_rows} rows do not have the layout that was given, above "
                f"max_malformed_share = {self._config.max_malformed_share}; correct the preset or the columns. "
                f"The first: {self._first_malformed[source]}"
            )

    def _judge(self, rows: np.ndarray, bands: np.ndarray, records: BinaryIO) -> Verdicts:
        if self._difficulty:
            check_measured(self._difficulty, rows)
        record = record_reader(records, rows["size"])
        twins = find_twins(rows, bands, record, self._config.duplicates, self._progress)
        return Verdicts(rows=rows, files=self._files, record=record, twins=twins, difficulty=self._difficulty)

    def _write(self, verdicts: Verdicts, records: BinaryIO, dropped: TextIO) -> None:
        again = verdicts.repeated_ids()
        records.seek(0)
        with (self._folder / KEPT).open("wb") as kept:
            for row, size in enumerate(verdicts.rows["size"].tolist()):
                line = records.read(size)
                why = verdicts.why(row)
                if why:
                    self._drop(verdicts.rows[row], why, json.loads(line), dropped)
                else:
                    kept.write(_with_number(line, row) if row in again else line)

    def _drop(self, row: np.void, why: tuple[str, dict[str, Any]], record: object, dropped: TextIO) -> None:
        reason, details = why
        file, line = self._files[row["file"]], int(row["line"])
        dropped.write(Dropped(reason=reason, file=file, line=line, details=details, row=record).as_line())
        self._dropped[row["source"]][reason] += 1

    def _report(self, seconds: dict[str, float]) -> Report:
        sources = [
            SourceCount(
                name=source.name,
                num_rows=self._num_rows[number],
                dropped=self._dropped[number],
                left_out=self._left_out[number],
            )
            for number, source in enumerate(self._config.source)
        ]
        workers = self._config.workers if self._config.workers > 1 else 0
        return Report(
            sources=tuple(sources),
            seconds=seconds,
            peak_rss_bytes=peak_rss_bytes() + workers * self._worker_peak_bytes,
        )


def _row_of(raw: bytes | dict[str, Any]) -> Any:
    """Return a row; None for what is no JSON, which is counted where rows are inspected."""
    try:
        return parsed(raw)
    except (ValueError, RecursionError):
        return None


def _with_number(line: bytes, number: int) -> bytes:
    row = json.loads(line)
    row["id"] = f"{row['id']}~{number}"
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
