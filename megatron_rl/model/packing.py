"""This module packs sequences: several end to end in one row, with everything attention needs, computed once.

Legend: T packed tokens on this rank, C context-parallel ranks, R the part of head_dim that is rotated.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_rl.device import import_megatron, send
from megatron_rl.model import zigzag
from megatron_rl.rotary import Frequencies

import_megatron()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Holds rows of attention that are computed together. The last query of a row sees all its keys, the one before it
    all but the last key, and so on.

    queries: int64 [b, Lq], indices of tokens of this rank.
    keys: int64 [b, Lk], indices of tokens of all context-parallel ranks, joined in their order [C * T].
    """

    queries: Tensor
    keys: Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Holds Megatron's `thd` parameters (of whole sequences), extended by what our own attention uses.

    positions: int64 [T], each token's position in its own sequence.
    cos, sin: [T, 1, R], rotary tables at those positions.
    buckets: together they have every token of this rank as a query.
    restore: int64 [T], where each token landed in the concatenation of all flattened queries.
    routed_experts: int16 [T, layers, topk], layers of the whole model: the experts to use in place of the routers' own
        choice (model/router.py). -1 where they choose; None: everywhere.
    """

    positions: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    buckets: list[Bucket] = field(default_factory=list)
    restore: Tensor | None = None
    routed_experts: Tensor | None = None


def pack(
    lengths: list[int],
    rotary: Frequencies,
    dtype: torch.dtype,
    device: torch.device,
    context_rank: int = 0,
    context_size: int = 1,
) -> PackedSequences:
    """Describe one context-parallel rank's part of a pack of sequences with these padded lengths (at least 1)."""
    positions = torch.from_numpy(
        np.concatenate([zigzag.held_positions(length, context_size)[context_rank] for length in lengths])
    )
    rows = _whole_rows(lengths) if context_size == 1 else _zigzag_rows(lengths, context_rank, context_size)
    buckets = [
        Bucket(queries=send(torch.from_numpy(q), device), keys=send(torch.from_numpy(k), device)) for q, k in rows
    ]
    # Padding repeats a token behind its real place, so the first place is right, and `unique` gives that.
    _, restore = np.unique(np.concatenate([queries.flatten() for queries, _ in rows]), return_index=True)

    cos, sin = rotary.tables(positions)
    cu_seqlens = send(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions=send(positions, device),
        cos=send(cos.unsqueeze(1).to(dtype), device),
        sin=send(sin.unsqueeze(1).to(dtype), device),
        buckets=buckets,
        restore=send(torch.from_numpy(restore), device),
    )


def _whole_rows(lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the queries and keys of buckets of whole sequences. Rows are padded by repeating their last token: a
    causal row never looks right of a real token, so padding needs no mask.

    Sequences share a bucket while the longest is at most a quarter longer than the shortest: that bounds the padding.
    """
    sizes = np.array(lengths)
    starts = sizes.cumsum() - sizes
    rows = []
    order = np.argsort(-sizes, kind="stable")
    while len(order):
        longest = sizes[order[0]]
        count = int((sizes[order] * 5 >= longest * 4).sum())
        bucket, order = order[:count], order[count:]
        columns = np.minimum(np.arange(longest)[None], sizes[bucket, None] - 1)
        index = starts[bucket, None] + columns
        rows.append((index, index))
    return rows


def _zigzag_rows(lengths: list[int], rank: int, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the queries and keys of this rank's two chunks of every sequence. A chunk sees itself and all chunks
    before it.

    Chunks share a bucket when they are equally long, so that nothing is padded and no mask is needed.
    """
    held = sum(lengths) // size  # tokens of a rank
    by_chunk: dict[int, list[tuple[int, np.ndarray]]] = {}
    start = 0
    for length in lengths:
        mine = start + np.arange(length // size)
        joined = zigzag.merge([r * held + mine for r in range(size)])
        by_chunk.setdefault(length // (2 * size), []).append((start, joined))
        start += length // size
    rows = []
    for chunk, sequences in by_chunk.items():
        starts = np.array([start for start, _ in sequences])
        for offset, number in ((0, rank), (chunk, 2 * size - 1 - rank)):
            queries = starts[:, None] + offset + np.arange(chunk)
            rows.append((queries, np.stack([joined[: (number + 1) * chunk] for _, joined in sequences])))
    return rows
