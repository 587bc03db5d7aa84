"""This module reads and writes Megatron's distributed checkpoints (torch_dist) tensor by tensor, without megatron and
its ranks.

The format is torch's distributed checkpoint: `.metadata` (checkpoint/metadata.py), which says where every chunk of
every tensor lies, and `*.distcp` files of chunks, each written by `torch.save`. Megatron adds `metadata.json` and an
object `common_state`.
"""

import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_rl.checkpoint.hf import DTYPES, check_names
from megatron_rl.checkpoint.layout import Vocabulary
from megatron_rl.checkpoint.metadata import read_metadata
from megatron_rl.checkpoint.names import TensorMapping, hf_names, name_table
from megatron_rl.checkpoint.pickles import load_tensor
from megatron_rl.families import Architecture
from megatron_rl.files import model_files

# The folder of the checkpoint in a directory that also holds config.json and the tokenizer.
MEGATRON = "megatron"
_COMMON_STATE = "common_state/shard_0_1"


class DistributedCheckpoint:
    """Is a `Checkpoint` (checkpoint/read.py) in `directory/megatron`, of any parallel layout. Optimizer state is passed
    over. One chunk is in memory at a time, beside the tensor that is read."""

    def __init__(self, directory: Path, model: Architecture, table: dict[str, TensorMapping] | None = None) -> None:
        """Open the checkpoint. table: that of what it holds; None for the weights of the model. ValueError for files
        that are missing, too short or outside of the directory, and for tensors that are missing, left over or of
        another shape than config.json says."""
        self.directory = directory
        self._folder = directory / MEGATRON
        model_files(directory, MEGATRON)  # none of them leads out of it
        self._metadata = read_metadata(self._folder)
        self._names = hf_names(name_table(model) if table is None else table)
        self._files: dict[str, Any] = {}
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: found
            for name, found in self._metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        check_names({entry.stored for entry, _ in self._names.values()}, set(self._tensors), str(self._folder))
        self.dtypes: dict[str, torch.dtype] = {}
        for name, (entry, _) in self._names.items():
            self._check(entry, model)
            self.dtypes[name] = self._tensors[entry.stored].properties.dtype

    def read(self, name: str) -> Tensor:
        entry, part = self._names[name]
        parts, offsets, sizes = next(piece for piece in entry.stored_pieces() if part in piece[0])
        # Rows of a padded vocabulary lie behind the last one.
        region = self._region(entry.stored, offsets, sizes)
        region = region[0] if entry.expert else region
        return region if len(parts) < len(entry.hf) else entry.layout.split(region)[part]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> "DistributedCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _region(self, key: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return the part of a stored tensor from `start` on, put together from the chunks that overlap it."""
        stored = self._tensors[key]
        result, num_found = torch.empty(tuple(shape), dtype=stored.properties.dtype), 0
        for chunk in stored.chunks:
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                tensor = self._load(key, chunk)
                if tuple(chunk.offsets) == tuple(start) and tuple(chunk.sizes) == tuple(shape):
                    return tensor
                here = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
                there = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, chunk.offsets, strict=True))
                result[here] = tensor[there]
                num_found += result[here].numel()
        if num_found != result.numel():
            raise ValueError(
                f"{self._folder}: {num_found} of the {result.numel()} values of {key} from {tuple(start)} on are there"
            )
        return result

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        if info.relative_path not in self._files:
            self._files[info.relative_path] = (self._folder / info.relative_path).open("rb")
        file = self._files[info.relative_path]
        file.seek(info.offset)
        where = f"{self._folder / info.relative_path}: {key}"
        return load_tensor(file.read(info.length), chunk.sizes, where)

    def _check(self, entry: TensorMapping, model: Architecture) -> None:
        found = self._tensors[entry.stored]
        expected = entry.stored_shape(model.num_experts)
        size = tuple(found.size)
        padded = isinstance(entry.layout, Vocabulary) and size[0] >= expected[0] and size[1:] == expected[1:]
        if size != expected and not padded:
            raise ValueError(f"{self._folder}: {entry.stored} has shape {size}; config.json says {expected}")
        if found.properties.dtype not in DTYPES.values():
            raise ValueError(f"{self._folder}: {entry.stored} is {found.properties.dtype}, which is not supported")


