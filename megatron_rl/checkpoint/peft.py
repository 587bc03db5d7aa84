"""This module writes adapters as a directory that `peft` loads: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any

from megatron_rl.checkpoint.adapters import AdapterNote, read_note
from megatron_rl.checkpoint.distributed import DistributedCheckpoint
from megatron_rl.checkpoint.hf import SafetensorsWriter, num_bytes
from megatron_rl.checkpoint.names import Adapter, adapter_table, adapters, name_table
from megatron_rl.checkpoint.new_directory import new_directory
from megatron_rl.checkpoint.read import resolve
from megatron_rl.families import load_architecture

_WEIGHT = ".weight"


def write_peft(source: Path, destination: Path) -> int:
    """Write the adapters of a checkpoint, or of a run's newest one, as a new directory. Return how many tensors it has.

    Where Megatron's fused weight has one `lora_a`, each of its Hugging Face tensors gets a copy. ValueError for a
    source without adapters.
    """
    directory = resolve(source)
    model, note = load_architecture(directory), read_note(directory)
    if note is None:
        raise ValueError(f"{source} holds weights and no adapters; convert it --to hf")
    found = adapters(model, note.lora)
    with DistributedCheckpoint(directory, model, adapter_table(model, note.lora)) as checkpoint:
        places = [place for adapter in found.values() for place in _places(adapter)]
        infos = [(name, shape, checkpoint.dtypes[stored]) for name, shape, stored in places]
        total = sum(num_bytes(shape, dtype) for _, shape, dtype in infos)
        with new_directory(source, destination, total) as partial:
            with SafetensorsWriter(partial / "adapter_model.safetensors", infos) as writer:
                for name, _, stored in places:
                    writer.write(name, checkpoint.read(stored))
            names = [name for adapter in found.values() for name in adapter.weight.hf]
            others = {name for entry in name_table(model).values() for name in entry.hf} - set(names)
            text = json.dumps(_config(note, _target_modules(names, others)), indent=1)
            (partial / "adapter_config.json").write_text(text, encoding="utf-8")
    return len(infos)


def _places(adapter: Adapter) -> list[tuple[str, tuple[int, ...], str]]:
    """List the tensors of the result, each with its name, its shape, and the name by which its values are read."""
    found = []
    for (_, a, b), b_shape in zip(adapter.peft_names(), adapter.b.hf_shapes, strict=True):
        found += [(a, adapter.a.hf_shapes[0], adapter.a.hf[0]), (b, b_shape, b)]
    return found


def _config(note: AdapterNote, target_modules: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(note.base),
        "r": note.lora.rank,
        "lora_alpha": note.lora.alpha,
        "use_rslora": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": target_modules,
        "inference_mode": True,
    }


def _target_modules(names: list[str], others: set[str]) -> list[str]:
    """Return the last parts of the modules' names, which servers expect, where no module without an adapter has one of
    them; else whole names."""
    modules = [name.removesuffix(_WEIGHT) for name in names]
    last = {module.rsplit(".", 1)[-1] for module in modules}
    if any(name.removesuffix(_WEIGHT).rsplit(".", 1)[-1] in last for name in others):
        return modules
    return sorted(last)
