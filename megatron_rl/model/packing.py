"""Packed sequences: several sequences end to end in one row, with everything attention needs, computed once.

Legend: T packed tokens, B sequences, D head_dim.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rl.device import import_megatron

import_megatron()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's `thd` parameters, extended by what our own attention uses.

    positions: int64 [T], each token's position in its own sequence.
    cos, sin: [T, 1, D], rotary tables at those positions.
    buckets: per length class an int64 [b, L] of packed token indices, rows padded by repeating their last token. Causal
        attention over a row never looks right of a real token, so padding needs no mask.
    restore: int64 [T], where each packed token landed in the concatenation of all flattened buckets.
    """

    positions: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    buckets: list[Tensor] = field(default_factory=list)
    restore: Tensor | None = None


def pack(
    lengths: list[int], head_dim: int, rope_theta: float, dtype: torch.dtype, device: torch.device
) -> PackedSequences:
    """Describe a pack of sequences of these lengths (tokens, each at least 1)."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    ends = sizes.cumsum(0)
    starts = ends - sizes
    total = int(ends[-1])
    positions = torch.arange(total) - starts.repeat_interleave(sizes)

    buckets, restore, offset = [], torch.empty(total, dtype=torch.int64), 0
    # Sequences share a bucket while the longest is at most a quarter longer than the shortest: that bounds the padding.
    order = sizes.argsort(descending=True, stable=True).tolist()
    while order:
        longest = lengths[order[0]]
        row_ids = [i for i in order if lengths[i] * 5 >= longest * 4]
        order = order[len(row_ids) :]
        rows = torch.tensor(row_ids)
        columns = torch.arange(longest)
        index = starts[rows, None] + torch.minimum(columns[None], sizes[rows, None] - 1)
        real = columns[None] < sizes[rows, None]
        restore[index[real]] = offset + real.flatten().nonzero().squeeze(1)
        buckets.append(index.to(device))
        offset += index.numel()

    inverse = 1.0 / rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = positions[:, None].double() * inverse
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device, torch.int32)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions=positions.to(device),
        cos=angles.cos().to(device, dtype),
        sin=angles.sin().to(device, dtype),
        buckets=buckets,
        restore=restore.to(device),
    )
