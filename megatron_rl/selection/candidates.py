"""Finds the model directories to choose from, and reads what the SFT run that wrote them says of them."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_rl.checkpoint.epochs import SFT_NOTE
from megatron_rl.families import load_architecture
from megatron_rl.parsing import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class SftRecord:
    """Holds what `megatron-rl sft` measured of the checkpoint of an epoch, in nats per token; None where it did not."""

    epoch: float | None = None
    step: float | None = None
    validation_loss: float | None = None
    validation_entropy: float | None = None
    train_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Holds a model directory to choose from. name: its directory's, and unique. sft: of its sft.json, with nothing in
    it where there is none."""

    name: str
    path: Path
    sft: SftRecord


def find_candidates(where: Path | Sequence[Path]) -> list[Candidate]:
    """Return the subdirectories of a folder in natural order, epoch_2 before epoch_10, or those listed, in their order.
    Hidden ones do not count: they are half-written.

    Raise ValueError where there is none, for one that servers could not load, one that is there twice, and two of one
    name.
    """
    if isinstance(where, Path):
        if not where.is_dir():
            raise ValueError(f"candidates {where} is not a folder; set it to the folder of the SFT run's epochs")
        found = (path for path in where.iterdir() if path.is_dir() and not path.name.startswith("."))
        paths = sorted(found, key=lambda path: natural_key(path.name))
    else:
        paths = list(where)
    if not paths:
        raise ValueError(
            f"candidates {where} holds no model directory; train some first"
            if isinstance(where, Path)
            else "candidates is an empty list; name model directories, or a folder of them"
        )
    for path in paths:
        _check_model(path)
    resolved = Counter(path.resolve() for path in paths)
    names = Counter(_name(path) for path in paths)
    for path in paths:
        if resolved[path.resolve()] > 1:
            raise ValueError(f"candidates hold {path.resolve()} more than once; each model once")
        if names[_name(path)] > 1:
            raise ValueError(
                f"{names[_name(path)]} candidates are called {_name(path)!r}, which names the files of their results; "
                "rename them, or list symbolic links of different names"
            )
    return [Candidate(name=_name(path), path=path, sft=read_sft_record(path)) for path in paths]


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers within names by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def read_sft_record(directory: Path) -> SftRecord:
    """Read a candidate's sft.json. Raise ValueError for a file that is no such record. Numbers that are not finite
    count as not measured."""
    path = directory / SFT_NOTE
    if not path.is_file():
        return SftRecord()
    try:
        row = read_json(path)
        names = [field.name for field in fields(SftRecord)]
        values = {name: float(row[name]) for name in names if row.get(name) is not None}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of an SFT run ({error}); remove it or put it right") from None
    return SftRecord(**{name: value for name, value in values.items() if math.isfinite(value)})


def _name(path: Path) -> str:
    return path.name or path.resolve().name


def _check_model(path: Path) -> None:
    """Check that servers can load a model. ValueError names the candidate and what is wrong with it."""
    if not path.is_dir():
        raise ValueError(f"candidate {path} is not a directory; correct candidates")
    try:
        load_architecture(path)
    except ValueError as error:
        raise ValueError(f"candidate {path} is no model directory: {error}") from None
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"candidate {path} holds no *.safetensors, which servers need; `megatron-rl convert --to hf` makes a "
            "Hugging Face directory of a checkpoint"
        )
