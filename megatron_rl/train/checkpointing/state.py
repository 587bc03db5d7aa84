"""Saves and loads the trainer's state as Megatron's distributed checkpoint: model, optimizer, schedule and RNG, for any
layout.

Megatron plans on all ranks which rank writes what. Then every rank writes its file without messages to the others, and
rank 0 adds the index. train/checkpointing/checkpoints.py decides when, and what makes a checkpoint whole.
"""

import dataclasses
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron_rl import device
from megatron_rl.checkpoint.checked import CheckedReader, load_common
from megatron_rl.checkpoint.checksums import Checksum, checksum_on_disk
from megatron_rl.model.build import load_sharded_state, sharded_state
from megatron_rl.train.step.offload import trained_parts

device.import_megatron()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import serialization  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # noqa: E402

Read = Callable[[torch.Tensor], torch.Tensor]

# Nobody reads it, but megatron would start a multiprocessing manager for it: seconds at every run's first checkpoint,
# and a process that outlives a SIGKILL.
filesystem_async._results_queue = queue.Queue()

# Megatron's own ways to read would run what the pickles of a folder say.
for _module, _name, _checked in (
    (serialization, "_get_filesystem_reader", CheckedReader),
    (torch_strategies, "_get_filesystem_reader", CheckedReader),
    (serialization, "load_common", load_common),
):
    if not hasattr(_module, _name):
        raise ImportError(f"{_module.__name__} has no {_name}: this megatron-core reads checkpoints in another way")
    setattr(_module, _name, _checked)

# The layout-independent format: every optimizer state tensor under its parameter's name and full shape.
_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def _to_save(trainer: Any) -> dict[str, Any]:
    """Collect what goes to disk; `load` makes the template that it is read into. Collective.

    Megatron chains one optimizer for dense and one for expert parameters, or a single one, depending on the layout.
    Only their per-parameter tensors and the step count are stored, so a checkpoint opens in any layout; learning rate
    and weight decay are the schedule's and the configuration's.
    """
    _initialize_adam(trainer.optimizer)  # all steps so far may have been skipped
    model = sharded_state(trainer.model)
    parts = trained_parts(trainer.optimizer)
    return {
        "model": model,
        "optimizer": {str(i): _optimizer_state(part, model, trainer.offloader.read) for i, part in enumerate(parts)},
        "optimizer_step": max(
            group["step"] for part in parts for group in part.state_dict()["optimizer"]["param_groups"]
        ),
        "scheduler": trainer.scheduler.state_dict(),
        "rng": torch.get_rng_state(),
    }


def _optimizer_state(part: Any, model: dict[str, Any], read: Read) -> dict[int, dict[str, Any]]:
    """Return one part of the optimizer in megatron's `fully_reshardable` format; nothing on ranks that will not write
    it. read: a state's numbers, which may be in host memory.

    Megatron's own way there copies everything five times, for all ranks that share a parameter.
    """
    entries = {entry.data: entry for entry in nested_values(model)}
    state: dict[int, dict[str, Any]] = {}
    for parameter, tensors in _whole_states(part, read):
        entry = entries[parameter]
        state[len(state)] = {
            name: dataclasses.replace(
                entry,
                key=f"optimizer.state.{name}.{entry.key}",
                data=tensor.view(entry.data.shape),
                **({} if isinstance(entry, ShardedTensorFactory) else {"dtype": tensor.dtype}),
            )
            for name, tensor in tensors.items()
        }
    return state


def _whole_states(part: Any, read: Read) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Yield each parameter with the flat tensors of its state, on the first rank of those that share them.
    Collective."""
    group, names = part.data_parallel_group_gloo, ("param", *part.optimizer_state_keys)
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        (buckets,) = ranges.values()
        if group.size() == 1:
            for parameter in buffer.param_index_map:
                own = part._get_main_param_and_optimizer_states(parameter)
                yield parameter, {name: read(own[name].detach()) for name in names}
            continue
        whole = {name: _gathered(part, buffer, buckets, name, group, read) for name in names}
        if group.rank() == 0:
            for parameter, (start, end, _) in buffer.param_index_map.items():
                yield parameter, {name: tensor[start:end] for name, tensor in whole.items()}


def _gathered(part: Any, buffer: Any, buckets: list[Any], name: str, group: Any, read: Read) -> torch.Tensor:
    """Gather one kind of state of all parameters of a buffer, at their places in it, on the group's first rank."""
    leads = group.rank() == 0
    whole = torch.empty(buffer.numel if leads else 0)
    for bucket, ranges in zip(buffer.buckets, buckets, strict=True):
        share = bucket.grad_data.numel() // group.size()
        mine = torch.empty(share)
        for parameter, where in ranges["param_map"].items():
            place = mine[where["gbuf_local"].start : where["gbuf_local"].end]
            place.copy_(read(part._get_main_param_and_optimizer_states(parameter)[name].detach()))
        shares = list(whole[bucket.offset : bucket.offset + bucket.grad_data.numel()].split(share)) if leads else None
        dist.gather(mine, shares, group=group, group_dst=0)
    return whole


