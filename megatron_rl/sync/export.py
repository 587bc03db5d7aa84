"""Exports Megatron shards as Hugging Face-named tensors, and as directories of them."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.checkpoint.hf import copy_companions, write_index, write_shard
from megatron_rl.checkpoint.names import TensorMapping, name_table
from megatron_rl.errors import SharedFault
from megatron_rl.files import replace_directory
from megatron_rl.model.build import Model, owns_export, tensor_group
from megatron_rl.sync.all_ranks import on_all_ranks
from megatron_rl.sync.buckets import Bucket


def value(parameter: Tensor) -> Tensor:
    """Return what is exported of a parameter: the parameter as it is, or merged with its adapter."""
    merged: Callable[[], Tensor] = getattr(parameter, "merged", parameter.detach)
    return merged()


def export_tensors(model: Model, read: Callable[[Tensor], Tensor] = value) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's share of the Hugging Face tensors: over all ranks every tensor comes exactly once.

    read: what is exported of each parameter; its `value`, or something of the same shape such as its gradient.

    The tensor-parallel shards of a parameter are gathered inside their group; pipeline stages and expert-parallel ranks
    export what they hold. Every rank must run this to its end: it is collective.
    """
    parameters = model.parameters_by_canonical_name()
    for entry, tensors in gathered(name_table(model.architecture).values(), parameters, read):
        yield from zip(entry.hf, tensors, strict=True)


def gathered(
    entries: Iterable[TensorMapping],
    parameters: Mapping[str, Tensor],
    read: Callable[[Tensor], Tensor] = value,
    takes_part: Callable[[TensorMapping], bool] = owns_export,
) -> Iterator[tuple[TensorMapping, tuple[Tensor, ...]]]:
    """Yield the Hugging Face tensors of those entries that this rank exports. Collective, see `export_tensors`.

    parameters: this rank's, by canonical name. takes_part: whether this rank's tensor group exports an entry; by
    default that of one replica of the model.
    """
    for entry in entries:
        parameter = parameters.get(entry.megatron)
        if parameter is None or not takes_part(entry):
            continue
        group = tensor_group(entry)
        shard = read(parameter)
        shards = [shard]
        if group.size() > 1:
            shards = [torch.empty_like(shard) for _ in range(group.size())]
            dist.all_gather(shards, shard.contiguous(), group=group)
        if group.rank() == 0:
            yield entry, entry.layout.split(entry.layout.unshard(shards))


def fill(flat: Tensor, bucket: Bucket, found: Iterable[tuple[TensorMapping, Sequence[Tensor]]]) -> None:
    """Put what `gathered` found of a bucket's entries into `flat`, uint8 [bytes of the bucket], each tensor at its
    place."""
    places = dict(zip((entry.megatron for entry in bucket.entries), bucket.places, strict=True))
    for entry, tensors in found:
        for place, tensor in zip(places[entry.megatron], tensors, strict=True):
            flat[place.start : place.end].view(bucket.dtype).view(place.shape).copy_(tensor)


def exported_names(model: Model, takes_part: Callable[[TensorMapping], bool] = owns_export) -> list[str]:
    """Return the canonical names of what `gathered` yields on this rank."""
    parameters = model.parameters_by_canonical_name()
    return [
        entry.megatron
        for entry in name_table(model.architecture).values()
        if entry.megatron in parameters and takes_part(entry) and tensor_group(entry).rank() == 0
    ]


def export_directory(
    model: Model, source: Path, destination: Path, control: Any, notes: dict[str, str] | None = None
) -> None:
    """Write a whole Hugging Face directory: one safetensors file per rank that owns tensors, index, companion files.

    source: the directory that config.json, tokenizer and code files are copied from. control: a gloo group of all
    ranks. notes: further files, text by name. The directory appears under its name only when complete. Every rank sees
    it when this returns; SharedFault on every rank when one of them could not write its part.
    """
    rank = dist.get_rank()
    partial = destination.with_name(f".{destination.name}.partial")
    table = name_table(model.architecture)
    expected = [
        (hf, shape, table[name].dtype(model.dtype))
        for name in exported_names(model)
        for hf, shape in zip(table[name].hf, table[name].hf_shapes, strict=True)
    ]
    names_by_shard: list[Any] = []

    def make() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> list[str]:
        tensors = export_tensors(model)
        try:
            return write_shard(partial, rank, expected, tensors)
        finally:
            for _ in tensors:  # the others of its groups are in the middle of it
                pass

    def finish() -> None:
        write_index(partial, names_by_shard, table)
        copy_companions(source, partial, model.dtype)
        for name, text in (notes or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        replace_directory(partial, destination)

    _on_all_ranks(make if rank == 0 else None, destination, control)
    names_by_shard += _on_all_ranks(write, destination, control)
    _on_all_ranks(finish if rank == 0 else None, destination, control)


def _on_all_ranks(work: Callable[[], Any] | None, destination: Path, control: Any) -> list[Any]:
    try:
        return on_all_ranks(work, control)
    except SharedFault as fault:
        raise SharedFault(
            f"weights could not be written to {destination} ({fault}); make room or set another place"
        ) from None
