"""Training state on disk: Megatron's distributed checkpoint plus the driver's own state, whole or not at all.

A run's `checkpoints/` holds `step_N/` directories and `latest`, a file with the newest one's name that is replaced
atomically after everything in it is on disk. A `step_N/` holds `megatron/` (model and optimizer, any parallel layout),
`driver.json` (step, cursor, counters) and `carried.npz` (surplus responses).
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl import device
from megatron_rl.model.build import Model

device.import_megatron()

from megatron.core import dist_checkpointing  # noqa: E402

log = logging.getLogger(__name__)

_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    marker = directory / "latest"
    if not marker.is_file():
        return None
    path = directory / marker.read_text().strip()
    if not (path / "driver.json").is_file():
        raise ValueError(f"{marker} names {path.name}, which is not a whole checkpoint; restore it or delete {marker}")
    return path


def _sharded(model: Model, optimizer: Any, scheduler: Any, is_loading: bool) -> dict[str, Any]:
    state = model.module.module.sharded_state_dict()
    return {
        "model": state,
        "optimizer": optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=_OPTIMIZER_METADATA),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
    }


def save(
    directory: Path, step: int, trainer: Any, driver: dict[str, Any], carried: bytes, keep_last: int, control: Any
) -> Path:
    """Collective. `driver` and `carried` are rank 0's. Returns the checkpoint's path on every rank."""
    final = directory / f"step_{step}"
    partial = directory / f".step_{step}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "megatron").mkdir(parents=True)
    dist.barrier(group=control)
    dist_checkpointing.save(
        _sharded(trainer.model, trainer.optimizer, trainer.scheduler, is_loading=False), str(partial / "megatron")
    )
    dist.barrier(group=control)
    if dist.get_rank() == 0:
        (partial / "carried.npz").write_bytes(carried)
        (partial / "driver.json").write_text(json.dumps(driver, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _replace_text(directory / "latest", final.name)
        _forget_old(directory, keep_last)
    dist.barrier(group=control)
    return final


def load(path: Path, trainer: Any) -> tuple[dict[str, Any], bytes]:
    """Collective. Restores model, optimizer, schedule and RNG; returns the driver's state and carried responses."""
    template = _sharded(trainer.model, trainer.optimizer, trainer.scheduler, is_loading=True)
    state = dist_checkpointing.load(template, str(path / "megatron"))
    trainer.model.module.module.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])
    return json.loads((path / "driver.json").read_text()), (path / "carried.npz").read_bytes()


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _forget_old(directory: Path, keep_last: int) -> None:
    saved = sorted(directory.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    for path in saved[:-keep_last]:
        shutil.rmtree(path, ignore_errors=True)
