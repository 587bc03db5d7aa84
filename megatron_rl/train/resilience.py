"""Signals: the first asks the run to stop cleanly, the second stops it now."""

import logging
import os
import signal
from typing import Any

log = logging.getLogger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped cleanly, run again with --resume


class StopRequested(Exception):
    """Raised on rank 0 where a phase can be abandoned."""


class StopSignals:
    """Remembers SIGINT and SIGTERM. torchrun passes them on to every rank; rank 0 decides what they mean."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if self.name is not None:
            log.error("second signal (%s): stopping now", signal.Signals(number).name)
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        log.warning("%s: stopping after a checkpoint; once more to stop at once", self.name)

    def check(self) -> None:
        if self.name is not None:
            raise StopRequested(f"stopped by {self.name}")
