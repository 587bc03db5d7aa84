"""This module reads and writes Hugging Face directories of safetensors tensor by tensor. Nothing is unpickled."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.checkpoint.adapters import NOTE
from megatron_rl.checkpoint.checksums import CHECKSUMS
from megatron_rl.checkpoint.epochs import SFT_NOTE
from megatron_rl.checkpoint.names import TensorMapping
from megatron_rl.families import Architecture, family_of, tensor_shapes
from megatron_rl.families.fields import FURTHER_TOKENS
from megatron_rl.files import INDEX, indexed_names, model_files, open_model_file
from megatron_rl.parsing import parse_json
from megatron_rl.tensor_bytes import as_bytes

# Files beside the weights with these endings are copied along, byte for byte.
COMPANIONS = (".json", ".jinja", ".py", ".model", ".txt")
# The types by the names of a safetensors header.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float64: "F64"}


class HfCheckpoint:
    """Is a `Checkpoint` (checkpoint/read.py) of safetensors files, which are mapped into memory."""

    def __init__(self, directory: Path, model: Architecture) -> None:
        """Open the directory. ValueError names a file that cannot be read, and the tensors that are missing, left over,
        there twice or of another shape or type than config.json says."""
        self.directory = directory
        self.dtypes: dict[str, torch.dtype] = {}
        self._where: dict[str, Any] = {}
        files: dict[str, Path] = {}
        for path in _weight_files(directory):
            try:
                path.open("rb").close()  # safetensors says that there is no such file where it may not be read
            except OSError as error:
                raise ValueError(f"{path} cannot be opened: {error.strerror}; mend that first") from None
            try:
                handle: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read as safetensors: {error}; fetch it again") from None
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no dict
                if name in self._where:
                    raise ValueError(f"tensor {name} is in {files[name].name} and in {path.name} of {directory}")
                self._where[name], files[name] = handle, path
        shapes = tensor_shapes(model)
        self._leave_out_copies(model)
        check_names(set(shapes), set(self._where), str(directory))
        for name, shape in shapes.items():
            found = self._where[name].get_slice(name)
            if tuple(found.get_shape()) != shape:
                raise ValueError(
                    f"{files[name]}: tensor {name} has shape {tuple(found.get_shape())}; config.json says {shape}"
                )
            if found.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{files[name]}: tensor {name} is {found.get_dtype()}; it must be one of {', '.join(DTYPES)}"
                )
            self.dtypes[name] = DTYPES[found.get_dtype()]

    def _leave_out_copies(self, model: Architecture) -> None:
        """Forget what some files hold beside the weights: a head that is the embedding, and what is left out anyway.
        ValueError for a head that is another one though config.json says that it is tied."""
        names = family_of(model).tensors
        for name in [name for name in self._where if names.is_left_out(name, model)]:
            del self._where[name]
        if model.tie_word_embeddings and names.head in self._where and names.embedding in self._where:
            if not torch.equal(self.read(names.head), self.read(names.embedding)):
                raise ValueError(f"{self.directory}: {names.not_tied}")
            del self._where[names.head]

    def read(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def close(self) -> None:
        self._where.clear()

    def __enter__(self) -> "HfCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def has_weights(directory: Path) -> bool:
    return any(directory.glob("*.safetensors")) or (directory / INDEX).exists()


def _weight_files(directory: Path) -> list[Path]:
    """List the files that the index names, or all of them where there is no index."""
    found, names = model_files(directory), indexed_names(directory)
    if names is None:
        return [file for file in found if file.suffix == ".safetensors"]
    for name in names:
        if directory / name not in found:
            raise ValueError(f"{directory / INDEX} names {name}, which is missing; fetch it again")
    return [directory / name for name in names]


def check_names(expected: set[str], found: set[str], where: str) -> None:
    """Check that every expected name was found, and nothing else. ValueError lists the first few of each kind."""
    missing, left_over = sorted(expected - found), sorted(found - expected)
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", left_over))
        if names
    ]
    if problems:
        raise ValueError(f"{where}: tensors do not match its config.json: {'; '.join(problems)}")


# -- writing -------------------------------------------------------------------------------------------------------

TensorInfo = tuple[str, tuple[int, ...], torch.dtype]


class SafetensorsWriter:
    """Writes one safetensors file, tensor by tensor, in the order that was announced. Use it in a `with` block.

    safetensors' own writer needs all of them at once.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorInfo]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape, dtype in tensors:
            start, end = end, end + num_bytes(shape, dtype)
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._expected = iter(tensors)
        self.file: BinaryIO = path.open("wb")
        self.file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        assert (name, tuple(tensor.shape), tensor.dtype) == next(self._expected), name
        self.file.write(as_bytes(tensor))

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        """Close the file. It is on disk afterwards, unless the block failed."""
        with self.file:
            if failure is None:
                assert next(self._expected, None) is None
                self.file.flush()
                os.fsync(self.file.fileno())


