"""Either kind of checkpoint, read tensor by tensor under Hugging Face names."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.checkpoint.distributed import MEGATRON, DistributedCheckpoint
from megatron_rl.checkpoint.hf import HfCheckpoint, has_weights
from megatron_rl.checkpoint.newest import newest
from megatron_rl.families import Architecture, load_architecture

# Shows the progress of a job of so many bytes: what the block gets is told the bytes of every tensor as it passes.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_progress(total: int) -> Iterator[Callable[[int], None]]:
    del total
    yield lambda num_bytes: None


class Checkpoint(Protocol):
    """directory: where config.json, the tokenizer and the other companion files are. dtypes: of every tensor, by
    Hugging Face name."""

    directory: Path
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor:
        """One tensor. It may alias a mapped file: do not write into it."""

    def close(self) -> None: ...

    def __enter__(self) -> "Checkpoint": ...

    def __exit__(self, *_: object) -> None: ...


def open_checkpoint(path: Path, model: Architecture | None = None) -> Checkpoint:
    """Open a Hugging Face directory, a converted one, a `step_N` of a run, or a run (its newest checkpoint).

    model: what its config.json says, if that has been read. ValueError names what is wrong with the directory.
    """
    directory = resolve(Path(path))
    model = model or load_architecture(directory)
    if (directory / MEGATRON).is_dir():
        return DistributedCheckpoint(directory, model)
    if not has_weights(directory):
        raise ValueError(
            f"{path} holds neither *.safetensors nor a {MEGATRON}/ folder; it must be a Hugging Face directory, a "
            "converted one or a checkpoint of a run"
        )
    return HfCheckpoint(directory, model)


def resolve(path: Path) -> Path:
    """The newest checkpoint of a run directory; other directories are themselves."""
    return newest(path / "checkpoints") or path
