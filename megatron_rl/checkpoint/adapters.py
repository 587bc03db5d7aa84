"""This module reads what a checkpoint of adapters says of itself: their shape, and which weights they belong to."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from megatron_rl.config.lora import LoraSection
from megatron_rl.config.section import Section
from megatron_rl.parsing import read_json
from megatron_rl.tensor_bytes import as_bytes

if TYPE_CHECKING:
    from megatron_rl.checkpoint.read import Checkpoint

# The file lies beside config.json in a checkpoint that holds adapters instead of weights.
NOTE = "lora.json"


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Add an adapter to its weight: weight [out, in] + scale * b [out, rank] a [rank, in].

    It is computed in fp32 (fp64 for fp64) and rounded once, to the weight's type.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.to(wide).addmm(b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)


class AdapterNote(Section):
    """Says whose adapters a checkpoint holds; it is `lora.json` there.

    base: the checkpoint with the frozen weights. digest: of these weights, see `weights_digest`.
    """

    base: Path
    digest: str
    lora: LoraSection

    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1)


def read_note(directory: Path) -> AdapterNote | None:
    """Read the note of a checkpoint; None where it holds weights. ValueError for what is no note."""
    path = directory / NOTE
    if not path.exists():
        return None
    try:
        return AdapterNote.model_validate(read_json(path))
    except (ValidationError, ValueError) as error:
        raise ValueError(f"{path} does not say whose adapters these are ({error}); restore the file") from None


def refuse_other_adapters(directory: Path, expected: AdapterNote | None) -> None:
    """Raise ValueError when a checkpoint cannot go on with a configuration's adapters, or without any (None)."""
    found = read_note(directory)
    if found is None and expected is not None:
        raise ValueError(
            f"{directory} holds all weights and no adapters; take [lora] out to go on with it, or start anew in "
            "another run_dir, with these weights as model.path"
        )
    if found is None:
        return
    if expected is None:
        raise ValueError(
            f"{directory} holds adapters; go on with the [lora] that it was made with: {_told(found.lora)}"
        )
    if found.lora != expected.lora:
        raise ValueError(
            f"{directory} holds adapters of {_told(found.lora)}, and [lora] says {_told(expected.lora)}; set it back, "
            "or start anew in another run_dir"
        )
    if found.digest != expected.digest:
        raise ValueError(
            f"{directory} holds adapters of other weights than those at {expected.base} (digest {found.digest}, got "
            f"{expected.digest}); set model.path to {found.base} as it was"
        )


def _told(lora: LoraSection) -> str:
    return f"rank {lora.rank}, alpha {lora.alpha:g}, targets {list(lora.targets)}"


def tensor_digests(checkpoint: "Checkpoint", share: int = 0, num_shares: int = 1) -> dict[str, str]:
    """Read one share of a checkpoint's tensors, and return the xxh3_128 of the bytes of each by its Hugging Face name.
    Several ranks can read them together, each one share."""
    names = sorted(checkpoint.dtypes)[share::num_shares]
    return {name: xxhash.xxh3_128(as_bytes(checkpoint.read(name))).hexdigest() for name in names}


def weights_digest(digests: Mapping[str, str]) -> str:
    """Return one digest of all tensors' names and values, whatever files they are in."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]
