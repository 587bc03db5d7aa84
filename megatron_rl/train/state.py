"""Training state on disk: Megatron's distributed checkpoint plus the driver's own state, whole or not at all.

A run's `checkpoints/` holds `step_N/` directories and `latest`, a file with the newest one's name that is replaced
atomically after everything in it is on disk. A `step_N/` holds `megatron/` (model and optimizer, any parallel layout),
`driver.json` (step, cursor, counters) and `carried.npz` (surplus responses), and config.json and the tokenizer, so that
it is a checkpoint like a converted one (checkpoint/read.py): a model to start from, to compare or to export.
"""

import json
import logging
import os
import queue
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl import device
from megatron_rl.checkpoint.hf import copy_companions
from megatron_rl.checkpoint.read import newest
from megatron_rl.model.build import load_sharded_state, sharded_state

device.import_megatron()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

log = logging.getLogger(__name__)

# A synchronous save writes in this process, so its queue of results can be a plain one. Megatron would start a
# multiprocessing manager for it: seconds at every run's first checkpoint, and a process that outlives a SIGKILL.
filesystem_async._results_queue = queue.Queue()

# The layout-independent format: every optimizer state tensor under its parameter's name and full shape.
_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    path = newest(directory)
    if path is not None and not (path / "driver.json").is_file():
        raise ValueError(
            f"{directory / 'latest'} names {path.name}, which is not a whole checkpoint; write the name of another "
            "into it"
        )
    return path


def latest_step(directory: Path) -> int | None:
    """The completed steps that the newest whole checkpoint of a run covers, or None."""
    path = latest(directory)
    return None if path is None else int(path.name.removeprefix("step_"))


def refuse_to_overwrite(directory: Path, resume: bool) -> None:
    """ValueError when a run's checkpoints would be written over, or when `resume` would start anew without a word."""
    if latest(directory) is not None:
        if not resume:
            raise ValueError(
                f"{directory.parent} holds a run; add --resume to continue it, or set run_dir to a new folder"
            )
    elif resume and any(directory.glob("step_*")):
        raise ValueError(
            f"{directory} has checkpoints but no file 'latest'; write the name of the one to resume from into it"
        )


def _sharded(trainer: Any, is_loading: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What goes to disk (or the template to load into), and the whole state of each part of the optimizer.

    Megatron chains one optimizer for dense and one for expert parameters, or a single one, depending on the layout.
    Only their per-parameter tensors and the step count are stored, so a checkpoint opens in any layout; learning rate
    and weight decay are the schedule's and the configuration's.
    """
    model = sharded_state(trainer.model)
    parts = [
        part.sharded_state_dict(model, is_loading=is_loading, metadata=_OPTIMIZER_METADATA)
        for part in trainer.optimizer.chained_optimizers
    ]
    stored = {
        "model": model,
        "optimizer": {str(i): part["param_state"] for i, part in enumerate(parts)},
        "optimizer_step": max(group["step"] for part in parts for group in part["optimizer"]["param_groups"]),
        "scheduler": trainer.scheduler.state_dict(),
        "rng": torch.get_rng_state(),
    }
    return stored, parts


def save(
    directory: Path,
    step: int,
    trainer: Any,
    driver: dict[str, Any],
    carried: bytes,
    *,
    model_dir: Path,
    keep_last: int,
    control: Any,
) -> Path:
    """Collective. `driver` and `carried` are rank 0's. model_dir: where config.json and the tokenizer come from.
    Returns the checkpoint's path on every rank."""
    final = directory / f"step_{step}"
    if latest(directory) == final:
        return final  # a stop right after a scheduled save: what is there is whole, so leave it alone
    partial = directory / f".step_{step}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "megatron").mkdir(parents=True)
    dist.barrier(group=control)
    dist_checkpointing.save(_sharded(trainer, is_loading=False)[0], str(partial / "megatron"))
    dist.barrier(group=control)
    if dist.get_rank() == 0:
        (partial / "carried.npz").write_bytes(carried)
        (partial / "driver.json").write_text(json.dumps(driver, indent=1))
        copy_companions(model_dir, partial, trainer.model.dtype)
        for path in (partial / "carried.npz", partial / "driver.json", partial):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(directory)
        _replace_text(directory / "latest", final.name)
        _forget_old(directory, final, keep_last)
    dist.barrier(group=control)
    return final


def load(path: Path, trainer: Any) -> tuple[dict[str, Any], bytes]:
    """Collective. Restores model, optimizer, schedule and RNG; returns the driver's state and carried responses."""
    _initialize_adam(trainer.optimizer)
    template, parts = _sharded(trainer, is_loading=True)
    state = dist_checkpointing.load(template, str(path / "megatron"))
    load_sharded_state(trainer.model, state["model"])
    for i, (optimizer, part) in enumerate(zip(trainer.optimizer.chained_optimizers, parts, strict=True)):
        for group in part["optimizer"]["param_groups"]:
            group["step"] = state["optimizer_step"]
        optimizer.load_state_dict({name: value for name, value in part.items() if name != "param_state"})
        with _without_step(optimizer.optimizer):
            optimizer.load_parameter_state_from_fully_reshardable(state["optimizer"][str(i)])
    trainer.scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])
    return json.loads((path / "driver.json").read_text()), (path / "carried.npz").read_bytes()


def _initialize_adam(optimizer: Any) -> None:
    """Give torch's Adam its state before the first step: megatron's distributed optimizer reads the step count of a
    fresh optimizer when it makes the template to load into, and fails without one."""
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


@contextmanager
def _without_step(adam: Any) -> Iterator[None]:
    """Hide torch Adam's per-parameter step: megatron skips it in what it read and then misses it in what it fills.

    Each parameter gets a tensor of its own back: megatron hands the same one to all, and Adam would count one step once
    per parameter.
    """
    steps = {
        parameter: adam.state[parameter].pop("step") for parameter in adam.state if "step" in adam.state[parameter]
    }
    yield
    for parameter, step in steps.items():
        adam.state[parameter]["step"] = step.clone()


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _forget_old(directory: Path, newest: Path, keep_last: int) -> None:
    """Delete all but `newest` and the `keep_last` - 1 most recent before it. Other names are somebody's own copies."""
    saved = [path for path in directory.iterdir() if re.fullmatch(r"step_\d+", path.name) and path != newest]
    saved.sort(key=lambda path: path.stat().st_mtime)
    for path in saved[: max(0, len(saved) - (keep_last - 1))]:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
