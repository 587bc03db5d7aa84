"""Reading and writing Hugging Face directories of safetensors: names and shapes are checked, nothing is unpickled."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.checkpoint.names import Mapping

# What a model directory carries beside its weights, copied along byte for byte.
COMPANIONS = ("*.json", "*.jinja", "*.py", "*.model", "*.txt")
INDEX = "model.safetensors.index.json"


class HfReader:
    """Tensors of a directory by name, read when asked for. Close it, or use it in a `with` block."""

    def __init__(self, model_dir: str | Path, table: dict[str, Mapping]) -> None:
        """ValueError lists the tensors that are missing, left over or of another shape than config.json says."""
        self.model_dir = Path(model_dir)
        files = sorted(self.model_dir.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{model_dir} holds no *.safetensors; it must be a Hugging Face model directory")
        self._files: list[Any] = [safe_open(file, framework="pt") for file in files]
        self._where: dict[str, Any] = {}
        for handle, path in zip(self._files, files, strict=True):
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no dict
                if name in self._where:
                    raise ValueError(f"{path}: tensor {name} is in more than one file of {model_dir}")
                self._where[name] = handle
        expected = {name: entry.hf_shape for entry in table.values() for name in entry.hf}
        check_names(set(expected), set(self._where), str(model_dir))
        for name, shape in expected.items():
            found = tuple(self._where[name].get_slice(name).get_shape())
            if found != shape:
                raise ValueError(f"{model_dir}: tensor {name} has shape {found}; config.json says {shape}")

    def read(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def __enter__(self) -> "HfReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._where.clear()
        self._files.clear()


def check_names(expected: set[str], found: set[str], where: str) -> None:
    """Every expected name found, and nothing else; ValueError lists the first few of each kind."""
    missing, left_over = sorted(expected - found), sorted(found - expected)
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", left_over))
        if names
    ]
    if problems:
        raise ValueError(f"{where}: tensors do not match the BailingMoE of its config.json: {'; '.join(problems)}")


def write_shard(directory: Path, rank: int, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Write one rank's tensors as `model-RANK.safetensors`; returns their names. Writes no file for no tensors."""
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors}
    if state:
        save_file(state, directory / shard_file(rank), metadata={"format": "pt"})
    return list(state)


def shard_file(rank: int) -> str:
    return f"model-{rank:05d}.safetensors"


def write_index(directory: Path, names_by_rank: list[list[str]], table: dict[str, Mapping]) -> None:
    """Write the index of all shards; ValueError when a tensor was written by no rank or by two."""
    weight_map: dict[str, str] = {}
    for rank, names in enumerate(names_by_rank):
        for name in names:
            if name in weight_map:
                raise ValueError(f"{directory}: tensor {name} was written twice")
            weight_map[name] = shard_file(rank)
    check_names({name for entry in table.values() for name in entry.hf}, set(weight_map), str(directory))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1, sort_keys=True))


def copy_companions(source: Path, destination: Path, dtype: torch.dtype) -> None:
    """config.json, tokenizer files, chat template and code files; config.json's torch_dtype becomes `dtype`."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, destination / file.name)
    config = json.loads((source / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    if config.get("torch_dtype") != name:
        (destination / "config.json").write_text(json.dumps(config | {"torch_dtype": name}, indent=2))


def replace_directory(source: Path, destination: Path) -> None:
    """Rename `source` to `destination`; an old `destination` is moved aside first and deleted after."""
    os.chmod(source, 0o755)
    old = destination.with_name(f".{destination.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.rename(old)
    source.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


Reader = Callable[[str], Tensor]


def read_full(entry: Mapping, read: Reader) -> Tensor:
    """The full Megatron tensor of one table entry."""
    return entry.layout.merge([read(name) for name in entry.hf])
