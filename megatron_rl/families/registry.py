"""This module lists all families, and has the one reader of config.json.

A new family is a file beside this one and a line in FAMILIES; CONTRIBUTING.md shows the steps.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_rl.families.architecture import Architecture
from megatron_rl.families.bailing import BAILING_MOE
from megatron_rl.families.bailing_v2 import BAILING_MOE_V2
from megatron_rl.families.family import Family
from megatron_rl.families.fields import end_ids
from megatron_rl.families.glm4_moe import GLM4_MOE
from megatron_rl.families.llama import LLAMA
from megatron_rl.families.mistral import MISTRAL
from megatron_rl.families.mixtral import MIXTRAL
from megatron_rl.families.olmo2 import OLMO2
from megatron_rl.families.olmoe import OLMOE
from megatron_rl.families.phi3 import PHI3
from megatron_rl.families.qwen2 import QWEN2
from megatron_rl.families.qwen3 import QWEN3
from megatron_rl.families.qwen3_moe import QWEN3_MOE
from megatron_rl.files import model_directory, model_files
from megatron_rl.parsing import read_json, shown

FAMILIES: Mapping[str, Family] = {
    family.key: family
    for family in (
        BAILING_MOE,
        BAILING_MOE_V2,
        GLM4_MOE,
        LLAMA,
        MISTRAL,
        MIXTRAL,
        OLMO2,
        OLMOE,
        PHI3,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
    )
}
# Relatives of a family that are other models, by what config.json calls their type and how it begins their class.
_OTHERS = {
    "bailing_hybrid": ("BailingMoeV2_5", "Ling and Ring 2.5 and 2.6, which mix Lightning attention and MLA"),
    "bailing_moe_v3": ("BailingMoeV3", "Ling and Ring 3.0"),
}

_CONFIG, _GENERATION = "config.json", "generation_config.json"


def family_of(architecture: Architecture) -> Family:
    return FAMILIES[architecture.family]


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model by its Hugging Face name."""
    return family_of(architecture).tensors.shapes(architecture)


def load_architecture(model_dir: str | Path) -> Architecture:
    """Read the config.json of a model directory, and the end tokens of its generation_config.json.

    ValueError names the directory, the field and the value, and any file of the directory that leads out of it
    (files.py): whoever uses a model reads this first.
    """
    directory = model_directory(model_dir)
    found = model_files(directory)
    if directory / _CONFIG not in found:
        run = directory / "checkpoints"
        hint = f"; of a run name {directory}/hf or a step_N in {run}" if run.is_dir() else ""
        raise ValueError(f"{model_dir} holds no {_CONFIG}; it must be a Hugging Face model directory{hint}")
    generation = directory / _GENERATION
    return _read(directory / _CONFIG, _table(generation) if generation in found else {})


def read_architecture(path: Path) -> Architecture:
    """Read one file; ValueError names the file, the field and the value."""
    return _read(path, {})


def architecture_of(values: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Architecture:
    """Return the architecture of config.json's values. generation: those of generation_config.json, which may name more
    end tokens.

    ValueError names the field and the value.
    """
    family = _family(values)
    fields = family.read(values)
    fields["eos_token_ids"] = end_ids(values, generation or {})
    if not fields["eos_token_ids"]:
        raise ValueError(
            f"eos_token_id is in neither {_CONFIG} nor {_GENERATION}, so responses could never end; add it to one"
        )
    try:
        return Architecture.model_validate({"family": family.key, **fields})
    except ValidationError as error:
        raise ValueError("; ".join(map(_told, error.errors()))) from None


def _read(path: Path, generation: Mapping[str, Any]) -> Architecture:
    values = _table(path)
    try:
        return architecture_of(values, generation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _table(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(values)}")
    return values


def _family(values: Mapping[str, Any]) -> Family:
    """Find the family by `architectures`, or by `model_type` where there is none. Both must be of the same family."""
    names, model_type = values.get("architectures"), values.get("model_type")
    _refuse_others(names, model_type)
    if isinstance(names, list) and len(names) == 1:
        for family in FAMILIES.values():
            if names[0] in family.architectures:
                if model_type is not None and model_type not in family.model_types:
                    raise ValueError(
                        f"architectures {shown(names)} and model_type {shown(model_type)} contradict each other; "
                        f"{names[0]} has model_type {_listed(family.model_types)}"
                    )
                return family
        raise ValueError(f"architectures {shown(names)} is not implemented; {_known()}")
    if names:
        raise ValueError(f"architectures must name one class, got {shown(names)}; {_known()}")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    raise ValueError(f"model_type {shown(model_type)} is not implemented; {_known()}")


def _refuse_others(names: Any, model_type: Any) -> None:
    classes = [str(name) for name in names] if isinstance(names, list) else []
    by_class = [told for prefix, told in _OTHERS.values() if any(name.startswith(prefix) for name in classes)]
    by_type = [told for other, (_, told) in _OTHERS.items() if model_type == other]
    for model in [*by_class, *by_type][:1]:
        raise ValueError(
            f"architectures {shown(names)} with model_type {shown(model_type)}: {model}, are not implemented; "
            f"{_known()}"
        )


def _known() -> str:
    return "it can be " + _listed(tuple(name for family in FAMILIES.values() for name in family.architectures))


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _told(problem: Any) -> str:
    name, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    name = name.replace("rotary.theta", "rope_theta").replace("rotary.fraction", "partial_rotary_factor")
    name = "eos_token_id" if name.startswith("eos_token_ids") else name
    if problem["type"] == "bool_type":
        message = f"must be true or false, got {shown(problem['input'])}"
    if problem["type"] == "missing":
        message = "is missing"
        return f"{name} {message}"
    return f"{name} {message}" if message.startswith("must ") else f"{name}: {message}" if name else message
