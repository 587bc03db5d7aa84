"""Divides weights into pieces of bounded size: which Hugging Face tensors travel together, and where each lies in its
bucket."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_rl.checkpoint.hf import num_bytes
from megatron_rl.checkpoint.names import TensorMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Says where one Hugging Face tensor lies: bytes [start, end) of its bucket."""

    name: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Holds consecutive parameters of the name table, all of one type. places: of each entry's tensors, in order and
    end to end."""

    dtype: torch.dtype
    entries: tuple[TensorMapping, ...]
    places: tuple[tuple[Place, ...], ...]

    @property
    def num_bytes(self) -> int:
        return self.places[-1][-1].end

    @property
    def tensors(self) -> list[Place]:
        return [place for places in self.places for place in places]

    def runs(self, owner_of: dict[str, int]) -> list[tuple[int, int, int]]:
        """Return (rank, start, end) of the pieces that one rank after the other exports, as long as possible."""
        found: list[tuple[int, int, int]] = []
        for entry, places in zip(self.entries, self.places, strict=True):
            owner, start, end = owner_of[entry.megatron], places[0].start, places[-1].end
            if found and found[-1][0] == owner:
                start = found.pop()[1]
            found.append((owner, start, end))
        return found


def divide(entries: Iterable[TensorMapping], dtype: torch.dtype, max_bytes: int) -> list[Bucket]:
    """Put every entry into a bucket, in order, but those first that are float32 in a model of another `dtype`.

    No bucket is above `max_bytes` unless one parameter alone is.
    """
    ordered = sorted(entries, key=lambda entry: entry.dtype(dtype) == dtype)
    buckets: list[Bucket] = []
    members: list[TensorMapping] = []
    used = 0
    for entry in ordered:
        own = entry.dtype(dtype)
        size = sum(num_bytes(shape, own) for shape in entry.hf_shapes)
        if members and (used + size > max_bytes or members[-1].dtype(dtype) != own):
            buckets.append(_bucket(members, dtype))
            members, used = [], 0
        members.append(entry)
        used += size
    return [*buckets, _bucket(members, dtype)] if members else buckets


def _bucket(entries: Sequence[TensorMapping], of_model: torch.dtype) -> Bucket:
    dtype = entries[0].dtype(of_model)
    places = []
    end = 0
    for entry in entries:
        of_entry = []
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True):
            start, end = end, end + num_bytes(shape, dtype)
            of_entry.append(Place(name=name, shape=shape, start=start, end=end))
        places.append(tuple(of_entry))
    return Bucket(dtype=dtype, entries=tuple(entries), places=tuple(places))
