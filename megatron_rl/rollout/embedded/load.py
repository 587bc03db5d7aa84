"""Reads a Hugging Face directory into packed weights."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.families import Architecture, family_of, load_architecture, tensor_shapes
from megatron_rl.files import indexed_names
from megatron_rl.rollout.embedded.packing import Packing
from megatron_rl.rollout.embedded.weights import ModelWeights, some


def load_weights(model_dir: str | Path, config: Architecture, dtype: torch.dtype) -> ModelWeights:
    """Read, check and pack a directory for a model of shape `config`.

    A config.json in the directory must describe the same architecture; a directory of tensors alone is fine.
    """
    if (Path(model_dir) / "config.json").is_file():
        _require_same_architecture(config, load_architecture(model_dir), model_dir)
    return read_packed(model_dir, config, dtype)


def _require_same_architecture(ours: Architecture, theirs: Architecture, model_dir: str | Path) -> None:
    for name, (value, other) in ours.differences(theirs).items():
        raise ValueError(f"{name} of {model_dir}/config.json must be {value!r} as in the served model, got {other!r}")


def read_packed(model_dir: str | Path, config: Architecture, dtype: torch.dtype) -> ModelWeights:
    """Read all tensors of the directory, each exactly once, names, shapes and values checked against `config`.

    Raises ValueError, which names what is wrong. Nothing is unpickled: only `*.safetensors` files are opened.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ValueError(f"model_path {str(model_dir)!r} is not a directory")
    indexed = indexed_names(directory)
    files = sorted(directory.glob("*.safetensors")) if indexed is None else [directory / name for name in indexed]
    if not files:
        raise ValueError(f"model_path {str(model_dir)!r} holds no *.safetensors file")
    expected, names = tensor_shapes(config), family_of(config).tensors
    packing = Packing(config, dtype)
    copied_head: Tensor | None = None  # that some files hold of a tied model
    for path in files:
        try:
            with _regular(path) as opened, safe_open(opened, framework="pt") as file:
                found = [name for name in file.keys() if not names.is_left_out(name, config)]  # noqa: SIM118 - no dict
                if config.tie_word_embeddings and names.head in found:
                    found.remove(names.head)
                    copied_head = file.get_tensor(names.head)
                unknown = sorted(set(found) - expected.keys())
                if unknown:
                    raise ValueError(f"{len(unknown)} tensors are unknown to this model: {some(unknown)}")
                for name in found:
                    packing.put(name, file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    try:
        weights = packing.finish()
        if copied_head is not None and not torch.equal(copied_head.to(dtype), weights.embedding):
            raise ValueError(names.not_tied)
        return weights
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


@contextmanager
def _regular(path: Path) -> Iterator[str]:
    """Yield a name by which the file that was looked at here can be opened. Raise ValueError for what is no regular
    file: to open a FIFO waits for a writer, and safetensors keeps the interpreter's lock meanwhile, so nothing else
    would run."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it must be a regular file, which it is not")
        yield f"/dev/fd/{descriptor}"
    finally:
        os.close(descriptor)
