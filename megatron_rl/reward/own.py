"""Reward functions of the user's own, in workers with limits: an item may hang, crash or fill memory, and costs itself.

Functions of one response get the responses to a prompt one at a time while that takes long, and all at once where they
are fast, since an item costs more than they do. What such a bunch does to its worker is then found out one by one.
"""

import asyncio
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pebble import ProcessExpired

from megatron_rl.config.reward import RewardSection
from megatron_rl.errors import Fault
from megatron_rl.reward import own_worker
from megatron_rl.reward.own_worker import OVER_MEMORY, Setup, Signature
from megatron_rl.reward.score import Attempt, Task, of_group, of_response, of_task
from megatron_rl.reward.verdict import Verdict, make_verdict
from megatron_rl.reward.workers import WAITING_PER_WORKER, Workers

log = logging.getLogger(__name__)

OUTPUT = "reward_output.log"
# Reading a file with torch or a model in it may take minutes.
_START_SECONDS = 300.0
_LOOK_SECONDS = 0.5
_MAX_ENDED = 2  # workers that may end while they import the file, before it is said
_FAST_SECONDS = 0.005  # of one call, below which all responses to a prompt are one item
_GRACE_SECONDS = 2.0  # for an async function to end those of its calls that take too long
_TOLD = 3  # errors that are logged whole


class OwnReward:
    """One function and its workers. `close()` ends them."""

    def __init__(self, name: str, section: RewardSection, folder: Path | None) -> None:
        """folder: takes the file of its output. ValueError for a function that cannot be called."""
        self._name, self._section = name, section
        self._output = (folder or Path(tempfile.gettempdir())) / OUTPUT
        handle, starts = tempfile.mkstemp(prefix="reward_starts_")
        os.close(handle)
        setup = Setup(
            starts=Path(starts),
            name=name,
            where="reward.kind",
            passing_score=section.passing_score,
            memory_bytes=section.memory_bytes,
            output=self._output.absolute(),
        )
        self._workers = Workers(section.workers, own_worker.start_worker, (setup,))
        self._room: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None
        self._seconds = _FAST_SECONDS  # of a call, a moving mean
        self._num_failed = 0
        try:
            self._signature = self._described(setup.starts)
        except BaseException:
            self.close()
            raise
        finally:
            setup.starts.unlink()

    async def verdicts(self, task: Task, attempts: Sequence[Attempt]) -> list[Verdict]:
        """One for each response, in their order. Does not block the event loop; cancelling it ends the work on it."""
        shared = self._wanted(of_task(task))
        if self._signature.takes_group:
            arguments = shared | self._wanted(of_group(attempts))
            found = await self._judged(own_worker.judge_group, (arguments, len(attempts)), len(attempts))
        else:
            found = await self._each(shared, [self._wanted(of_response(attempt)) for attempt in attempts])
        for verdict in found:
            self._note(verdict, task)
        return found

    def close(self) -> None:
        self._workers.close()

    async def _each(self, shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        limit = self._section.timeout_seconds
        if len(own) > 1 and (self._signature.is_async or self._seconds < _FAST_SECONDS):
            try:
                return await self._run(own_worker.judge_each, (shared, own, limit))
            except (TimeoutError, OSError):  # one of them hung, or ended the worker
                pass

        async def alone(arguments: Mapping[str, Any]) -> Verdict:
            (verdict,) = await self._judged(own_worker.judge_each, (shared, [arguments], limit), 1)
            return verdict

        found = await asyncio.gather(*map(alone, own))
        self._seconds += 0.2 * (sum(verdict.seconds for verdict in found) / len(found) - self._seconds)
        return list(found)

    async def _judged(
        self, function: Callable[..., list[Verdict]], arguments: tuple[Any, ...], count: int
    ) -> list[Verdict]:
        try:
            return await self._run(function, arguments)
        except TimeoutError:
            limit = self._section.timeout_seconds
            return [make_verdict("timeout", limit, f"not done after {limit:g} s (reward.timeout_seconds)")] * count
        except OSError as error:
            return [make_verdict("error", details=self._ended(error))] * count

    async def _run(self, function: Callable[..., list[Verdict]], arguments: tuple[Any, ...]) -> list[Verdict]:
        """TimeoutError, or OSError where the worker has ended. Fault where none can start."""
        async with self._semaphore():
            for _ in range(2):  # pebble gives up its pool where a worker ends while it has nothing to do
                try:
                    return await asyncio.wrap_future(self._scheduled(function, arguments))
                except BrokenProcessPool:
                    continue
        raise Fault(f"{self._name}: its workers end before they take a response; see {self._output}")

    def _scheduled(self, function: Callable[..., list[Verdict]], arguments: tuple[Any, ...]) -> "Future[list[Verdict]]":
        seconds = self._section.timeout_seconds + (_GRACE_SECONDS if self._signature.is_async else 0.0)
        return self._workers.schedule(function, arguments, seconds)

    def _semaphore(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._room is None or self._room[0] is not loop:
            self._room = loop, asyncio.Semaphore(WAITING_PER_WORKER * self._section.workers)
        return self._room[1]

    def _wanted(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in self._signature.parameters}

    def _described(self, starts: Path) -> Signature:
        """Loads the function in the first worker. ValueError with what is wrong with it."""
        future = self._workers.schedule(own_worker.described, (), _START_SECONDS)
        deadline = time.monotonic() + _START_SECONDS
        try:
            while not futures.wait([future], timeout=_LOOK_SECONDS).done:
                if time.monotonic() > deadline:
                    raise TimeoutError
                if own_worker.num_unfinished(starts) > self._section.workers + _MAX_ENDED:
                    raise ProcessExpired("", code=0)  # pebble starts others without a word
            found = future.result(0)
        except FutureTimeout:
            raise ValueError(
                f"reward {self._name}: its file is not imported after {_START_SECONDS:g} s; it may wait for something"
            ) from None
        except (BrokenProcessPool, OSError) as error:
            raise ValueError(
                f"reward {self._name}: the worker that imports its file ended ({self._ended(error)}); see "
                f"{self._output}"
            ) from None
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _ended(self, error: BaseException) -> str:
        """Say how a worker has ended."""
        code = getattr(error, "exitcode", None)
        if code == -OVER_MEMORY:
            return f"it took more than {self._section.memory_bytes / 2**30:.3g} GiB of memory (reward.memory_bytes)"
        if isinstance(code, int):
            return f"it ended its worker by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        return f"{type(error).__name__}: {error!s:.200}"

    def _note(self, verdict: Verdict, task: Task) -> None:
        """Log the first errors; the others are counted."""
        if verdict.reason not in ("error", "timeout"):
            return
        self._num_failed += 1
        if self._num_failed <= _TOLD:
            more = f"; further ones are only counted. What it prints is in {self._output}"
            told = more if self._num_failed == _TOLD else ""
            log.warning("reward %s, prompt %s: %s: %s%s", self._name, task.id, verdict.reason, verdict.details, told)
