"""Signals: the first asks the run to stop cleanly, the second stops it now."""

import logging
import os
import signal
import time
from typing import Any

log = logging.getLogger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped cleanly, run again with --resume


class StopRequested(Exception):
    """Raised on rank 0 where a phase can be abandoned."""


class StopSignals:
    """Remembers SIGINT and SIGTERM; rank 0 decides what they mean.

    A Ctrl-C under torchrun comes twice, from the terminal and from torchrun, so what follows the first signal within
    `repeat_seconds` is the same request and not a second one.
    """

    repeat_seconds = 3.0

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if self.name is not None and time.monotonic() - self._since < self.repeat_seconds:
            return
        if self.name is not None:
            log.error("second signal (%s): stopping now", signal.Signals(number).name)
            os._exit(128 + number)
        self.name, self._since = signal.Signals(number).name, time.monotonic()
        log.warning("%s: stopping after a checkpoint; once more to stop at once", self.name)

    def check(self) -> None:
        if self.name is not None:
            raise StopRequested(f"stopped by {self.name}")
