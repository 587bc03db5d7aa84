"""Writes what people read of a step, responses and token traces, in a thread beside training."""

import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import Fault
from megatron_rl.files import whole_file
from megatron_rl.train.run.signals import disk_fault

# The thread that launches the operations of training waits for every line that is made here, so as a share of the time
# that is not much: a GPU has that much work before it.
_SHARE = 0.25
# The samples of a file are in memory until it is written.
_MOST_FILES = 2


class StepFiles:
    """Owns the thread that writes the files. Files are written one after the other, and each is there whole or not at
    all.

    No checkpoint may cover a step before `settle` has returned for its files: a resumed run does not write them again.
    `close()` writes what is left.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step-files")
        self._files: deque[Future[None]] = deque()
        self._is_waited_for = threading.Event()

    def write(self, path: Path, lines: Iterable[str], lost: str) -> None:
        """Begin to write a file, whose lines are made in the thread. Waits only where two files are unfinished.

        lost: what a full disk costs, for its message. What fails is raised by `check` or returned by `settle`.
        """
        left = [file for file in self._files if not file.done()]
        self._wait(left[: len(left) - _MOST_FILES + 1])
        self._files.append(self._thread.submit(self._write, path, lines, lost))

    def check(self) -> None:
        """Raise what has failed so far. Waits for nothing."""
        while self._files and self._files[0].done():
            self._files.popleft().result()

    def settle(self) -> Fault | None:
        """Wait until all files are on the disk. Return the Fault after which train.on_save_error does not let a run go
        on, if there is one."""
        self._wait(self._files)
        try:
            self.check()
        except Fault as fault:
            return fault
        return None

    def close(self) -> None:
        self._is_waited_for.set()
        self._thread.shutdown()

    def _wait(self, files: Iterable[Future[None]]) -> None:
        self._is_waited_for.set()
        wait(files)
        self._is_waited_for.clear()

    def _write(self, path: Path, lines: Iterable[str], lost: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, is_durable=True) as file:
                began = time.thread_time()
                for line in lines:
                    file.write(line)
                    ended = time.thread_time()
                    self._is_waited_for.wait((ended - began) * (1 / _SHARE - 1))
                    began = time.thread_time()
        except OSError as error:
            if fault := disk_fault(self._config, lost, error):
                raise fault from error
