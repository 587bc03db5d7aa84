"""Runs reward functions of the user's own in workers with limits: an item may hang, crash or fill memory, and costs
itself.

Functions of one response get the responses to a prompt one at a time while that takes long. Where they are fast, the
responses to several prompts are one item, since an item costs more than they do; what such a bunch does to its worker
is then found out one by one.
"""

import asyncio
import functools
import logging
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pebble import ProcessExpired

from megatron_rl.config.reward import RewardSection
from megatron_rl.errors import Fault
from megatron_rl.reward import own_worker
from megatron_rl.reward.own_worker import OVER_MEMORY, Asked, Packed, Setup, Signature, unpacked
from megatron_rl.reward.score import Attempt, Task, columns_of, of_group, of_task
from megatron_rl.reward.verdict import GAVE_UP, Verdict, make_verdict
from megatron_rl.reward.workers import WAITING_PER_WORKER, Workers

log = logging.getLogger(__name__)

OUTPUT = "reward_output.log"
# Reading a file with torch or a model in it may take minutes.
_START_SECONDS = 300.0
_LOOK_SECONDS = 0.5
_MAX_ENDED = 2  # workers that may end while they import the file before that is an error
_FAST_SECONDS = 0.005  # a call that takes less is fast: the responses to several prompts are one item
_SPARE = 4  # such an item may take this many times longer than expected, within the limit of one call
_PROMPTS_PER_ITEM = 16  # where functions are fast
_ITEMS_PER_WORKER = 2  # items that run or wait for a worker, so that it never waits itself
_GRACE_SECONDS = 2.0  # for an async function to end those of its calls that take too long
_TOLD = 3  # errors that are logged whole

T = TypeVar("T")


@dataclass(slots=True)
class _Turns:
    """Holds what waits for workers in an event loop. room: for items. waiting: prompts that are not in one yet."""

    loop: asyncio.AbstractEventLoop
    room: asyncio.Semaphore
    waiting: deque[tuple[Asked, "asyncio.Future[list[Packed]]"]] = field(default_factory=deque)
    running: set["asyncio.Task[None]"] = field(default_factory=set)


