"""This module reads either kind of checkpoint, tensor by tensor under Hugging Face names."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.checkpoint.adapters import AdapterNote, merge, read_note, tensor_digests, weights_digest
from megatron_rl.checkpoint.distributed import MEGATRON, DistributedCheckpoint
from megatron_rl.checkpoint.hf import HfCheckpoint, has_weights
from megatron_rl.checkpoint.names import adapter_table, adapters
from megatron_rl.checkpoint.newest import newest
from megatron_rl.families import Architecture, load_architecture
from megatron_rl.hub import local_model

# Shows the progress of a job of so many bytes: what the block gets is told the bytes of every tensor as it passes.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_progress(total: int) -> Iterator[Callable[[int], None]]:
    del total
    yield lambda num_bytes: None


class Checkpoint(Protocol):
    """Reads a checkpoint of either kind. directory: where config.json, the tokenizer and the other companion files are.
    dtypes: those of every tensor, by Hugging Face name."""

    directory: Path
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor:
        """Read one tensor. It may alias a mapped file: do not write into it."""

    def close(self) -> None: ...

    def __enter__(self) -> "Checkpoint": ...

    def __exit__(self, *_: object) -> None: ...


class AdapterCheckpoint:
    """Reads a checkpoint of adapters as the model of merged weights (`merge`). The frozen weights are read from where
    the note says. It is a `Checkpoint`."""

    def __init__(self, directory: Path, model: Architecture, note: AdapterNote) -> None:
        """Open both checkpoints and read all frozen weights once for their digest.

        ValueError, beside those of the two checkpoints, when the frozen weights are gone or are others.
        """
        self.directory, self._scale = directory, note.lora.scale
        if not note.base.is_dir():
            raise ValueError(
                f"{directory} holds adapters of the weights at {note.base}, which is no folder here; put them back, or "
                "write where they are into base of its lora.json"
            )
        self._base = open_checkpoint(note.base, model)
        digest = weights_digest(tensor_digests(self._base))
        if digest != note.digest:
            raise ValueError(
                f"{directory} holds adapters of other weights than those at {note.base} (digest {note.digest}, got "
                f"{digest}); put back what was there"
            )
        self.dtypes = self._base.dtypes
        self._factors = DistributedCheckpoint(directory, model, adapter_table(model, note.lora))
        # The names of the two factors of each Hugging Face tensor.
        self._names = {
            weight: (adapter.a.hf[0], b)
            for adapter in adapters(model, note.lora).values()
            for weight, b in zip(adapter.weight.hf, adapter.b.hf, strict=True)
        }

    def read(self, name: str) -> Tensor:
        weight = self._base.read(name)
        if name not in self._names:
            return weight
        a, b = map(self._factors.read, self._names[name])
        return merge(weight, a, b, self._scale)

    def close(self) -> None:
        self._factors.close()
        self._base.close()

    def __enter__(self) -> "AdapterCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: Path, model: Architecture | None = None) -> Checkpoint:
    """Open a Hugging Face directory, a converted one, a `step_N` of a run, or a run (its newest checkpoint).

    model: what the checkpoint's config.json says, if that has been read. ValueError names what is wrong with the
    directory.
    """
    directory = resolve(Path(path))
    model = model or load_architecture(directory)
    if (note := read_note(directory)) is not None:
        return AdapterCheckpoint(directory, model, note)
    if (directory / MEGATRON).is_dir():
        return DistributedCheckpoint(directory, model)
    if not has_weights(directory):
        if pickled := sorted(directory.glob("pytorch_model*.bin")):
            raise ValueError(
                f"{path} has its weights in {pickled[0].name}, a pickle, which is not opened; write them as "
                "safetensors, in Python: transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW), "
                "with the tokenizer's files beside them"
            )
        raise ValueError(
            f"{path} holds neither *.safetensors nor a {MEGATRON}/ folder; it must be a Hugging Face directory, a "
            "converted one or a checkpoint of a run"
        )
    return HfCheckpoint(directory, model)


def resolve(path: Path) -> Path:
    """Return the newest checkpoint of a run directory, the folder of a `hub:` name, and any other directory itself."""
    path = local_model(path)
    return newest(path / "checkpoints") or path
