"""Checks at start-up that a row's bits depend neither on its place in the batch, nor on the other rows, nor on the
number of rows.

Matrix libraries choose kernels by shape and thread count, so this cannot be known in advance; it is measured on the
served shapes, and row counts that do not reproduce the full size bit for bit are not used.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.families import Architecture
from megatron_rl.rollout.embedded.cache import BLOCK, KVCache
from megatron_rl.rollout.embedded.model import EXPERT_TILES, Batch, EmbeddedModel
from megatron_rl.rollout.embedded.weights import ModelWeights

log = logging.getLogger(__name__)

CHUNK = 16  # prompt tokens per prefill entry
PREFILL_ENTRIES = (1, 4, 16)
MIN_HEAD_ROWS = 4  # a single row takes the matrix-vector path of the library, whose bits differ
_SHIFTS = (1, 3, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """Holds the sizes of forward passes that give the same bits; the largest of each is always there."""

    decode: tuple[int, ...]
    prefill_entries: tuple[int, ...]
    invariant: bool  # False: even the full size failed the check


def decode_row_counts(max_running_requests: int) -> tuple[int, ...]:
    """Return candidate sizes of a decode step, ascending; the last one holds every slot."""
    counts = [4, 8, 16, 24, 32, 48, 64]
    while counts[-1] < max_running_requests:
        counts.append(counts[-1] + 64)
    return tuple(counts[: 1 + next(i for i, c in enumerate(counts) if c >= max_running_requests)])


def check_invariance(model: EmbeddedModel, weights: ModelWeights, num_slots: int) -> RowCounts:
    """Choose the model's `expert_tile`, run random batches through every candidate size and keep the sizes whose rows
    are bit-identical."""
    generator = torch.Generator().manual_seed(0)
    model.expert_tile = _expert_tile(weights, max(num_slots, PREFILL_ENTRIES[-1] * CHUNK), generator)
    decode = _Probe(model, weights, generator, num_entries=num_slots, num_queries=1)
    prefill = _Probe(model, weights, generator, num_entries=PREFILL_ENTRIES[-1], num_queries=CHUNK)
    decode_counts = tuple(c for c in decode_row_counts(num_slots)[:-1] if decode.agrees(c))
    prefill_counts = tuple(c for c in PREFILL_ENTRIES[:-1] if prefill.agrees(c))
    invariant = decode.is_invariant() and prefill.is_invariant() and _head_is_invariant(model, weights, generator)
    return RowCounts(
        decode=(*decode_counts, num_slots), prefill_entries=(*prefill_counts, PREFILL_ENTRIES[-1]), invariant=invariant
    )


class _Probe:
    """Runs forward passes over chosen ones of random sequences in a small cache, side by side.

    A pass writes keys and values into the cache, but only those that every other pass over the sequence writes too.
    """

    def __init__(
        self,
        model: EmbeddedModel,
        weights: ModelWeights,
        generator: torch.Generator,
        *,
        num_entries: int,
        num_queries: int,
    ) -> None:
        self.model, self.weights = model, weights
        self.num_entries, self.num_queries = num_entries, num_queries
        self.limit = min(2 * BLOCK, len(model.cos))
        self.cache, self.scratch = (_small_cache(model.config, num_entries) for _ in range(2))
        self.cache.keys.normal_(generator=generator)
        self.cache.values.normal_(generator=generator)
        num_queries = min(num_queries, self.limit)
        starts = torch.randint(0, self.limit - num_queries + 1, (num_entries, 1), generator=generator)
        self.positions = (starts + torch.arange(self.num_queries)).clamp(max=self.limit - 1)
        self.tokens = torch.randint(0, model.config.vocab_size, self.positions.shape, generator=generator)
        self.everyone = torch.arange(num_entries)
        self.reference = self.run(self.everyone)

    def run(self, entries: Tensor, num_blocks: int | None = None) -> Tensor:
        """Return the log-probs of the entries, [entries, T, V]."""
        cache, entry_slots = self.cache, entries
        decode = self.num_queries == 1
        if decode:  # a decode step reads slots in place, so the slots themselves move
            cache, slots = self.scratch, torch.arange(len(entries))
            cache.keys[:, :, : len(entries)] = self.cache.keys[:, :, entries]
            cache.values[:, :, : len(entries)] = self.cache.values[:, :, entries]
            entry_slots = slots
        positions = self.positions[entries].flatten()
        batch = Batch(
            tokens=self.tokens[entries].flatten(),
            positions=positions,
            write_blocks=positions // BLOCK,
            write_slots=entry_slots.repeat_interleave(self.num_queries),
            entry_slots=None if decode else entry_slots,
            num_queries=self.num_queries,
            num_blocks=-(-self.limit // BLOCK) if num_blocks is None else num_blocks,
        )
        hidden = self.model.hidden(self.weights, cache, batch)
        logprobs = self.model.logits(self.weights, hidden).log_softmax(-1)
        return logprobs.view(len(entries), self.num_queries, -1)

    def is_invariant(self) -> bool:
        """Tell whether the full size gives the same bits for rotated batches, and for short sequences beside only short
        ones (fewer blocks are read)."""
        for shift in {s for s in (*_SHIFTS, self.num_entries // 2) if s < self.num_entries}:
            if not torch.equal(self.run(self.everyone.roll(shift)), self.reference.roll(shift, 0)):
                return False
        short = (self.positions < BLOCK).all(1)
        others = torch.where(short, self.everyone, int(short.int().argmax()))
        return not short.any() or torch.equal(self.run(others, 1)[short], self.reference[short])

    def agrees(self, count: int) -> bool:
        """Tell whether every window of `count` entries gives what the full batch gave (the last window may overlap)."""
        starts = sorted({*range(0, self.num_entries - count + 1, count), self.num_entries - count})
        windows = (torch.arange(start, start + count) for start in starts)
        return all(torch.equal(self.run(window), self.reference[window]) for window in windows)


def _small_cache(config: Architecture, num_slots: int) -> KVCache:
    return KVCache(
        num_layers=config.num_hidden_layers,
        num_slots=num_slots,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        context_length=2 * BLOCK,
    )


def _expert_tile(weights: ModelWeights, most_rows: int, generator: torch.Generator) -> int:
    """Return the smallest tile of which any multiple gives a row the same bits; the largest one if none does."""
    experts = [expert for layer in weights.layers for expert in layer.experts[:1]][:1]
    matrices = [matrix for expert in experts for matrix in (expert.gate_up, expert.down)]
    for tile in EXPERT_TILES:
        rows = -(-most_rows // tile) * tile
        if all(_prefixes_agree(matrix, rows, tile, generator) for matrix in matrices):
            return tile
    return EXPERT_TILES[-1]


def _prefixes_agree(matrix: Tensor, rows: int, tile: int, generator: torch.Generator) -> bool:
    inputs = torch.randn(rows, matrix.shape[0], generator=generator).to(matrix.dtype)
    full = torch.mm(inputs, matrix)
    return torch.equal(torch.mm(inputs.roll(1, 0), matrix), full.roll(1, 0)) and all(
        torch.equal(torch.mm(inputs[:count], matrix), full[:count]) for count in range(tile, rows, tile)
    )


def _head_is_invariant(model: EmbeddedModel, weights: ModelWeights, generator: torch.Generator) -> bool:
    """Tell whether the head gives the same bits after a prefill, where it sees one row per entry and not all rows of
    the pass."""
    hidden = torch.randn(PREFILL_ENTRIES[-1], model.config.hidden_size, generator=generator).to(model.dtype)
    full = model.logits(weights, hidden)
    counts = {max(count, MIN_HEAD_ROWS) for count in PREFILL_ENTRIES}
    return all(
        torch.equal(model.logits(weights, hidden[i : i + 1].expand(c, -1)), full[i : i + 1].expand(c, -1))
        for c in counts
        for i in (0, 7)
    )
