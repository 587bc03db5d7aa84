"""This module holds pairs of inverse reshapes between Hugging Face tensors and Megatron's full and sharded tensors.

Every layout has four functions, two pairs of inverses:

    merge(hf tensors)  -> the full Megatron tensor (as at tensor-parallel size 1, vocabulary unpadded)
    split(full)        -> the Hugging Face tensors
    shard(full, r, n)  -> what tensor-parallel rank r of n holds
    unshard(shards)    -> the full Megatron tensor; a single shard is not copied

Legend: H hidden, D head_dim, Nq query heads, Nk key-value heads, I intermediate, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TensorLayout(Protocol):
    """Converts a parameter between its layouts. interleaves: rows of one Hugging Face tensor do not lie together in the
    full one, so that all of the Hugging Face tensors are needed."""

    @property
    def interleaves(self) -> bool: ...
    def merge(self, tensors: Sequence[Tensor]) -> Tensor: ...
    def split(self, full: Tensor) -> tuple[Tensor, ...]: ...
    def shard(self, full: Tensor, rank: int, size: int) -> Tensor: ...
    def unshard(self, shards: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Replicated:
    """Is the layout of one tensor that is the same on every tensor-parallel rank (norms, router)."""

    @property
    def interleaves(self) -> bool:
        return False

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor

    def split(self, full: Tensor) -> tuple[Tensor, ...]:
        return (full,)

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True, slots=True)
class Chunked(Replicated):
    """Is the layout of one tensor that is cut into equal chunks along `dim` (row-parallel linear layers: 1)."""

    dim: int

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, self.dim)[rank]

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), self.dim) if len(shards) > 1 else shards[0]


@dataclass(frozen=True, slots=True)
class GroupedQkv(Chunked):
    """Maps [all Q | all K | all V] rows <-> ([Nq/Nk query heads, K, V] per key-value head) rows; both [(Nq+2Nk)*D, H].

    separate: Q, K and V are three Hugging Face tensors. Biases have no H.
    """

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    separate: bool = False

    @property
    def interleaves(self) -> bool:
        return True

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        q_rows, kv_rows = self.num_query_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = tensors if self.separate else tensors[0].split([q_rows, kv_rows, kv_rows])
        by_group = [part.unflatten(0, (self.num_kv_heads, -1)) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def split(self, full: Tensor) -> tuple[Tensor, ...]:
        per_group = self.num_query_heads // self.num_kv_heads * self.head_dim
        groups = full.unflatten(0, (self.num_kv_heads, -1)).split([per_group, self.head_dim, self.head_dim], dim=1)
        parts = tuple(part.flatten(0, 1) for part in groups)
        return parts if self.separate else (torch.cat(parts),)


@dataclass(frozen=True, slots=True)
class GateUp:
    """Maps gate_proj [I, H] and up_proj [I, H] <-> linear_fc1 [2I, H]. Each rank holds [its gate rows; its up rows].

    separate: the two are two Hugging Face tensors; else one, with the rows of linear_fc1.
    """

    separate: bool = True

    @property
    def interleaves(self) -> bool:
        return False

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors)) if self.separate else tensors[0]

    def split(self, full: Tensor) -> tuple[Tensor, ...]:
        return full.chunk(2) if self.separate else (full,)

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        gate, up = full.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        if len(shards) == 1:
            return shards[0]
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])


@dataclass(frozen=True, slots=True)
class Vocabulary(Replicated):
    """Is the layout of [V, H], with rows padded with zeros so that every tensor-parallel rank holds equally many."""

    vocab_size: int

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        rows = -(-self.vocab_size // size)
        mine = full[rank * rows : (rank + 1) * rows]
        return torch.cat([mine, mine.new_zeros(rows - len(mine), *mine.shape[1:])]) if len(mine) < rows else mine

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        full = torch.cat(list(shards)) if len(shards) > 1 else shards[0]
        return full[: self.vocab_size]
