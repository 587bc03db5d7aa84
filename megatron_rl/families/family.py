"""This module describes one family of models, as the registry holds it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.families.tensors import TensorNames


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Describes a family of models: how to tell it, read it, and name its tensors.

    key: the one in the registry, and `Architecture.family`. architectures, model_types: what config.json says under
    these names; the first decides. read: turns config.json's values into the fields of an Architecture but `family`;
    ValueError for what is not implemented. is_unscaled_on_cpu: SGLang leaves `routed_scaling_factor` out on a CPU.
    remote_code: transformers does not know the family, so SGLang runs the Python file of the model directory that
    describes it.
    """

    key: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    tensors: TensorNames
    is_unscaled_on_cpu: bool = False
    remote_code: bool = False
