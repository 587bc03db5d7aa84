"""Sends rows through `Inspector`, in this process or in several, in the order of the sources and never far ahead of
it."""

import multiprocessing
import os
import resource
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megatron_rl import lifeline
from megatron_rl.data.curation.config import CurationConfig
from megatron_rl.data.curation.contamination import Index
from megatron_rl.data.curation.inspect import Inspected, Inspector
from megatron_rl.data.curation.sources import Piece
from megatron_rl.errors import Fault

_AHEAD = 3  # pieces in flight for each worker

Task = tuple[int, int, Piece]  # number of the source, number of the file, rows
Done = tuple[Task, Inspected, int]  # peak memory in bytes of the worker, 0 for this process

_inspector: Inspector


def inspected(tasks: Iterable[Task], config: CurationConfig, index: Index | None) -> Iterator[Done]:
    """Yield each task with its result."""
    if config.workers == 1:
        inspector = Inspector(config, index)
        for task in tasks:
            yield task, inspector.inspect(*task), 0
        return
    # forkserver: a fork of a process with threads may hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # datasketch alone brings scipy: load it once
    arguments = (config, index, os.getpid())
    with ProcessPoolExecutor(config.workers, mp_context=context, initializer=_start, initargs=arguments) as pool:
        waiting: deque[tuple[Task, Future[tuple[Inspected, int]]]] = deque()
        try:
            for task in tasks:
                waiting.append((task, pool.submit(_run, task)))
                if len(waiting) >= _AHEAD * config.workers:
                    yield _next(waiting)
            while waiting:
                yield _next(waiting)
        finally:
            for _, future in waiting:
                future.cancel()


def _next(waiting: deque[tuple[Task, "Future[tuple[Inspected, int]]"]]) -> Done:
    task, future = waiting.popleft()
    try:
        return task, *future.result()
    except BrokenProcessPool:
        raise Fault("a worker process of the curation died, perhaps for want of memory; set fewer workers") from None


def _start(config: CurationConfig, index: Index | None, parent: int) -> None:
    global _inspector
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    os.environ[lifeline.PARENT_VARIABLE] = str(parent)
    lifeline.watch_parent()
    _inspector = Inspector(config, index)


def _run(task: Task) -> tuple[Inspected, int]:
    return _inspector.inspect(*task), peak_rss_bytes()


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