class OwnReward:
    """Owns one function and its workers. `close()` ends them."""

    def __init__(self, name: str, section: RewardSection, folder: Path | None) -> None:
        """Load the function. folder: takes the file of its output. Raise ValueError for a function that cannot be
        called."""
        self._name, self._section = name, section
        self._output = (folder or Path(tempfile.gettempdir())) / OUTPUT
        handle, starts = tempfile.mkstemp(prefix="reward_starts_")
        os.close(handle)
        setup = Setup(
            starts=Path(starts),
            name=name,
            where=section.key_of(name),
            passing_score=section.passing_score,
            memory_bytes=section.memory_bytes,
            output=self._output.absolute(),
        )
        self._workers = Workers(section.workers, own_worker.start_worker, (setup,))
        self._of_loop: _Turns | None = None
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
        """Return one verdict for each response, in their order. Does not block the event loop; cancelling it ends the
        work on it."""
        wanted, count = self._signature.parameters, len(attempts)
        shared = of_task(task, wanted)
        if self._signature.takes_group:
            arguments = shared | {name: of_all for name, of_all in of_group(attempts).items() if name in wanted}
            found = await self._judged(own_worker.judge_group, (arguments, count), count)
        else:
            found = await self._each(Asked(shared, columns_of(attempts, wanted), count))
        for verdict in found:
            if verdict.reason in GAVE_UP:
                self._note(verdict, task)
        return found

    def close(self) -> None:
        self._workers.close()

    async def _each(self, asked: Asked) -> list[Verdict]:
        limit = self._section.timeout_seconds
        is_fast = self._seconds < min(_FAST_SECONDS, limit / (_SPARE * _PROMPTS_PER_ITEM * asked.count))
        try:
            if self._signature.is_async and asked.count > 1:
                return [unpacked(one) for one in await self._run(own_worker.judge_each, (asked, limit))]
            if not self._signature.is_async and is_fast:
                return self._timed([unpacked(one) for one in await self._in_a_bunch(asked)])
        except OSError:  # one of them hung, or ended the worker
            pass

        async def alone(index: int) -> Verdict:
            (verdict,) = await self._judged(own_worker.judge_each, (asked.alone(index), limit), 1)
            return verdict

        return self._timed(await asyncio.gather(*map(alone, range(asked.count))))

    def _timed(self, found: list[Verdict]) -> list[Verdict]:
        """Return the same verdicts; their seconds are taken into the mean."""
        self._seconds += 0.2 * (sum(verdict.seconds for verdict in found) / len(found) - self._seconds)
        return found

    async def _in_a_bunch(self, asked: Asked) -> list[Packed]:
        """Send a prompt's calls together with those of others that wait: an item costs more than trivial calls do.
        Raise OSError as `_run` does, for all that are in the bunch."""
        turns = self._turns()
        done: asyncio.Future[list[Packed]] = turns.loop.create_future()
        turns.waiting.append((asked, done))
        self._send(turns)
        return await done

    def _send(self, turns: "_Turns") -> None:
        """Make items of what waits, while workers have few."""
        while turns.waiting and len(turns.running) < _ITEMS_PER_WORKER * self._section.workers:
            bunch = [turns.waiting.popleft() for _ in range(min(len(turns.waiting), _PROMPTS_PER_ITEM))]
            running = turns.loop.create_task(self._run_bunch(bunch))
            turns.running.add(running)
            running.add_done_callback(functools.partial(self._send_more, turns))

    def _send_more(self, turns: "_Turns", ended: "asyncio.Task[None]") -> None:
        turns.running.discard(ended)
        self._send(turns)

    async def _run_bunch(self, bunch: Sequence[tuple[Asked, "asyncio.Future[list[Packed]]"]]) -> None:
        arguments = ([asked for asked, _ in bunch], self._section.timeout_seconds)
        found: list[Any]
        try:
            found = await self._run(own_worker.judge_bunch, arguments)
        except Exception as error:
            found = [error] * len(bunch)
        for (_, done), one in zip(bunch, found, strict=True):
            if not done.done():  # else whoever waited has been cancelled
                done.set_exception(one) if isinstance(one, Exception) else done.set_result(one)

    async def _judged(
        self, function: Callable[..., list[Packed]], arguments: tuple[Any, ...], count: int
    ) -> list[Verdict]:
        try:
            return [unpacked(one) for one in await self._run(function, arguments)]
        except TimeoutError:
            limit = self._section.timeout_seconds
            return [make_verdict("timeout", limit, f"not done after {limit:g} s (reward.timeout_seconds)")] * count
        except OSError as error:
            return [make_verdict("error", details=self._ended(error))] * count

    async def _run(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        """Call a function in a worker. Raise TimeoutError, another OSError where the worker ended, or Fault where none
        can start."""
        seconds = self._section.timeout_seconds + (_GRACE_SECONDS if self._signature.is_async else 0.0)
        async with self._turns().room:
            for _ in range(2):  # pebble gives up its pool where a worker ends while it has nothing to do
                try:
                    return await asyncio.wrap_future(self._workers.schedule(function, arguments, seconds))
                except BrokenProcessPool:
                    continue
        raise Fault(f"{self._name}: its workers end before they take a response; see {self._output}")

    def _turns(self) -> "_Turns":
        loop = asyncio.get_running_loop()
        if self._of_loop is None or self._of_loop.loop is not loop:
            self._of_loop = _Turns(loop, asyncio.Semaphore(WAITING_PER_WORKER * self._section.workers))
        return self._of_loop

    def _described(self, starts: Path) -> Signature:
        """Load the function in the first worker. Raise ValueError with what is wrong with it."""
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
        self._num_failed += 1
        if self._num_failed <= _TOLD:
            more = f"; further ones are only counted. What it prints is in {self._output}"
            told = more if self._num_failed == _TOLD else ""
            log.warning("reward %s, prompt %s: %s: %s%s", self._name, task.id, verdict.reason, verdict.details, told)