class Part:
    """Holds what this rank writes of a checkpoint: at most one file, which Megatron has planned together with the other
    ranks."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        """Plan this rank's part. Collective, on the trainer's groups. folder: an empty one."""
        stored = _to_save(trainer)
        entries = [*nested_values(stored["model"]), *nested_values(stored["optimizer"])]
        planning = _Planning()
        dist_checkpointing.save(stored, str(folder), planning, async_sharded_save=True, async_strategy="mcore")
        self._writer, self._metadata, self._folder = planning.writer, planning.metadata, folder
        # Tensors that megatron has no reason of its own to copy (views, on a CPU) may be the ones that are trained.
        self._live = {entry.data.untyped_storage().data_ptr() for entry in entries}

    @property
    def num_bytes(self) -> int:
        return sum(
            sum(data.getbuffer().nbytes for _, data in objects) + sum(tensor.nbytes for _, tensor in tensors)
            for _, _, (objects, tensors) in self._writer.write_buckets
        )

    def to_host(self, copy: bool) -> None:
        """Bring the tensors to host memory, before `write`. copy: also copy those that are there already, so that
        training may change the weights in between."""

        def change(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if copy and tensor.untyped_storage().data_ptr() in self._live else tensor

        self._writer.write_buckets = [
            (path, name, (objects, [(item, change(tensor)) for item, tensor in tensors]))
            for path, name, (objects, tensors) in self._writer.preload_tensors(self._writer.write_buckets)
        ]

    def write(self) -> tuple[list[Any], dict[str, Checksum]]:
        """Write this rank's file to the disk. Return megatron's account of it, and its checksum by name. Not
        collective."""
        transforms = [self._writer.transforms]
        account: list[Any] = []
        files: dict[str, Checksum] = {}
        for bucket in self._writer.write_buckets:
            path, name, _ = bucket
            # Its own caller keeps no more of an error than that there was one.
            _, results = FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, None, None, use_fsync=False)
            if isinstance(results, Exception):
                raise results
            account += results
            files[name] = checksum_on_disk(Path(path))
        return account, files

    def finish(self, accounts: list[list[Any]]) -> None:
        """Write the index, which tells megatron where everything is. Runs on rank 0, when all ranks have written."""
        self._writer.finish(self._metadata, accounts)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))


class _Planning(TorchDistSaveShardedStrategy):
    """Runs megatron's way to save as far as its plan. What it does after that is collective on the groups that
    train."""

    writer: Any
    metadata: Any  # on rank 0

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, async_strategy: str) -> Any:
        self.writer, self.metadata = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, async_strategy)


def load(folder: Path, trainer: Any) -> None:
    """Restore model, optimizer, schedule and RNG from megatron's folder of a checkpoint. Collective."""
    with trainer.offloader.for_loading():
        _load(folder, trainer)


def _load(folder: Path, trainer: Any) -> None:
    _initialize_adam(trainer.optimizer)
    model = sharded_state(trainer.model)
    optimizers = trained_parts(trainer.optimizer)
    parts = [part.sharded_state_dict(model, is_loading=True, metadata=_OPTIMIZER_METADATA) for part in optimizers]
    template = {
        "model": model,
        "optimizer": {str(i): part["param_state"] for i, part in enumerate(parts)},
        "optimizer_step": 0,
        "scheduler": trainer.scheduler.state_dict(),
        "rng": torch.get_rng_state(),
    }
    try:
        state = dist_checkpointing.load(template, str(folder))
    except dcp.CheckpointException as error:  # around whatever was raised in it
        raise next(iter(error.failures.values()))[0] from None
    load_sharded_state(trainer.model, state["model"])
    for i, (optimizer, part) in enumerate(zip(optimizers, parts, strict=True)):
        for group in part["optimizer"]["param_groups"]:
            group["step"] = state["optimizer_step"]
        optimizer.load_state_dict({name: value for name, value in part.items() if name != "param_state"})
        with _without_step(optimizer.optimizer):
            optimizer.load_parameter_state_from_fully_reshardable(state["optimizer"][str(i)])
    trainer.scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])


def _initialize_adam(optimizer: Any) -> None:
    """Give torch's Adam its state before the first step: megatron's distributed optimizer reads the step count of a
    fresh optimizer when it makes the template to load into, and fails without one."""
    for part in trained_parts(optimizer):
        adam = part.optimizer
        if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),  # as fused Adam has it
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
