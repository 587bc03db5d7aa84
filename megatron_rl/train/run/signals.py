"""Handles signals: the first asks the run to stop cleanly, the second stops it now. Also says in words what lost ranks
and full memory mean."""

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import EXIT_INTERRUPTED, STOP_SIGNALS, Fault, StopRequested
from megatron_rl.place import own_place
from megatron_rl.train.run.watchdog import Watchdog

log = logging.getLogger(__name__)


class StopSignals:
    """Remembers SIGINT, SIGTERM and SIGUSR1; rank 0 decides what they mean.

    A Ctrl-C under torchrun comes twice, from the terminal and from torchrun, so what follows the first signal within
    `repeat_seconds` is the same request and not a second one.

    Slurm signals every process of a step, and SIGUSR1 ends whoever does not expect it: servers, workers, sandboxes.
    They inherit this thread's mask, in which it is blocked; a thread of its own takes it for this process.
    """

    repeat_seconds = 3.0

    def __init__(self) -> None:
        self.name: str | None = None
        self._since, self._leads = 0.0, own_place().rank == 0  # all ranks get the same signals
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        threading.Thread(target=self._take, name="sigusr1", daemon=True).start()

    def _take(self) -> None:
        while True:
            self._handle(signal.sigwait({signal.SIGUSR1}), None)

    def _handle(self, number: int, _: Any) -> None:
        if self.name is not None and time.monotonic() - self._since < self.repeat_seconds:
            return
        if self.name is not None:
            if self._leads:
                log.error("second signal (%s): stopping now", signal.Signals(number).name)
            os._exit(EXIT_INTERRUPTED)
        self.name, self._since = signal.Signals(number).name, time.monotonic()
        if self._leads:
            log.warning("%s: stopping after a checkpoint; once more to stop at once", self.name)

    def check(self) -> None:
        if self.name is not None:
            raise StopRequested(f"stopped by {self.name}")


# Texts in torch's errors when another rank is gone, or does not answer.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "NCCL", "Gloo")
_NO_MEMORY = ("can't allocate memory", "out of memory")


def disk_fault(config: RunConfig, what: str, error: OSError) -> Fault | None:
    """Return the Fault to raise when something besides a checkpoint could not be written. Warn and return None where
    train.on_save_error says to go on."""
    free = shutil.disk_usage(config.run_dir).free
    message = f"{error.filename or config.run_dir}: {error.strerror} ({free:,} bytes are free); {what}"
    if config.train.on_save_error == "stop":
        return Fault(f"{message}. Make room and --resume, or set train.on_save_error = 'continue' to go on without")
    log.warning("%s (train.on_save_error)", message)
    return None


@contextmanager
def told_in_words(watchdog: Watchdog) -> Iterator[None]:
    """Turn what torch raises when memory is full or another rank is lost into a Fault that says so."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, Fault):
            raise
        said = str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in said for part in _NO_MEMORY):
            raise Fault(
                f"{watchdog.place}: out of memory ({said.splitlines()[0] if said else 'MemoryError'}); lower "
                "train.micro_batch_tokens, set model.recompute = 'full', or divide the model over more ranks "
                "(parallel.tensor, parallel.expert, parallel.pipeline)"
            ) from error
        if any(part in said for part in _LOST):
            raise Fault(
                f"{watchdog.place}: lost contact with another rank ({said.splitlines()[0]}); the first error in the "
                "logs of the others says why. Start again with --resume"
            ) from error
        raise
