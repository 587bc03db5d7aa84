"""How new weights get from the training ranks to the servers. Every rank takes part; rank 0 knows the servers."""

import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_rl.rollout.pool import ServerPool
from megatron_rl.sync.folder import WeightFolder

log = logging.getLogger(__name__)
T = TypeVar("T")


class Runs(Protocol):
    """Runs work on the event loop that the pool belongs to, until it is done."""

    def __call__(self, work: Coroutine[Any, Any, T], /) -> T: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Receivers:
    """Rank 0's way to the servers."""

    pool: ServerPool
    run: Runs


class Transport(Protocol):
    """push: collective. Afterwards every server that gets work has the present weights and answers as `version`.

    What goes wrong at the servers is raised on rank 0 alone, after the collectives have ended, so rank 0 can tell the
    others. receivers: on rank 0, None elsewhere. close: gives back what the transport holds.
    """

    def push(self, version: int, receivers: Receivers | None) -> None: ...

    def close(self) -> None: ...


class DiskTransport:
    """Through a folder that the servers read: memory-backed on one machine, else on the shared file system."""

    def __init__(self, folder: WeightFolder, export: Callable[[Path], None], written: int | None = None) -> None:
        """export: collective; writes a model directory of the present weights. written: the version that is in the
        folder already."""
        self._folder, self._export, self._written = folder, export, written

    def push(self, version: int, receivers: Receivers | None) -> None:
        if version != self._written:
            self._export(self._folder.path)
            self._written = version
        if receivers is not None:
            receivers.run(receivers.pool.load_from_disk(self._folder.path, str(version)))

    def close(self) -> None:
        """The folder belongs to the run."""
