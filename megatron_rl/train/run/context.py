"""Sets up what SFT and RL share: the training world, the model, the trainer, checkpoints and export."""

import datetime
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from megatron_rl import device
from megatron_rl.checkpoint.adapters import AdapterNote, tensor_digests, weights_digest
from megatron_rl.checkpoint.newest import newest
from megatron_rl.checkpoint.read import open_checkpoint
from megatron_rl.checkpoint.steps import refuse_to_overwrite
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, SharedFault, StopRequested, speak_as
from megatron_rl.families import load_architecture
from megatron_rl.locks import sole_writer
from megatron_rl.memory import rank_bytes
from megatron_rl.model.build import build_model, initialize_adapters, initialize_parallel, load_weights, mpu
from megatron_rl.place import own_place
from megatron_rl.stores import join
from megatron_rl.sync.all_ranks import on_all_ranks
from megatron_rl.sync.export import export_directory
from megatron_rl.terminal import say
from megatron_rl.train.checkpointing.checkpoints import Checkpoints
from megatron_rl.train.run.metrics import metric_rows
from megatron_rl.train.run.overview import ending, overview
from megatron_rl.train.run.starts import record_start
from megatron_rl.train.run.watchdog import Watchdog
from megatron_rl.train.step.trainer import Trainer

log = logging.getLogger(__name__)

_GRACE_SECONDS = 60.0


