"""Takes new weights from the training ranks to the servers. Every rank takes part; rank 0 knows the servers."""

import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from megatron_rl.rollout.client import RequestRefused, ServerError, ServerLost
from megatron_rl.rollout.member import Member
from megatron_rl.rollout.pool import ServerPool
from megatron_rl.sync.folder import WeightFolder

log = logging.getLogger(__name__)
T = TypeVar("T")


class Runs(Protocol):
    """Runs work on the event loop that the pool belongs to, until it is done."""

    def __call__(self, work: Coroutine[Any, Any, T], /) -> T: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Receivers:
    """Gives rank 0 its way to the servers. late: the push is for those alone that came back behind the last one, and
    has its weights; the others generate meanwhile."""

    pool: ServerPool
    run: Runs
    late: bool = False


@dataclass(slots=True)
class PushSeconds:
    """Counts what rank 0 spent a push on; what ran beside it counts only where it had to be waited for.

    export: until the tensors were gathered and under their names, or written. send: until buckets had arrived.
    install: from the last byte until the servers answer by the new weights.
    """

    export: float = 0.0
    send: float = 0.0
    install: float = 0.0

    @contextmanager
    def of(self, part: Literal["export", "send", "install"]) -> Iterator[None]:
        """Count the time of the block for a part."""
        started = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + time.perf_counter() - started)


class Transport(Protocol):
    """Takes weights to the servers.

    push: collective. Afterwards every server that gets work has the present weights and answers as `version`. Returns
    where the time went.

    What goes wrong at the servers is raised on rank 0 alone, after the collectives have ended, so rank 0 can tell the
    others. receivers: on rank 0, None elsewhere. close: gives back what the transport holds.
    """

    def push(self, version: int, receivers: Receivers | None) -> PushSeconds: ...

    def close(self) -> None: ...


class DiskTransport:
    """Takes weights through a folder that the servers read: memory-backed on one machine, else on the shared file
    system."""

    def __init__(self, folder: WeightFolder, export: Callable[[Path], None], written: int | None = None) -> None:
        """Use this folder. export: collective; writes a model directory of the present weights. written: the version
        that is in the folder already."""
        self._folder, self._export, self._written = folder, export, written

    def push(self, version: int, receivers: Receivers | None) -> PushSeconds:
        seconds = PushSeconds()
        if version != self._written:
            with seconds.of("export"):
                self._export(self._folder.path)
            self._written = version
        if receivers is not None:
            with seconds.of("install"):
                receivers.run(receivers.pool.load_from_disk(self._folder.path, str(version)))
        return seconds

    def close(self) -> None:
        """Do nothing: the folder belongs to the run."""


async def members_to_update(receivers: Receivers) -> list[Member]:
    """Return all members that shall have the weights: those that serve, and those that came back and lack them. They
    come by url, so that a group of them stays the same where they do."""
    pool = receivers.pool
    members = pool.returned if receivers.late else [*pool.serving, *await pool.recovered()]
    return sorted(members, key=lambda member: member.client.url)


async def settle(
    receivers: Receivers,
    members: Sequence[Member],
    failed: Mapping[str, ServerError],
    version: str,
    is_fresh: bool,
) -> None:
    """Note the result of a push: `members` serve the weights as `version`. Raise ServerLost when some failed, or
    RequestRefused where another attempt would end like this one. failed: why, by url. is_fresh: nothing of an earlier
    push was relied on."""
    pool = receivers.pool
    if failed:
        for member in members:
            error = failed.get(member.client.url)
            if isinstance(error, ServerLost):
                pool.mark_down(member, str(error))
        # A server that is there but refuses has lost a peer, or is not the one that it was at the last push: again.
        # A fresh push that is refused though nobody was lost has a reason that will not go away.
        lost = any(isinstance(error, ServerLost) for error in failed.values())
        kind = ServerLost if lost or not is_fresh else RequestRefused
        reasons = "; ".join(map(str, failed.values()))
        raise kind(f"weights {version} did not reach all {len(members)} servers: {reasons}")
    pool.assume(None, version)
    for member in members:
        if member.out is not None:
            pool.mark_up(member)
    await pool.flush_caches(members)
