"""Runs a function that may block in a thread, and lets an event loop await its result."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[[], T]) -> T:
    """Run a function in a daemon thread. It does not keep the process alive, since a peer may make it wait for long."""
    future: Future[T] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()  # a caller that leaves does not cancel it any more
        try:
            future.set_result(function())
        except BaseException as error:  # the caller's, whatever it is
            future.set_exception(error)

    threading.Thread(target=run, name="update", daemon=True).start()
    return await asyncio.wrap_future(future)
