"""What SFT and RL share: the training world, the model, the trainer, checkpoints and export."""

import datetime
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl import device
from megatron_rl.checkpoint.steps import refuse_to_overwrite
from megatron_rl.config.bailing import load_bailing_config
from megatron_rl.config.load import dump_config
from megatron_rl.config.schema import RunConfig
from megatron_rl.locks import sole_writer
from megatron_rl.memory import rank_bytes
from megatron_rl.model.build import build_model, initialize_parallel, load_weights, mpu
from megatron_rl.sync.export import export_directory
from megatron_rl.sync.together import together
from megatron_rl.train.checkpoints import Checkpoints
from megatron_rl.train.trainer import Trainer
from megatron_rl.train.watch import Watch

log = logging.getLogger(__name__)

_GRACE_SECONDS = 60.0


class Session:
    """Owns this rank's place in the training world. `close()` leaves it."""

    def __init__(
        self, config: RunConfig, num_optimizer_steps: int, resume: bool, distributed_optimizer: bool = True
    ) -> None:
        """Collective. With `resume`, `restore` will load the newest checkpoint, if there is one.

        num_optimizer_steps: the length of the learning-rate schedule. distributed_optimizer: shard the optimizer over
        data-parallel ranks; without it whole gradients can be read, but no checkpoint saved. ValueError when the run
        directory holds a run and `resume` is false, or another process is running it.
        """
        self.config = config
        self.rank = int(os.environ.get("RANK", "0"))
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.bailing = load_bailing_config(config.model.path)
        self.layout = config.parallel.layout(world_size)
        self.layout.check(self.bailing)
        if self.rank == 0 and config.cluster is not None and config.cluster.training_ranks != world_size:
            log.warning(
                "this configuration is meant for %d training ranks (cluster), and %d started",
                *(config.cluster.training_ranks, world_size),
            )
        directory = config.run_dir / "checkpoints"
        refuse_to_overwrite(directory, resume)
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // local_world))
        # The watch ends a rank that waits for too long; these only have to be later.
        deadline = config.train.phase_deadline_seconds + _GRACE_SECONDS
        initialize_parallel(self.layout, deadline, config.seed)
        self.control: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=deadline))
        self._claimed = ExitStack()
        refused, *_ = together(self._claim if self.rank == 0 else None, self.control)
        if refused is not None:
            _leave_world()
            raise ValueError(refused)
        self.watch = Watch(config.run_dir, self.rank, config.train.phase_deadline_seconds)
        shared = self.layout.data * self.layout.context > 1  # else nobody has the same parameters
        overlap = config.train.overlap == "on" or (config.train.overlap == "auto" and device.on_cuda() and shared)
        self.model = build_model(
            self.bailing,
            config.model,
            config.moe,
            self.layout,
            distributed_optimizer,
            overlap,
            config.train.overlap_bucket_parameters,
        )
        load_weights(self.model, config.model.path)
        self.trainer = Trainer(self.model, config.optimizer, num_optimizer_steps, self.control)
        self.checkpoints = Checkpoints(directory, config.train, config.model.path, self.control)
        self._resume = resume
        if device.on_cuda():
            stage = mpu.get_pipeline_model_parallel_rank()
            planned = rank_bytes(config, self.bailing, self.layout)[stage].total
            log.info("planned memory of this rank: %.1f GiB", planned / 2**30)

    def _claim(self) -> str | None:
        """Rank 0: keep other processes from training in the run directory until `close`, however this one ends, and say
        what runs there. Returns why not where another one is at it; nothing is written then."""
        self.config.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._claimed.enter_context(sole_writer(self.config.run_dir, "set run_dir to a new folder"))
        except ValueError as error:
            return str(error)
        (self.config.run_dir / "config.toml").write_text(dump_config(self.config))
        return None

    @property
    def context_group(self) -> Any:
        """The ranks over which this rank's sequences are divided; None when it holds them whole."""
        return mpu.get_context_parallel_group() if self.layout.context > 1 else None

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def restore(self) -> tuple[dict[str, Any], bytes] | None:
        """Collective: load the newest whole checkpoint; the driver's state and carried samples, or None in a new
        run."""
        return self.checkpoints.restore(self.trainer) if self._resume else None

    def save(self, step: int, driver: dict[str, Any], carried: bytes = b"") -> None:
        """Collective: a checkpoint after `step` completed steps. It may be written beside training; see `settle`."""
        self.watch.enter("save", step)
        self.checkpoints.save(step, self.trainer, driver, carried)

    def settle(self, wait: bool = False) -> None:
        """Collective, at every step boundary and with `wait` before the run ends: see train/checkpoints.py."""
        if wait:
            self.watch.enter("save", self.watch.step)
        self.checkpoints.settle(wait)

    def any_rank(self, flag: bool) -> bool:
        """Collective: true on every rank when it is on one."""
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def memory_metrics(self) -> dict[str, float]:
        """What this rank's GPU held at most since `device.reset_peak_memory`; nothing on a CPU, which cannot tell."""
        return {"peak_memory_gb": device.peak_memory_bytes() / 2**30} if device.on_cuda() else {}

    def export(self, destination: Path, notes: dict[str, str] | None = None) -> None:
        """Collective: a Hugging Face directory of the present weights. notes: text by the name of its file there."""
        self.watch.enter("export", self.watch.step)
        export_directory(self.model, self.config.model.path, destination, self.control, notes)

    def close(self) -> None:
        self.watch.enter("close", self.watch.step)
        self.checkpoints.close()
        self.watch.close()
        _leave_world()
        self._claimed.close()


def _leave_world() -> None:
    """A process that ends with live groups may end by SIGABRT, and torchrun would tell of it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def should_save(step: int, last: int, config: RunConfig) -> bool:
    """True after `step` completed steps of `last` when a checkpoint is due; after the last one it always is."""
    every = config.train.save_every
    return step == last or (every > 0 and step % every == 0)
