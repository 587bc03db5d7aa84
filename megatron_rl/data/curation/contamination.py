"""Finds the rows that repeat a benchmark, by an index of hashes of the benchmarks' n-grams and of where each stands."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rl.data.curation.config import Benchmark, ContaminationSection
from megatron_rl.data.curation.mapping import Unusable, prompt_of
from megatron_rl.data.curation.sources import parsed, read_pieces
from megatron_rl.data.curation.text import digest, ngram_hashes, token_hashes, tokens

_PHRASE_PROMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Holds the n-grams of all benchmark prompts, sorted by hash.

    hashes, items: uint64 and int32 [number of n-grams], n-gram and prompt that it is of. sizes: int32 [number of
        prompts], how many n-grams a prompt has, 0 where only equality counts. lengths: those of the n-grams.
    files, lines: where a prompt stands. whole: digest of the normal form of a prompt -> prompt.
    """

    settings: ContaminationSection
    hashes: np.ndarray
    items: np.ndarray
    sizes: np.ndarray
    lengths: tuple[int, ...]
    files: tuple[str, ...]
    lines: np.ndarray
    whole: dict[bytes, int]

    def find(self, words: Sequence[str], hashes: np.ndarray) -> dict[str, Any] | None:
        """Return what a row of these tokens has in common with a benchmark prompt, if that is too much, else None.
        hashes: of tokens."""
        item = self.whole.get(digest(" ".join(words)))
        if item is not None:
            return self._where(item, share=1.0, ngram=" ".join(words[: self.settings.ngram_tokens]))
        found: tuple[float, int, int, int] | None = None
        for length in self.lengths:
            found = max(filter(None, (found, self._best(length, ngram_hashes(hashes, length)))), default=None)
        if found is None or found[0] < self.settings.min_share:
            return None
        share, item, start, length = found
        return self._where(item, share=round(share, 3), ngram=" ".join(words[start : start + length]))

    def _best(self, length: int, ngrams: np.ndarray) -> tuple[float, int, int, int] | None:
        """Return (share, prompt, position, length) of the prompt with which the row shares most, None if it shares
        nothing."""
        if not len(ngrams) or not len(self.hashes):
            return None
        left = np.searchsorted(self.hashes, ngrams)
        hits = np.flatnonzero(self.hashes[np.minimum(left, len(self.hashes) - 1)] == ngrams)
        if not len(hits):
            return None
        unique, first = np.unique(ngrams[hits], return_index=True)
        left, right = (np.searchsorted(self.hashes, unique, side=side) for side in ("left", "right"))
        shared = self.items[np.concatenate([np.arange(a, b) for a, b in zip(left, right, strict=True)])]
        starts = np.repeat(hits[first], right - left)
        items, counts = np.unique(shared, return_counts=True)
        sizes = self.sizes[items]
        if length == self.settings.ngram_tokens:
            sizes = np.minimum(sizes, len(np.unique(ngrams)))
        best = int(np.argmax(counts / sizes))
        return float(counts[best] / sizes[best]), int(items[best]), int(starts[shared == items[best]].min()), length

    def _where(self, item: int, **details: Any) -> dict[str, Any]:
        return {"benchmark": self.files[item], "benchmark_line": int(self.lines[item]), **details}


def build_index(benchmarks: Iterable[Benchmark], settings: ContaminationSection) -> Index | None:
    """Build the index; None without benchmarks. ValueError names a row that has no prompt."""
    files: list[str] = []
    lines: list[int] = []
    parts: list[np.ndarray] = []
    lengths: set[int] = set()
    whole: dict[bytes, int] = {}
    for file, line, prompt in _prompts(benchmarks):
        words = tokens(prompt)
        if not words or whole.setdefault(digest(" ".join(words)), len(files)) != len(files):
            continue  # a benchmark that comes twice makes no phrases
        length = min(settings.ngram_tokens, len(words))
        parts.append(np.empty(0, np.uint64))
        if length >= min(settings.min_tokens, settings.ngram_tokens):
            lengths.add(length)
            parts[-1] = np.unique(ngram_hashes(token_hashes(words), length))
        files.append(file)
        lines.append(line)
    if not files:
        return None
    hashes = np.concatenate(parts)
    items = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    hashes, items = _without_phrases(hashes, items)
    return Index(
        settings=settings,
        hashes=hashes,
        items=items,
        sizes=np.bincount(items, minlength=len(files)).astype(np.int32),
        lengths=tuple(sorted(lengths)),
        files=tuple(files),
        lines=np.array(lines, np.int32),
        whole=whole,
    )


def _without_phrases(hashes: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both sorted by hash, without n-grams that _PHRASE_PROMPTS prompts have: "where m and n are relatively
    prime"."""
    order = np.argsort(hashes, kind="stable")
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    order = order[counts[group[order]] < _PHRASE_PROMPTS]
    return hashes[order], items[order]


def _prompts(benchmarks: Iterable[Benchmark]) -> Iterable[tuple[str, int, str]]:
    for benchmark in benchmarks:
        layout = benchmark.layout()
        for piece in read_pieces(benchmark):
            for line, row in zip(piece.lines, piece.rows, strict=True):
                try:
                    yield piece.file, line, prompt_of(parsed(row), layout)
                except (Unusable, ValueError) as error:
                    raise ValueError(f"{piece.file}:{line}: no benchmark row: {error}; correct the columns") from None
