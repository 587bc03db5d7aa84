"""Runs collective work that may fail on one rank, so that all ranks learn of the failure at the same point."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rl.errors import SharedFault

log = logging.getLogger(__name__)
T = TypeVar("T")


def on_all_ranks(work: Callable[[], Any] | None, group: Any) -> list[Any]:
    """Run each rank's work, and return all results by rank, once all ranks are done. Collective.

    Raise SharedFault on all ranks when the work of one failed, with its reason. work: None for a rank that has none.
    """
    mine: tuple[Any, str | None] = None, None
    try:
        if work is not None:
            mine = work(), None
    except Exception as error:  # whatever it is, the other ranks wait to be told
        mine = None, f"rank {dist.get_rank()}: {_told(error)}"
    found = gather_objects(mine, group)
    for _, failure in found:
        if failure is not None:
            raise SharedFault(failure)
    return [result for result, _ in found]


def gather_objects(value: T, group: Any) -> list[T]:
    """Return what each rank of the group has, by rank. Collective."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def broadcast_object(value: T | None, source: int, group: Any) -> T:
    """Return what rank `source` has; the others give None. Collective."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    found: T = box[0]
    return found


def _told(error: BaseException) -> str:
    """Say in words what an error is: the OSError that it began with, if it did. torch.save on a full disk ends in a
    RuntimeError about its own position."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    log.error("unexpected failure", exc_info=error)
    return repr(error)
