"""Runs processes that can be killed at any moment, and are replaced when they end."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from pebble import ProcessPool

# Items handed to the workers ahead of time. More would only hold memory, and wait longer once a pool is cancelled.
WAITING_PER_WORKER = 16

T = TypeVar("T")


class Workers:
    """Owns `count` processes, which start with the first item. `close()` ends them, also a busy one.

    They come from a forkserver, so they inherit neither CUDA nor threads.
    """

    def __init__(
        self,
        count: int,
        initialize: Callable[..., None],
        arguments: tuple[Any, ...],
        max_items: int = 0,
        preload: str | None = None,
    ) -> None:
        """Set up the workers. initialize: runs in each new worker, with the arguments. max_items: after which a worker
        is replaced; 0: never. preload: see `pool.RewardKind`. Functions are pickled by name, so they live at the top of
        a module."""
        self._count, self._initialize, self._arguments = count, initialize, arguments
        self._max_items, self._preload = max_items, preload
        self._processes: ProcessPool | None = None

    def schedule(self, function: Callable[..., T], arguments: tuple[Any, ...], timeout_seconds: float) -> "Future[T]":
        """Call the function in a worker. The future's error is a TimeoutError, pebble's ProcessExpired (with an exit
        code) when the worker ended, BrokenProcessPool when no worker could take the item, or what was raised."""
        # pebble gives up the whole pool when a worker dies while idle (say, to the kernel's OOM killer).
        if self._processes is not None and not self._processes.active:
            self.close()
        if self._processes is None:
            context = multiprocessing.get_context("forkserver")
            if self._preload:
                context.set_forkserver_preload(["__main__", self._preload])
            self._processes = ProcessPool(
                max_workers=self._count,
                max_tasks=self._max_items,
                initializer=self._initialize,
                initargs=self._arguments,
                context=context,
            )
        return self._processes.schedule(function, args=arguments, timeout=timeout_seconds)

    def close(self) -> None:
        """End every process. Safe to call twice; a later item starts new processes."""
        if self._processes is not None:
            self._processes.stop()
            self._processes.join()
            self._processes = None
