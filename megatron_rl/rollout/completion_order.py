"""Runs many coroutines, a bounded number at a time, and yields each result as soon as it is there."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")


async def in_order_of_completion(work: Iterator[Coroutine[Any, Any, T]], most: int) -> AsyncGenerator[T, None]:
    """Yield the results of the coroutines in the order in which they complete. The first failure cancels the others.

    At most `most` coroutines have begun and not had their result taken, which bounds memory.
    """
    ended: asyncio.Queue[asyncio.Task[T]] = asyncio.Queue()
    begun: set[asyncio.Task[T]] = set()
    try:
        while True:
            for one in islice(work, most - len(begun)):
                task = asyncio.create_task(one)
                begun.add(task)
                # A queue, because asyncio.wait for the first one would go through all of them, each time.
                task.add_done_callback(ended.put_nowait)
            if not begun:
                return
            done = await ended.get()
            begun.remove(done)
            yield done.result()
    finally:
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
