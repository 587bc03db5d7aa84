"""Finds duplicates among the rows that are left: exact ones by digest, near ones by MinHash bands and then by their
text.

Of rows that say the same the first in the order of the sources stays. Rows are numbered in that order.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_rl.data.curation.answers import agree
from megatron_rl.data.curation.config import DuplicateSection
from megatron_rl.data.curation.text import jaccard, shingles, token_hashes, tokens
from megatron_rl.data.prompts import Prompt

_CACHED_RECORDS = 1 << 14

Record = Callable[[int], Prompt]


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """Says why a row is dropped. reason: "duplicate", "conflicting_answers" or "near_duplicate"; of: the other row."""

    reason: str
    of: int
    similarity: float = 1.0


def exact_duplicates(prompts: np.ndarray, answers: np.ndarray, record: Record) -> dict[int, Twin]:
    """Return the dropped rows. prompts, answers: digests, uint64 [rows, 2] and [rows]; record: asked where answers
    differ.

    All rows of a prompt are dropped when two of its answers disagree: nothing says which is right.
    """
    found: dict[int, Twin] = {}
    for group in _groups(prompts[:, 0], prompts[:, 1]):
        first, *others = sorted(map(int, group))
        rivals = [row for row in others if answers[row] != answers[first] and not _agree(record, first, row)]
        if rivals:
            found[first] = Twin(reason="conflicting_answers", of=rivals[0])
        for row in others:
            found[row] = Twin(reason="conflicting_answers" if rivals else "duplicate", of=first)
    return found


def near_duplicates(rows: np.ndarray, bands: np.ndarray, record: Record, settings: DuplicateSection) -> dict[int, Twin]:
    """Return the dropped rows: each is as similar as settings.threshold to a row before it that stays.

    rows: int64, those that are compared, ascending; bands: uint64 [all rows, bands]. Only rows that share a hash of a
    band are compared, by the exact similarity of their texts.
    """
    buckets = _buckets(rows, bands)
    kept: dict[int, list[int]] = defaultdict(list)
    found: dict[int, Twin] = {}
    runs = lru_cache(_CACHED_RECORDS)(lambda row: _runs(record(row).prompt, settings.shingle_tokens))
    for row in sorted(buckets):
        for other in sorted({other for bucket in buckets[row] for other in kept[bucket]}):
            similarity = jaccard(runs(row), runs(other))
            if similarity >= settings.threshold and (not settings.same_answer or _agree(record, other, row)):
                found[row] = Twin(reason="near_duplicate", of=other, similarity=similarity)
                break
        else:
            for bucket in buckets[row]:
                kept[bucket].append(row)
    return found


def _agree(record: Record, first: int, second: int) -> bool:
    one, other = record(first), record(second)
    return agree(one.domain, one.answer, other.answer)


def _runs(prompt: str, size: int) -> np.ndarray:
    return shingles(token_hashes(tokens(prompt)), size)


def _buckets(rows: np.ndarray, bands: np.ndarray) -> Mapping[int, list[int]]:
    """Map each row to the numbers of the buckets that it shares with another row. One band at a time, to need little
    memory."""
    buckets: dict[int, list[int]] = defaultdict(list)
    number = 0
    for band in range(bands.shape[1]):
        for group in _groups(bands[rows, band]):
            for row in rows[group].tolist():
                buckets[row].append(number)
            number += 1
    return buckets


def _groups(*keys: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the positions of equal keys, for every key that comes twice or more."""
    order = np.lexsort(keys)
    same = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        same &= key[order[1:]] == key[order[:-1]]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    for start, end in edges.reshape(-1, 2).tolist():
        yield order[start : end + 1]
