"""This package holds the model families. Each reads its config.json into one neutral Architecture and names its
tensors. No torch."""

from megatron_rl.families.architecture import Architecture, Rotary
from megatron_rl.families.registry import (
    FAMILIES,
    architecture_of,
    family_of,
    load_architecture,
    read_architecture,
    tensor_shapes,
)

__all__ = [
    "FAMILIES",
    "Architecture",
    "Rotary",
    "architecture_of",
    "family_of",
    "load_architecture",
    "read_architecture",
    "tensor_shapes",
]