# -- writing -------------------------------------------------------------------------------------------------------


def write_distributed(
    folder: Path,
    model: Architecture,
    dtypes: dict[str, torch.dtype],
    read: Callable[[str], Tensor],
    max_file_bytes: int,
) -> None:
    """Write a model checkpoint that megatron's `dist_checkpointing.load` opens in any parallel layout.

    read: gives a tensor by its Hugging Face name, of the type in `dtypes`. It is called once for each, when that is
    written.
    """
    folder.mkdir(parents=True)
    planner = _Planner(name_table(model), model, dtypes, read)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose
        try:
            dcp.save({}, storage_writer=_Writer(folder, max_file_bytes), planner=planner, no_dist=True)
        except dcp.CheckpointException as error:  # around whatever was raised in it, Ctrl-C too
            raise next(iter(error.failures.values()))[0] from None
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}), encoding="utf-8"
    )


class _Planner(SavePlanner):
    """Plans one chunk for every Hugging Face tensor, and makes it when it is about to be written."""

    def __init__(
        self,
        table: dict[str, TensorMapping],
        model: Architecture,
        dtypes: dict[str, torch.dtype],
        read: Callable[[str], Tensor],
    ) -> None:
        self._read = read
        self._source: dict[MetadataIndex, tuple[TensorMapping, tuple[int, ...]]] = {}
        items = [WriteItem(index=MetadataIndex(_COMMON_STATE), type=WriteItemType.BYTE_IO)]
        for entry in table.values():
            for parts, offsets, sizes in entry.stored_pieces():
                index = MetadataIndex(entry.stored, torch.Size(offsets))
                self._source[index] = (entry, parts)
                data = TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)),
                    properties=TensorProperties(dtype=_one_dtype([entry.hf[part] for part in parts], dtypes)),
                    size=torch.Size(entry.stored_shape(model.num_experts)),
                )
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self._plan = SavePlan(items)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        del state_dict, storage_meta, is_coordinator

    def create_local_plan(self) -> SavePlan:
        return self._plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([{}], empty)
            return empty
        entry, parts = self._source[write_item.index]
        tensors = [self._read(entry.hf[part]) for part in parts]
        tensor = entry.layout.merge(tensors) if len(parts) == len(entry.hf) else tensors[0]
        tensor = tensor[None] if entry.expert else tensor
        # torch.save writes the whole storage, which of a mapped tensor is the file.
        return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor.contiguous()


class _Writer(dcp.FileSystemWriter):
    """Writes chunks to files. torch's writer keeps every tensor that it has written until the file is closed; this one
    keeps none."""

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        super().__init__(folder)
        self._folder, self._max_file_bytes = folder, max_file_bytes

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        file, name = None, ""
        try:
            for item in plan.items:
                data = planner.resolve_data(item)
                if file is None or file.tell() + _num_bytes(data) > self._max_file_bytes:
                    _close(file)
                    name = f"__0_{0 if file is None else int(name[4:-7]) + 1}.distcp"
                    file = (self._folder / name).open("wb")
                offset = file.tell()
                if isinstance(data, io.BytesIO):
                    file.write(data.getbuffer())
                else:
                    torch.save(data, file)
                length = file.tell() - offset
                results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
        finally:
            _close(file)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _one_dtype(names: Sequence[str], dtypes: dict[str, torch.dtype]) -> torch.dtype:
    found = {dtypes[name] for name in names}
    if len(found) > 1:
        told = ", ".join(f"{name} is {dtypes[name]}" for name in names)
        raise ValueError(f"{told}; they become one tensor, so convert them to one type (--dtype)")
    return found.pop()


def _num_bytes(data: Tensor | io.BytesIO) -> int:
    return data.getbuffer().nbytes if isinstance(data, io.BytesIO) else data.nbytes


def _close(file: Any) -> None:
    if file is not None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