class TrainContext:
    """Owns this rank's part in the training world. `close()` leaves it; so does the end of a `with` block.

    exit_code: with which the block will be left, where it ends without an exception.
    """

    def __init__(
        self,
        config: RunConfig,
        num_optimizer_steps: int,
        resume: bool,
        distributed_optimizer: bool = True,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Join the training world, and build the model and the trainer. Collective. With `resume`, `restore` will load
        the newest checkpoint, if there is one.

        num_optimizer_steps: the length of the learning-rate schedule. distributed_optimizer: shard the optimizer over
        data-parallel ranks; without it whole gradients can be read, but no checkpoint saved. check: called now and then
        while other ranks are waited for; what it raises ends the wait. Raises ValueError when the run directory holds a
        run and `resume` is false, or another process is running it, or not all ranks come.
        """
        self.config = config
        place = own_place()
        self.rank, world_size = place.rank, place.world_size
        self.architecture = load_architecture(config.model.path)
        self.layout = config.parallel.layout(world_size)
        self.layout.check(self.architecture)
        planned = world_size if config.cluster is None else config.cluster.training_ranks
        if self.rank == 0 and planned != world_size:
            log.warning(
                "this configuration is meant for %d training ranks (cluster), and %d started", planned, world_size
            )
        directory = config.run_dir / "checkpoints"
        refuse_to_overwrite(directory, resume)
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // place.local_world_size))
        # The watch ends a rank that waits for too long; these only have to be later.
        deadline = config.train.phase_deadline_seconds + _GRACE_SECONDS
        store = join(place, config.train.phase_deadline_seconds, check)
        initialize_parallel(self.layout, deadline, config.seed, place, store)
        speak_as(self.rank)
        self.control: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=deadline))
        self._claimed = ExitStack()
        refused, *_ = on_all_ranks(self._claim if self.rank == 0 else None, self.control)
        if refused is not None:
            dist.destroy_process_group()
            raise ValueError(refused)
        self.watchdog = Watchdog(config.run_dir, self.rank, config.train.phase_deadline_seconds)
        self.resume, self._has_resumed = resume, False
        self.exit_code = EXIT_DONE
        self._saved_at = time.monotonic()
        try:
            self._build(num_optimizer_steps, distributed_optimizer, directory)
        except BaseException as error:
            self.watchdog.close(*_ending(error, EXIT_DONE))
            raise

    def _build(self, num_optimizer_steps: int, distributed_optimizer: bool, directory: Path) -> None:
        """Build the model with its weights, the trainer, and the directory of the checkpoints. Collective."""
        config = self.config
        shared = self.layout.data * self.layout.context > 1  # else nobody has the same parameters
        overlap = config.train.overlap == "on" or (config.train.overlap == "auto" and device.on_cuda() and shared)
        self.model = build_model(
            self.architecture,
            config.model,
            config.moe,
            self.layout,
            distributed_optimizer,
            overlap,
            config.train.overlap_bucket_parameters,
            config.lora,
        )
        load_weights(self.model, config.model.path)
        initialize_adapters(self.model, config.seed)
        self.trainer = Trainer(self.model, config.optimizer, num_optimizer_steps, self.control)
        self.adapter_note = self._adapter_note()
        self.checkpoints = Checkpoints(directory, config.train, config.model.path, self.control, self.adapter_note)
        if device.on_cuda():
            stage = mpu.get_pipeline_model_parallel_rank()
            planned = rank_bytes(config, self.architecture, self.layout)[stage].total
            log.debug("planned memory of this rank: %.1f GiB", planned / 2**30)

    def _adapter_note(self) -> AdapterNote | None:
        """Make the note that checkpoints keep of the adapters and the frozen weights. Collective: all ranks read these
        together."""
        if self.config.lora is None:
            return None
        path = self.config.model.path.absolute()

        def digests() -> dict[str, str]:
            with open_checkpoint(path, self.architecture) as checkpoint:
                return tensor_digests(checkpoint, self.rank, dist.get_world_size())

        parts = on_all_ranks(digests, self.control)
        together = {name: digest for part in parts for name, digest in part.items()}
        return AdapterNote(base=path, digest=weights_digest(together), lora=self.config.lora)

    def _claim(self) -> str | None:
        """Keep other processes from training in the run directory until `close`, however this one ends. Return why not
        where another process is already training there. Runs on rank 0."""
        self.config.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._claimed.enter_context(sole_writer(self.config.run_dir, "set run_dir to a new folder"))
        except ValueError as error:
            return str(error)
        return None

    @property
    def context_parallel_group(self) -> Any:
        """The ranks over which this rank's sequences are divided; None when it holds them whole."""
        return mpu.get_context_parallel_group() if self.layout.context > 1 else None

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def restore(self) -> tuple[dict[str, Any], bytes] | None:
        """Load the newest whole checkpoint. Return the driver's state and carried samples, or None in a new run.
        Collective."""
        found = self.checkpoints.restore(self.trainer) if self.resume else None
        self._has_resumed = found is not None
        if self.resume and found is None and self.is_rank_zero:
            num_steps = sum(1 for _ in metric_rows(self.config.run_dir / "metrics.jsonl"))
            if num_steps:
                log.warning(
                    "there is no checkpoint in %s, so the run goes on from step 0; the %d steps in metrics.jsonl are "
                    "trained again",
                    self.config.run_dir / "checkpoints",
                    num_steps,
                )
        return found

    def accept(self, step: int) -> None:
        """Record in the run directory what runs there. Call it on rank 0 when nothing can refuse this start any more.
        step: the number of steps after which the start goes on."""
        record_start(self.config, step, self.resume)

    def tell(self, steps: tuple[int, int], urls: Sequence[str] | None = None) -> None:
        """Print what runs where. Runs on rank 0. steps: the first, and how many the run has. urls: of its servers."""
        if self.is_rank_zero:
            what = "a GPU each" if device.on_cuda() else "the CPU"
            say(overview(self.config, self.architecture, self.layout, own_place(), what, steps, urls))

    def tell_end(self, command: str, num_steps: int) -> None:
        """Print where the model or the newest checkpoint is, and what comes next. Runs on rank 0."""
        if self.is_rank_zero:
            latest = newest(self.config.run_dir / "checkpoints")
            say(ending(self.config, command, self.exit_code, latest, num_steps))

    def save(self, step: int, driver: dict[str, Any], carried: bytes = b"") -> None:
        """Save a checkpoint after `step` completed steps. Collective. It may be written beside training; see
        `settle`."""
        self.watchdog.enter("save", step)
        self._saved_at = time.monotonic()
        self.checkpoints.save(step, self.trainer, driver, carried)

    def save_is_due(self, step: int, last: int) -> bool:
        """Tell whether a checkpoint is due after `step` completed steps of `last`; after the last one it always is.
        Collective. Where time decides, rank 0's clock counts."""
        train = self.config.train
        if step == last or (train.save_every > 0 and step % train.save_every == 0):
            return True
        late = self.is_rank_zero and time.monotonic() - self._saved_at > 60 * train.save_minutes
        return train.save_minutes > 0 and self.any_rank(late)

    def settle(self, wait: bool = False) -> None:
        """Hear what became of a save. Collective, at every step boundary, and with `wait` before the run ends
        (checkpointing/checkpoints.py)."""
        if wait:
            self.watchdog.enter("save", self.watchdog.step)
        self.checkpoints.settle(wait)

    @property
    def stop_code(self) -> int:
        """Return the exit code of a run that a signal stops here, after `settle(wait=True)`. The same on all ranks."""
        can_resume = self._has_resumed or self.checkpoints.latest is not None
        return EXIT_STOPPED if can_resume else EXIT_INTERRUPTED

    def any_rank(self, flag: bool) -> bool:
        """Return true on every rank when `flag` is true on one. Collective."""
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def memory_metrics(self) -> dict[str, float]:
        """Return the most memory that this rank's GPU held since `device.reset_peak_memory`; nothing on a CPU, which
        cannot tell."""
        return {"peak_memory_gb": device.peak_memory_bytes() / 2**30} if device.on_cuda() else {}

    def export(self, destination: Path, notes: dict[str, str] | None = None) -> None:
        """Write a Hugging Face directory of the present weights. Collective. notes: text by the name of its file
        there."""
        self.watchdog.enter("export", self.watchdog.step)
        export_directory(self.model, self.config.model.path, destination, self.control, notes)

    def close(self, state: str = "ended", message: str = "") -> None:
        """Leave the training world, together with the other ranks. Whoever starts ranks ends those that are left when
        one has ended, and rank 0 has servers to end first. `end_rank` does the rest where some are gone."""
        self.watchdog.enter("close", self.watchdog.step)
        try:
            self.any_rank(False)
            are_all_here = True
        except RuntimeError:
            are_all_here = False
        self._end(state, message)
        if are_all_here:
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Leave the training world. After an error of this rank alone the others may be in a collective, so nothing is
        done that waits for them: this rank stays in its groups, which end with the process (`end_rank`)."""
        ending = _ending(error, self.exit_code)
        if kind is None or issubclass(kind, SharedFault):
            self.close(*ending)
        else:
            self.watchdog.enter("close", self.watchdog.step)
            self._end(*ending)

    def _end(self, state: str, message: str) -> None:
        self.checkpoints.close()
        self.watchdog.close(state, message)
        self._claimed.close()


def _ending(error: BaseException | None, exit_code: int) -> tuple[str, str]:
    """Return how a run ended, as its heartbeat says it, and why."""
    if error is None:
        return ("ended" if exit_code == EXIT_DONE else "stopped"), ""
    if isinstance(error, StopRequested | KeyboardInterrupt):
        return "stopped", str(error)
    return ("refused" if isinstance(error, ValueError) else "failed"), str(error) or type(error).__name__
