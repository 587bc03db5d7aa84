"""Saves and restores the checkpoints of a run. Each is whole or not there, whatever goes wrong while it is written or
afterwards.

`checkpoints/` holds `step_N/` directories and `latest`, a file with the newest one's name that is replaced atomically
after everything in it is on disk. A `step_N/` holds `megatron/` (train/checkpointing/state.py), `driver.json` (step,
cursor, counters), `carried.npz` (surplus responses), config.json and the tokenizer, so that it is a checkpoint like a
converted one (checkpoint/read.py), and `checksums.json` of all that.

Saving has three parts. Planning and copying are collective on the groups that train, so training waits for them.
Writing is every rank's own. The end (index, checksums, rename, `latest`) is rank 0's, between collectives on a group
that nothing else uses; so the last two parts may run in a thread beside training. All ranks learn the result at a step
boundary, on the control group, and then raise or go on together.
"""

import datetime
import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.checkpoint import steps
from megatron_rl.checkpoint.adapters import NOTE, AdapterNote, refuse_other_adapters
from megatron_rl.checkpoint.checksums import checksum_on_disk, damage, sync, write_checksums
from megatron_rl.checkpoint.distributed import MEGATRON
from megatron_rl.checkpoint.hf import changed_companions, copy_companions
from megatron_rl.config.train import TrainSection
from megatron_rl.errors import SharedFault
from megatron_rl.sync.all_ranks import on_all_ranks
from megatron_rl.train.checkpointing import state
from megatron_rl.train.checkpointing.save import Save, Written

log = logging.getLogger(__name__)


