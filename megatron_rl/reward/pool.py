"""Judges responses: inline where that is safe and cheap, otherwise in workers that can be killed."""

import asyncio
import logging
import resource
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Self

from megatron_rl.lifeline import end_with_owner
from megatron_rl.reward import math as math_reward
from megatron_rl.reward.exact import exact_verdict
from megatron_rl.reward.stem import choice_verdict, judge_value, settle_stem
from megatron_rl.reward.verdict import Verdict, make_verdict
from megatron_rl.reward.workers import WAITING_PER_WORKER as WAITING_PER_WORKER
from megatron_rl.reward.workers import Workers

logger = logging.getLogger(__name__)

WORKER_MEMORY_BYTES = 2 * 1024**3
# A worker is replaced after this many items, so that sympy's caches do not grow into its memory limit.
ITEMS_PER_WORKER = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardKind:
    """Says how one kind of answer is judged.

    settle: (response text, answer) -> the verdict, or the string that `judge` has to look at. Runs in the caller:
        linear time, no evaluation of what the response says.
    judge: (what settle returned, answer) -> verdict, in a worker. None: settle always gives the verdict.
    warm_up: run once in each new worker. Functions are pickled by name, so they live at the top of a module.
    preload: a module whose import does the same in the server that workers are forked from; without it, or where that
        server was started by somebody else, every worker that replaces another spends a second on its imports.
    """

    settle: Callable[[str, str], Verdict | str]
    judge: Callable[[str, str], Verdict] | None = None
    warm_up: Callable[[], None] | None = None
    preload: str | None = None


REWARD_KINDS: dict[str, RewardKind] = {
    "choice": RewardKind(settle=choice_verdict),
    "exact": RewardKind(settle=exact_verdict),
    "math": RewardKind(
        settle=math_reward.settle_math,
        judge=math_reward.judge_boxed,
        warm_up=math_reward.warm_up,
        preload="megatron_rl.reward.preload_math",
    ),
    "stem": RewardKind(
        settle=settle_stem,
        judge=judge_value,
        warm_up=math_reward.warm_up,
        preload="megatron_rl.reward.preload_math",
    ),
}


class RewardPool:
    """Judges responses of one kind. Owns its worker processes, which start with the first item that needs one.

    Workers come from a forkserver, so they inherit neither CUDA nor threads. They end with `close()`, and also
    when this process is killed. Their number bounds memory at WORKER_MEMORY_BYTES each.
    """

    def __init__(self, kind: str, workers: int, timeout_seconds: float, judge: RewardKind | None = None) -> None:
        """Choose the judge. judge: how this kind is judged, where REWARD_KINDS does not say."""
        if judge is None and kind not in REWARD_KINDS:
            raise ValueError(f"reward kind must be one of {', '.join(sorted(REWARD_KINDS))}, got {kind!r}")
        if workers < 1:
            raise ValueError(f"reward workers must be at least 1, got {workers}")
        if not timeout_seconds > 0:
            raise ValueError(f"reward timeout_seconds must be above 0, got {timeout_seconds}")
        self.kind = kind
        self.workers = workers
        self.timeout_seconds = timeout_seconds
        self._kind = judge or REWARD_KINDS[kind]
        self._processes = Workers(
            workers, _initialize_worker, (self._kind.warm_up,), ITEMS_PER_WORKER, self._kind.preload
        )
        self._closed = False
        self._room: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    def score(self, items: Iterable[tuple[str, str]]) -> list[Verdict]:
        """Return verdicts of (response text, answer) pairs, in their order. Takes items only as workers get to them."""
        verdicts: list[Verdict | None] = []
        waiting: deque[tuple[int, str, str, Future[Verdict]]] = deque()
        for text, answer in items:
            if len(waiting) >= self._max_waiting:
                index, expected, boxed, future = waiting.popleft()
                verdicts[index] = self._wait(expected, boxed, future)
            outcome = self._settle(text, answer)
            if isinstance(outcome, Verdict):
                verdicts.append(outcome)
            else:
                waiting.append((len(verdicts), answer, outcome, self._schedule(outcome, answer)))
                verdicts.append(None)
        for index, expected, boxed, future in waiting:
            verdicts[index] = self._wait(expected, boxed, future)
        return [verdict for verdict in verdicts if verdict is not None]

    async def score_async(self, response_text: str, answer: str) -> Verdict:
        """Return what `score` does for one item, without blocking the event loop. Cancelling it ends the worker's item
        too."""
        boxed = self._settle(response_text, answer)
        if isinstance(boxed, Verdict):
            return boxed
        async with self._room.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._max_waiting)):
            try:
                return await asyncio.wrap_future(self._schedule(boxed, answer))
            except BrokenProcessPool:
                future = self._schedule(boxed, answer)
            except Exception as error:
                return self._give_up(error)
            try:
                return await asyncio.wrap_future(future)
            except Exception as error:
                return self._give_up(error)

    def close(self) -> None:
        """End every worker, also a busy one; items that are still waiting are cancelled. Safe to call twice."""
        self._closed = True
        self._processes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _max_waiting(self) -> int:
        return WAITING_PER_WORKER * self.workers

    def _settle(self, response_text: str, answer: str) -> Verdict | str:
        if self._closed:
            raise ValueError("this RewardPool is closed; make a new one")
        return self._kind.settle(response_text, answer)

    def _wait(self, answer: str, boxed: str, future: "Future[Verdict]") -> Verdict:
        try:
            return future.result()
        except BrokenProcessPool:
            future = self._schedule(boxed, answer)
        except Exception as error:
            return self._give_up(error)
        try:
            return future.result()
        except Exception as error:
            return self._give_up(error)

    def _schedule(self, boxed: str, answer: str) -> "Future[Verdict]":
        assert self._kind.judge is not None, f"kind {self.kind} left an item for a worker but has no judge"
        if self._closed:
            raise ValueError("this RewardPool was closed while items were waiting")
        return self._processes.schedule(self._kind.judge, (boxed, answer), self.timeout_seconds)

    def _give_up(self, error: Exception) -> Verdict:
        """Return the verdict on an item that has failed. This is the fault boundary: whatever a hostile item did to its
        worker costs that item only."""
        if isinstance(error, BrokenProcessPool):
            raise RuntimeError(f"reward {self.kind}: workers end before they take an item; see their stderr") from error
        if isinstance(error, TimeoutError):
            return make_verdict("timeout", self.timeout_seconds, f"not done after {self.timeout_seconds:g} s")
        details = f"{type(error).__name__}: {error!s:.200}"
        logger.warning("reward %s: a worker failed: %s", self.kind, details)
        return make_verdict("error", details=details)


def _initialize_worker(warm_up: Callable[[], None] | None) -> None:
    # The default action ends a worker also inside a long C call; pebble's Python handler would not run there.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_owner()
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if warm_up is not None:
        warm_up()
