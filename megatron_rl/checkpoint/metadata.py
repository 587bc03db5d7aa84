"""This module reads the `.metadata` of a distributed checkpoint: which tensors there are, and in which file each of
their chunks lies.

It is a pickle of torch's classes. We read records from it (checkpoint/pickles.py), check them, and make torch's objects
of what is needed.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rl.checkpoint.pickles import DTYPES, Ignored, Known, Record, open_regular, record, unpickle
from megatron_rl.errors import Fault

METADATA = ".metadata"

# These objects are read.
_Metadata, _Index, _Place = record("Metadata"), record("MetadataIndex"), record("StorageInfo")
_Tensor, _Properties, _Chunk, _Bytes = record("Tensor"), record("TensorProperties"), record("Chunk"), record("Bytes")

_DCP = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_KNOWN: Known = {
    **DTYPES,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): Ignored,
    (f"{_DCP}.metadata", "Metadata"): _Metadata,
    (f"{_DCP}.metadata", "MetadataIndex"): _Index,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_DCP}.metadata", "TensorProperties"): _Properties,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): _Bytes,
    (f"{_DCP}.filesystem", "_StorageInfo"): _Place,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): Ignored,
    (f"{_DCP}.metadata", "StorageMeta"): Ignored,
    # The path where it was written. Python has moved the class.
    ("pathlib", "PosixPath"): Ignored,
    ("pathlib._local", "PosixPath"): Ignored,
    # Plans of saving, which Megatron may keep for the next save.
    **{(f"{_DCP}.planner", name): Ignored for name in ("SavePlan", "WriteItem", "WriteItemType")},
    **{(f"{_DCP}.planner", name): Ignored for name in ("TensorWriteData", "BytesIOWriteData")},
    (f"{_DCP}.filesystem", "_StoragePrefix"): Ignored,
    # megatron-core 0.15 and earlier wrote these.
    (_MEGATRON, "MCoreMetadata"): _Metadata,
    (_MEGATRON, "MCoreSavePlan"): Ignored,
}


def read_metadata(folder: Path) -> Metadata:
    """Read all of it except what only a save needs. Fault when it could run a program, ValueError when it is damaged or
    names a file that is missing or too short."""
    path = folder / METADATA
    if not path.exists():
        raise ValueError(f"{folder} holds no {METADATA}; the checkpoint is not whole")
    try:
        with open_regular(path) as file:
            metadata = _metadata(unpickle(file.read(), _KNOWN, str(path)))
    except Fault:
        raise
    except Exception as error:  # a damaged pickle may end in any
        raise ValueError(f"{path} cannot be read ({error}); the checkpoint is damaged") from None
    _check_files(folder, metadata)
    return metadata


def _check_files(folder: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; the checkpoint is not whole")
        if path.stat().st_size < end:
            raise ValueError(f"{path} has {path.stat().st_size} bytes of at least {end}; it was cut off")


def _metadata(found: Any) -> Metadata:
    state = _state(found, _Metadata)
    entries = {_text(name): _entry(entry) for name, entry in state["state_dict_metadata"].items()}
    places = {_index(index): _place(place) for index, place in state["storage_data"].items()}
    for name, entry in entries.items():
        for chunk in entry.chunks if isinstance(entry, TensorStorageMetadata) else [None]:
            if MetadataIndex(name, chunk and chunk.offsets) not in places:
                raise ValueError(f"it does not say where {name} lies")
    return Metadata(state_dict_metadata=entries, storage_data=places, storage_meta=StorageMeta())


def _entry(found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(found) is _Bytes:
        return BytesStorageMetadata()
    state = _state(found, _Tensor)
    size = _size(state["size"])
    dtype = _state(state["properties"], _Properties)[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no type")
    chunks = [_chunk(chunk, len(size)) for chunk in state["chunks"]]
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=chunks)


def _chunk(found: Any, num_dimensions: int) -> ChunkStorageMetadata:
    state = _state(found, _Chunk)
    offsets, sizes = _size(state["offsets"]), _size(state["sizes"])
    if not len(offsets) == len(sizes) == num_dimensions:
        raise ValueError(f"a chunk at {tuple(offsets)} of size {tuple(sizes)} in {num_dimensions} dimensions")
    return ChunkStorageMetadata(offsets=offsets, sizes=sizes)


def _index(found: Any) -> MetadataIndex:
    state = _state(found, _Index)
    offset, index = state.get("offset"), state.get("index")
    return MetadataIndex(
        _text(state["fqn"]), None if offset is None else _size(offset), None if index is None else _number(index)
    )


def _place(found: Any) -> _StorageInfo:
    state = _state(found, _Place)
    name = _text(state["relative_path"])
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"it names the file {name!r}, which is not in the same folder")
    if state.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed, which is not supported")
    return _StorageInfo(name, _number(state["offset"]), _number(state["length"]))


def _state(found: Any, kind: type[Record]) -> Any:
    if type(found) is not kind:
        raise ValueError(f"a {type(found).__name__} where a {kind.__name__} belongs")
    return found.state


def _size(found: Any) -> torch.Size:
    if type(found) is not torch.Size or any(number < 0 for number in found):
        raise ValueError(f"a {type(found).__name__} is no shape")
    return found


def _text(found: Any) -> str:
    if type(found) is not str:
        raise ValueError(f"a {type(found).__name__} where a name belongs")
    return found


def _number(found: Any) -> int:
    if type(found) is not int or found < 0:
        raise ValueError(f"a {type(found).__name__} where a number of bytes or chunks belongs, 0 or more")
    return found