class Checkpoints:
    """Owns the directory of the checkpoints and the save that is under way. All methods but `close` are collective.

    latest: the step of the newest one that is on disk for certain, as far as this process made or loaded it.
    num_failed_saves: since this process was started; more than 0 only with train.on_save_error = "continue". best: on
    rank 0, the step of one that stays, however old it gets.
    """

    def __init__(
        self, directory: Path, config: TrainSection, model_dir: Path, control: Any, note: AdapterNote | None = None
    ) -> None:
        """Remove what a killed save left in the directory. model_dir: where config.json and the tokenizer come from.
        control: a gloo group of all ranks. note: of the adapters that are trained; None where all weights are."""
        self._note = note
        self._directory, self._config, self._model_dir, self._control = directory, config, model_dir, control
        deadline = datetime.timedelta(seconds=config.phase_deadline_seconds)
        self._group: Any = dist.new_group(backend="gloo", timeout=deadline)  # of the threads that write
        self._leads = dist.get_rank() == 0
        self.latest: int | None = None
        self.best: int | None = None
        self._under_way: Save | None = None
        self._needed_bytes = 0  # for the last one
        self.num_failed_saves = 0
        if self._leads:
            steps.remove_partial(self._directory)  # what a kill left

    def save(self, step: int, trainer: Any, driver: dict[str, Any], carried: bytes) -> None:
        """Save a checkpoint after `step` steps. It is there for certain after `settle(wait=True)`. driver, carried:
        rank 0's. Raise SharedFault as `settle` does."""
        self._wait_for_the_one_before(step)
        if step == self.latest:
            return  # a stop right after a scheduled save
        asynchronous = self._config.async_save
        try:
            part = self._plan(step, trainer)
        except SharedFault as fault:
            self._fail(step, str(fault))
            return
        part.to_host(copy=asynchronous)
        contents = {"driver.json": json.dumps(driver, indent=1).encode(), "carried.npz": carried}
        if self._note is not None:
            contents[NOTE] = self._note.text().encode()
        finish = partial(self._finish, step, part, contents, trainer.model.dtype)
        self._under_way = Save(step, part, finish, self._group)
        self._under_way.start(beside=asynchronous)
        self.settle(wait=not asynchronous)

    def settle(self, wait: bool = False) -> bool:
        """Learn, at a step boundary, what became of a save that has ended. wait: until it has ended. Return False while
        a save is under way. Raise SharedFault when it failed and train.on_save_error is "stop"."""
        save = self._under_way
        if save is None:
            return True
        if wait:
            save.join()
        ends = on_all_ranks(lambda: (save.done, save.failure), self._control)
        if not all(done for done, _ in ends):
            return False
        self._under_way = None
        failure = next((failure for _, failure in ends if failure is not None), None)
        if failure is None:
            self.latest = save.step
        else:
            self._fail(save.step, failure)
        return True

    def restore(self, trainer: Any) -> tuple[dict[str, Any], bytes] | None:
        """Load the newest checkpoint that is as it was written. Return the driver's state and the carried responses, or
        None when there is no checkpoint at all. Raise ValueError when all are damaged, or hold other adapters."""
        damaged: dict[str, list[str]] = {}
        for path in on_all_ranks(lambda: steps.candidates(self._directory), self._control)[0]:
            shares = on_all_ranks(partial(damage, path, dist.get_rank(), dist.get_world_size()), self._control)
            if found := [line for share in shares for line in share]:
                damaged[path.name] = found
                continue
            refuse_other_adapters(path, self._note)
            log.info("resuming from %s", path)
            on_all_ranks(partial(_tell_changes, self._model_dir, path) if self._leads else None, self._control)
            state.load(path / MEGATRON, trainer)
            on_all_ranks(partial(_use_instead, path, damaged) if damaged and self._leads else None, self._control)
            driver = json.loads((path / "driver.json").read_text(encoding="utf-8"))
            self.latest = driver["step"] if path.name == f"step_{driver['step']}" else None
            return driver, (path / "carried.npz").read_bytes()
        if damaged:
            raise ValueError(
                f"no checkpoint in {self._directory} is whole: {_listed(damaged)}; restore one, or start anew in "
                "another run_dir"
            )
        return None

    def close(self) -> None:
        """Wait until this rank's part of a save that is under way is on the disk."""
        if self._under_way is None:
            return
        self._under_way.join()
        if self._under_way.failure is not None and self._leads:
            steps.remove_partial(self._directory)
            log.error("checkpoint step_%d was not written: %s", self._under_way.step, self._under_way.failure)
        self._under_way = None

    def _wait_for_the_one_before(self, step: int) -> None:
        if self._under_way is not None and not self._under_way.done and self._leads:
            log.warning(
                "step %d: waiting until the checkpoint of step %d is written; train.save_every is short for this disk",
                step,
                self._under_way.step,
            )
        self.settle(wait=True)

    def _plan(self, step: int, trainer: Any) -> state.Part:
        """Plan the part of the checkpoint that this rank writes. Raise SharedFault when nothing can be written into the
        directory, or the disk has too little room."""
        folder = steps.partial_path(self._directory, step) / MEGATRON

        def make() -> None:
            steps.remove_partial(self._directory)
            folder.mkdir(parents=True)

        self._needed_bytes = 0
        on_all_ranks(make if self._leads else None, self._control)
        part = state.Part(trainer, folder)
        told = on_all_ranks(lambda: (part.num_bytes, _free_bytes(folder)), self._control)
        self._needed_bytes, free = sum(num_bytes for num_bytes, _ in told), told[0][1]
        if self._needed_bytes > free:
            raise SharedFault("too little room")
        return part

    def _finish(
        self, step: int, part: state.Part, contents: dict[str, bytes], dtype: torch.dtype, written: Written
    ) -> None:
        """Make what the ranks have written the newest checkpoint. Runs on rank 0."""
        folder, final = steps.partial_path(self._directory, step), steps.step_path(self._directory, step)
        part.finish([account for account, _ in written])
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        copy_companions(self._model_dir, folder, dtype)
        files = {f"{MEGATRON}/{name}": checksum for _, own in written for name, checksum in own.items()}
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in files:
                files[name] = checksum_on_disk(path)
        write_checksums(folder, files)
        sync(folder / MEGATRON)
        sync(folder)
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        steps.point_to(final)
        steps.forget_old(final, self._config.keep_last, self._config.keep_every, self.best)

    def _fail(self, step: int, failure: str) -> None:
        if self._leads:
            steps.remove_partial(self._directory)
        path, free = steps.step_path(self._directory, step), _free_bytes(self._directory)
        message = (
            f"checkpoint {path} was not written: {failure} ({self._needed_bytes:,} bytes are needed, {free:,} are free)"
        )
        if self._config.on_save_error == "stop":
            raise SharedFault(
                f"{message}; make room and --resume from the one before, or set train.on_save_error = 'continue' to "
                "train on without it"
            )
        self.num_failed_saves += 1
        if self._leads:
            log.warning("%s; training goes on (train.on_save_error), the one before stays", message)


def _free_bytes(directory: Path) -> int:
    return shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free


def _tell_changes(model_dir: Path, path: Path) -> None:
    if changed := changed_companions(model_dir, path):
        log.warning(
            "%s of %s: changed since this checkpoint was made; with another tokenizer, chat template or end token the "
            "model reads other tokens from now on",
            ", ".join(changed),
            model_dir,
        )


def _use_instead(path: Path, damaged: dict[str, list[str]]) -> None:
    log.warning("damaged: %s; going on from %s instead", _listed(damaged), path.name)
    steps.point_to(path)
    for name in damaged:
        steps.set_aside(path.with_name(name))


def _listed(damaged: dict[str, list[str]]) -> str:
    """Name the first few things that are wrong with each checkpoint."""
    parts = []
    for name, lines in damaged.items():
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        parts.append(f"{name} ({', '.join(lines[:3])}{more})")
    return "; ".join(parts)
