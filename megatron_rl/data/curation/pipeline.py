"""The curation of prompts: every row alone first, then rows against each other, then what models made of them."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from megatron_rl.data.curation.config import CurationConfig
from megatron_rl.data.curation.contamination import build_index
from megatron_rl.data.curation.difficulty import Difficulty, read_difficulty
from megatron_rl.data.curation.duplicates import Twin, exact_duplicates, near_duplicates
from megatron_rl.data.curation.inspect import Dropped
from megatron_rl.data.curation.output import DROPPED, KEPT, REPORT, whole_output
from megatron_rl.data.curation.report import Report, SourceCount
from megatron_rl.data.curation.sources import read_pieces
from megatron_rl.data.curation.workers import Task, inspected, peak_rss_bytes
from megatron_rl.data.prompts import Prompt

Progress = Callable[[str, int], None]  # stage, rows so far

_Reasons = dict[int, tuple[str, dict[str, Any]]]  # position of a row -> why it is dropped, with details

_RECORDS = "records.jsonl"  # of every row that is not dropped for itself
_JUDGE_MALFORMED_FROM_ROWS = 1000
_CACHED_RECORDS = 1 << 12


def curate(config: CurationConfig, force: bool = False, progress: Progress = lambda stage, rows: None) -> Report:
    """Write kept.jsonl, dropped.jsonl and report.json to config.output. ValueError for what a user has to correct."""
    with whole_output(config.output, force) as folder:
        return _Curation(config, folder, progress).run()


class _Curation:
    """One run. Of a row that is not dropped for itself, memory holds a ROW and its bands; its record is on disk."""

    def __init__(self, config: CurationConfig, folder: Path, progress: Progress) -> None:
        self._config = config
        self._folder = folder
        self._progress = progress
        self._num_rows: Counter[int] = Counter()
        self._dropped: list[Counter[str]] = [Counter() for _ in config.source]
        self._first_malformed: dict[int, str] = {}
        self._files: list[str] = []
        self._worker_peak_bytes = 0

    def run(self) -> Report:
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        difficulty = read_difficulty(self._config.difficulty)
        with (self._folder / DROPPED).open("w") as dropped:
            rows, bands = self._inspect(dropped)
            seconds["rows"] = time.perf_counter() - started
            with (self._folder / _RECORDS).open("rb") as records:
                reasons = self._compare(rows, bands, records)
                del bands
                if difficulty:
                    _measure(difficulty, rows, reasons)
                seconds["duplicates"] = time.perf_counter() - started - seconds["rows"]
                self._write(rows, reasons, records, dropped)
        seconds["writing"] = time.perf_counter() - started - sum(seconds.values())
        report = self._report(seconds)
        text = json.dumps(report.as_json() | {"config": self._config.model_dump(mode="json")}, indent=2)
        (self._folder / REPORT).write_text(text + "\n")
        return report

    def _inspect(self, dropped: TextIO) -> tuple[np.ndarray, np.ndarray]:
        """ROW and bands of the rows that are not dropped for themselves; their records and the others' are written."""
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
            for piece in read_pieces(source):
                if not self._files or self._files[-1] != piece.file:
                    self._files.append(piece.file)
                yield number, len(self._files) - 1, piece

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

    def _compare(self, rows: np.ndarray, bands: np.ndarray, records: BinaryIO) -> _Reasons:
        """Reason and details of every duplicate, by its position in `rows`."""
        settings = self._config.duplicates
        record = _reader(records, rows["size"])
        twins: dict[int, Twin] = {}
        if settings.exact:
            twins |= exact_duplicates(rows["prompt"], rows["answer"], record)
            self._progress("exact duplicates", len(twins))
        if settings.near:
            compared = rows["near"].copy()
            compared[list(twins)] = False
            positions = np.flatnonzero(compared)
            twins |= near_duplicates(positions, bands, record, settings)
            self._progress("near-duplicates", len(twins))
        return {row: (twin.reason, self._details(twin, rows, record)) for row, twin in twins.items()}

    def _details(self, twin: Twin, rows: np.ndarray, record: Callable[[int], Prompt]) -> dict[str, Any]:
        other = rows[twin.of]
        details = {"of": record(twin.of).id, "of_file": self._files[other["file"]], "of_line": int(other["line"])}
        return details | ({"similarity": round(twin.similarity, 3)} if twin.reason == "near_duplicate" else {})

    def _write(self, rows: np.ndarray, reasons: _Reasons, records: BinaryIO, dropped: TextIO) -> None:
        again = _repeated_ids(rows["identity"], reasons)
        records.seek(0)
        with (self._folder / KEPT).open("wb") as kept:
            for position, size in enumerate(rows["size"].tolist()):
                line = records.read(size)
                if position in reasons:
                    self._drop(rows[position], reasons[position], json.loads(line), dropped)
                elif position in again:
                    row = json.loads(line)
                    row["id"] = f"{row['id']}~{position}"
                    kept.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                else:
                    kept.write(line)

    def _drop(self, row: np.void, why: tuple[str, dict[str, Any]], record: object, dropped: TextIO) -> None:
        reason, details = why
        file, line = self._files[row["file"]], int(row["line"])
        dropped.write(Dropped(reason=reason, file=file, line=line, details=details, row=record).as_line())
        self._dropped[row["source"]][reason] += 1

    def _report(self, seconds: dict[str, float]) -> Report:
        sources = [
            SourceCount(name=source.name, num_rows=self._num_rows[number], dropped=self._dropped[number])
            for number, source in enumerate(self._config.source)
        ]
        workers = self._config.workers if self._config.workers > 1 else 0
        return Report(
            sources=tuple(sources),
            seconds=seconds,
            peak_rss_bytes=peak_rss_bytes() + workers * self._worker_peak_bytes,
        )


def _reader(records: BinaryIO, sizes: np.ndarray) -> Callable[[int], Prompt]:
    """Record of a row. Rows that are compared lie close together or come often, so a few thousand are kept."""
    ends = np.cumsum(sizes, dtype=np.int64)

    @lru_cache(_CACHED_RECORDS)
    def record(row: int) -> Prompt:
        size = int(sizes[row])
        return Prompt(**json.loads(os.pread(records.fileno(), size, int(ends[row]) - size)))

    return record


def _measure(difficulty: Difficulty, rows: np.ndarray, reasons: _Reasons) -> None:
    """Add the rows that their pass rates rule out."""
    num_measured = 0
    for position, prompt in enumerate(rows["text"].tolist()):
        num_measured += prompt in difficulty.model
        if position not in reasons and (why := difficulty.judge(prompt)):
            reasons[position] = why
    if not num_measured:
        raise ValueError(
            f"none of the {len(difficulty.model)} prompts of difficulty.rollouts is among the rows; matched are "
            "equal texts, so sample the kept.jsonl of these sources"
        )


def _repeated_ids(identities: np.ndarray, reasons: _Reasons) -> set[int]:
    """Rows that stay and have the id of one before them that stays."""
    stays = np.ones(len(identities), bool)
    stays[list(reasons)] = False
    positions = np.flatnonzero(stays)
    _, first = np.unique(identities[positions], return_index=True)
    return set(np.delete(positions, first).tolist())
