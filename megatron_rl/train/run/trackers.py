"""Sends the numbers of a run to programs that draw them (`tracking`). Each has a thread, so that none delays the run.

A tracker that fails costs a warning. metrics.jsonl has every number all the same.
"""

import contextlib
import importlib
import logging
import os
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_rl.config.schema import RunConfig
from megatron_rl.files import write_whole
from megatron_rl.parsing import read_text

log = logging.getLogger(__name__)

Numbers = Mapping[str, float]

_MOST_WAITING = 1000  # steps that a tracker may lag behind; a step is about a hundred numbers
_CLOSE_SECONDS = 60.0
_WRITTEN_SECONDS = 30.0  # after which what a tracker was told is on the disk: wandb's own process writes every 15
_SEND_SECONDS = 30.0  # in which wandb, at the end of a run, sends what its host has not taken yet


class Tracker(Protocol):
    """Takes the numbers of steps in their order; after a resume some steps come again. `close()` sends what waits."""

    def log(self, step: int, numbers: Numbers) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """Holds what a tracker knows of a run. id: the same after every resume. first_step: the first that it will be
    told."""

    config: RunConfig
    id: str
    first_step: int

    @property
    def name(self) -> str:
        return self.config.tracking.name or self.config.run_dir.resolve().name

    @property
    def values(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", exclude_none=True)


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.config.run_dir / "tensorboard"), purge_step=run.first_step)

    def log(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a kill shall not take the steps of two minutes

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Sends to wandb. Where its host does not answer, or nobody has logged in, the run is kept in run_dir/wandb for
    `wandb sync`."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        section = run.config.tracking
        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, finish_timeout=_SEND_SECONDS
        )
        options: dict[str, Any] = {
            "project": section.project,
            "group": section.group or None,
            "tags": section.tags,
            "name": run.name,
            "id": run.id,
            "resume": "allow",
            "dir": run.config.run_dir,
            "config": run.values,
            "settings": quiet,
        }
        wandb.setup(quiet)
        try:
            if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
                raise ValueError("nobody has logged in (`wandb login`, WANDB_API_KEY)")
            self._run = wandb.init(**options)
        except Exception as error:
            log.warning("wandb: %s; the run is kept in %s, `wandb sync` sends it", error, run.config.run_dir / "wandb")
            wandb.teardown()  # of what has failed, which holds the id
            self._run = wandb.init(**options, mode="offline")
        self._run.define_metric("*", step_metric="step")  # its own count goes on where a resume begins again

    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """Writes to trackio. It knows runs by their names and has no tags, so the name has the id in it, and tags are in
    the configuration."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        section = run.config.tracking
        self._run = trackio.init(
            project=section.project,
            name=f"{run.name}-{run.id}",
            group=section.group or None,
            config=run.values,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


# The module that each tracker needs, and its class, by its name.
TRACKERS: dict[str, tuple[str, Callable[[TrackedRun], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
    "trackio": ("trackio", _Trackio),
}


class _Told:
    """Runs one tracker in its thread. `log` never waits.

    last_step: the last that it had written down for certain when the run was started; -1: none.
    """

    def __init__(self, name: str, config: RunConfig, run_id: str, first_step: int, resume: bool) -> None:
        self._name, self._num_lost = name, 0
        self._path = _folder(config) / name
        self.last_step = _number(self._path) if resume else -1
        self._run = TrackedRun(config=config, id=run_id, first_step=min(first_step, self.last_step + 1))
        self._lately: deque[tuple[float, int]] = deque()  # when it was told which steps, that may not be written yet
        self._queue: queue.Queue[tuple[int, Numbers] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._tell, name=f"tracker-{name}", daemon=True)
        # Whatever these packages raise, it must not end a run: they only draw. Imported here, since two threads that
        # import what imports each other may find half a module.
        try:
            importlib.import_module(TRACKERS[name][0])
        except Exception as error:
            self._lose(error)
        else:
            self._thread.start()

    def log(self, step: int, numbers: Numbers) -> None:
        if not self._thread.is_alive():
            return  # it has said why
        try:
            self._queue.put_nowait((step, numbers))
        except queue.Full:
            self._lose(f"it is {_MOST_WAITING} steps behind")

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=seconds)
                self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("%s has not taken all steps within %g s; metrics.jsonl has them", self._name, seconds)
        elif self._num_lost > 1:
            log.warning("%s has not taken %d times what a step gave; metrics.jsonl has it", self._name, self._num_lost)

    def _lose(self, why: object) -> None:
        self._num_lost += 1
        if self._num_lost == 1:
            log.warning("%s fails: %s. The run goes on, metrics.jsonl has what is missing there", self._name, why)

    def _tell(self) -> None:
        try:
            tracker = TRACKERS[self._name][1](self._run)
        except Exception as error:
            self._lose(error)
            return
        while (told := self._queue.get()) is not None:
            try:
                tracker.log(*told)
                self._lately.append((time.monotonic(), told[0]))
                self._keep(time.monotonic() - _WRITTEN_SECONDS)
            except Exception as error:
                self._lose(error)
        try:
            tracker.close()
            self._keep(time.monotonic())
        except Exception as error:
            self._lose(error)

    def _keep(self, until: float) -> None:
        """Keep for a resume the last step that was told up to a moment of the monotonic clock."""
        step: int | None = None
        while self._lately and self._lately[0][0] <= until:
            _, step = self._lately.popleft()
        if step is not None:
            self._path.write_text(str(step), encoding="utf-8")


class Trackers:
    """Tells every tracker of `tracking.to` the numbers of each step. `close()` waits a minute for one that lags."""

    def __init__(self, config: RunConfig, first_step: int, resume: bool) -> None:
        run_id = _run_id(config, resume)
        self._told = [_Told(name, config, run_id, first_step, resume) for name in config.tracking.to]

    def log(self, step: int, numbers: Numbers) -> None:
        for one in self._told:
            one.log(step, numbers)

    def catch_up(self, step: int, numbers: Numbers) -> None:
        """Tell the numbers of a step of an earlier start to those trackers that had not been told them when it was
        killed."""
        for one in self._told:
            if step > one.last_step:
                one.log(step, numbers)

    def close(self) -> None:
        for one in self._told:
            one.close()


def _folder(config: RunConfig) -> Path:
    return config.run_dir / "tracking"


def _run_id(config: RunConfig, resume: bool) -> str:
    """Read the id by which trackers know this run; a new one for a new run."""
    path = _folder(config) / "id"
    if resume and path.is_file():
        return read_text(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = uuid.uuid4().hex[:12]
    write_whole(path, found)
    return found


def _number(path: Path) -> int:
    """Read a number that a kill may have cut short; -1 where there is none."""
    try:
        return int(read_text(path))
    except (OSError, ValueError):
        return -1