def divide_into_shards(tensors: Sequence[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Divide consecutive tensors into files of at most `max_bytes`. A tensor that alone is larger has a file of its
    own."""
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for tensor in tensors:
        size = num_bytes(*tensor[1:])
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def write_shard(
    directory: Path, rank: int, expected: Sequence[TensorInfo], tensors: Iterable[tuple[str, Tensor]]
) -> list[str]:
    """Write one rank's tensors as `model-RANK.safetensors`, each as it comes. Return their names.

    expected: what will come, in order. No file is written for no tensors.
    """
    if not expected:
        for _ in tensors:  # collective: this rank takes part in what others write
            raise AssertionError("a tensor came that was not expected")
        return []
    with SafetensorsWriter(directory / shard_file(rank), expected) as file:
        for name, tensor in tensors:
            file.write(name, tensor.cpu())
    return [name for name, _, _ in expected]


def shard_file(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def write_index(directory: Path, names_by_shard: list[list[str]], table: dict[str, TensorMapping]) -> None:
    """Write the index of all shards; ValueError when a tensor is in none or in two."""
    weight_map: dict[str, str] = {}
    for number, names in enumerate(names_by_shard):
        for name in names:
            if name in weight_map:
                raise ValueError(f"{directory}: tensor {name} was written twice")
            weight_map[name] = shard_file(number)
    check_names({name for entry in table.values() for name in entry.hf}, set(weight_map), str(directory))
    (directory / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1, sort_keys=True), encoding="utf-8"
    )


def copy_companions(source: Path, destination: Path, dtype: torch.dtype | None = None, **changes: Any) -> None:
    """Copy config.json, tokenizer files, chat template and code files, but nothing that tells of the weights of
    `source`. `dtype` replaces config.json's torch_dtype (transformers 5: dtype), and `changes` replaces other fields.
    Layers that predict further tokens have no tensors in what is written, so config.json has none there. Where nothing
    differs it stays byte for byte. ValueError, before any file is copied, for one that leads out of `source`."""
    for name in _companions(source):
        with open_model_file(source, name) as content, (destination / name).open("wb") as copy:
            shutil.copyfileobj(content, copy)
    config = parse_json((destination / "config.json").read_bytes())
    if dtype is not None:
        names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
        changes |= dict.fromkeys(names, str(dtype).removeprefix("torch."))
    if config.get(FURTHER_TOKENS):
        changes[FURTHER_TOKENS] = 0
    if any(config.get(name) != value for name, value in changes.items()):
        (destination / "config.json").write_text(json.dumps(config | changes, indent=2), encoding="utf-8")


def changed_companions(source: Path, copied: Path) -> list[str]:
    """Name the files of `source` that `copy_companions` copied and that are others by now, but for config.json."""
    names = {name for directory in (source, copied) for name in _companions(directory)} - {"config.json"}
    return sorted(name for name in names if _content(source / name) != _content(copied / name))


def _companions(directory: Path) -> list[str]:
    of_weights = ("driver.json", CHECKSUMS, SFT_NOTE, NOTE)
    names = [file.name for file in model_files(directory) if file.suffix in COMPANIONS]
    return [name for name in names if not name.endswith(".index.json") and name not in of_weights]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
