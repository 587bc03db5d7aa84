"""Checkpoints of adapters: the factors, and which weights they belong to, read as one model of merged weights."""

import dataclasses
import json
import xxhash
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.tensor_bytes import checksum

# Beside config.json in a checkpoint whose weights are adapters.
NOTE = "lora.json"


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight [out, in] + scale * b [out, rank] a [rank, in], in fp32 (fp64 for fp64), rounded to the weight's type."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.to(wide).addmm(b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)
