"""Compares rows with each other and with what models made of them, and says which stay and why the others do not."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

from megatron_rl.data.curation.config import DuplicateSection
from megatron_rl.data.curation.difficulty import Difficulty
from megatron_rl.data.curation.duplicates import Record, Twin, exact_duplicates, near_duplicates
from megatron_rl.data.curation.inspect import from_row
from megatron_rl.data.prompts import Prompt

_CACHED_RECORDS = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Says which rows are dropped, and why. rows: ROW; a row is known by its position there. files: by ROW's number.
    record: of a row."""

    rows: np.ndarray
    files: Sequence[str]
    record: Record
    twins: Mapping[int, Twin]
    difficulty: Difficulty | None

    def why(self, row: int) -> tuple[str, dict[str, Any]] | None:
        """Return reason and details for dropping the row, None when it stays."""
        twin = self.twins.get(row)
        if twin:
            return twin.reason, self._details(twin)
        return self.difficulty.judge(int(self.rows["text"][row])) if self.difficulty else None

    def repeated_ids(self) -> set[int]:
        """Return the rows that stay and have the id of an earlier row that stays."""
        stays = np.ones(len(self.rows), bool)
        stays[list(self.twins)] = False
        if self.difficulty:
            stays &= [self.difficulty.judge(prompt) is None for prompt in self.rows["text"].tolist()]
        positions = np.flatnonzero(stays)
        _, first = np.unique(self.rows["identity"][positions], return_index=True)
        return set(np.delete(positions, first).tolist())

    def _details(self, twin: Twin) -> dict[str, Any]:
        other = self.rows[twin.of]
        details = {"of": self.record(twin.of).id, "of_file": self.files[other["file"]], "of_line": int(other["line"])}
        return details | ({"similarity": round(twin.similarity, 3)} if twin.reason == "near_duplicate" else {})


def find_twins(
    rows: np.ndarray,
    bands: np.ndarray,
    record: Record,
    settings: DuplicateSection,
    progress: Callable[[str, int], None],
) -> dict[int, Twin]:
    twins: dict[int, Twin] = {}
    if settings.exact:
        twins |= exact_duplicates(rows["prompt"], rows["answer"], record)
        progress("exact duplicates", len(twins))
    if settings.near:
        compared = rows["near"].copy()
        compared[list(twins)] = False
        near = near_duplicates(np.flatnonzero(compared), bands, record, settings)
        progress("near-duplicates", len(near))
        twins |= near
    return twins


def check_measured(difficulty: Difficulty, rows: np.ndarray) -> None:
    """Raise ValueError when the rollouts are of other prompts."""
    if not any(prompt in difficulty.model for prompt in rows["text"].tolist()):
        raise ValueError(
            f"none of the {len(difficulty.model)} prompts of difficulty.rollouts is among the rows; matched are equal "
            "texts, so sample the kept.jsonl of these sources"
        )


def record_reader(records: BinaryIO, sizes: np.ndarray) -> Record:
    """Return a function that reads a row as the pipeline wrote it. A few thousand records are kept in memory:
    duplicates often have the same first row."""
    ends = np.cumsum(sizes, dtype=np.int64)

    @lru_cache(_CACHED_RECORDS)
    def record(row: int) -> Prompt:
        size = int(sizes[row])
        return from_row(json.loads(os.pread(records.fileno(), size, int(ends[row]) - size)))

    return record
