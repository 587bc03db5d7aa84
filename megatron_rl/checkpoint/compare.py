"""This module compares two checkpoints of either kind, tensor by tensor."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.checkpoint.hf import num_bytes
from megatron_rl.checkpoint.read import Progress, no_progress, open_checkpoint
from megatron_rl.families import load_architecture, tensor_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Describes the difference of one tensor: the largest absolute difference (infinite where one value is not finite
    and the other differs), and how many values differ at all."""

    name: str
    largest: float
    num_values: int


def compare(first: Path, second: Path, progress: Progress = no_progress) -> tuple[list[Difference], int]:
    """Return the tensors that differ, in the order of the model, and how many there are. ValueError where the sets of
    tensors or their shapes differ.

    Values are compared in fp32, so a checkpoint in bf16 and its copy in fp32 are equal. Equal NaNs are equal.
    """
    found = []
    with open_checkpoint(first) as a, open_checkpoint(second) as b:
        if a.dtypes.keys() != b.dtypes.keys():
            names = sorted(a.dtypes.keys() ^ b.dtypes.keys())
            raise ValueError(f"{first} and {second} are different models: only one has {', '.join(names[:3])}")
        shapes = tensor_shapes(load_architecture(a.directory))
        with progress(sum(num_bytes(shapes[name], dtype) for name, dtype in a.dtypes.items())) as advance:
            for name in a.dtypes:
                x, y = a.read(name), b.read(name)
                if x.shape != y.shape:
                    raise ValueError(f"{name} has shape {tuple(x.shape)} in {first} and {tuple(y.shape)} in {second}")
                difference = _difference(name, x, y)
                if difference.num_values:
                    found.append(difference)
                advance(x.nbytes)
        return found, len(a.dtypes)


def _difference(name: str, x: Tensor, y: Tensor) -> Difference:
    if x.dtype == y.dtype and torch.equal(x, y):
        return Difference(name=name, largest=0.0, num_values=0)
    x, y = x.float(), y.float()
    differs = ~((x == y) | (x.isnan() & y.isnan()))
    if not bool(differs.any()):
        return Difference(name=name, largest=0.0, num_values=0)
    largest = (x - y)[differs].abs().nan_to_num(torch.inf, torch.inf).max()
    return Difference(name=name, largest=float(largest), num_values=int(differs.sum()))
