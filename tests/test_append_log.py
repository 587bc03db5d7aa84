"""Tests that responses are written as they come: in bounded memory, off the event loop, and in whole groups."""

import asyncio
import errno
import gc
import json
import os
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_sample
from until import until

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.records import Group
from megatron_rl.rollout import append_log
from megatron_rl.rollout.append_log import Finished, find_groups, sample_into, write_groups
from megatron_rl.rollout.completion_order import in_order_of_completion
from megatron_rl.rollout.sampler import Question, Sampler


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.integers(0, 5), max_size=30), most=st.integers(1, 8))
def test_every_result_comes_once_and_no_more_work_is_begun_than_asked_for(turns: list[int], most: int) -> None:
    begun = taken = 0

    async def work(index: int) -> int:
        nonlocal begun
        begun += 1
        assert begun - taken <= most
        for _ in range(turns[index]):
            await asyncio.sleep(0)
        return index

    async def run() -> list[int]:
        nonlocal taken
        found = []
        async for index in in_order_of_completion(map(work, range(len(turns))), most):
            taken += 1
            found.append(index)
            await asyncio.sleep(0)
        return found

    assert sorted(asyncio.run(run())) == list(range(len(turns)))


def test_the_first_that_is_done_comes_first_and_a_failure_ends_the_others(caplog: pytest.LogCaptureFixture) -> None:
    ended = []

    async def run() -> list[int]:
        found: list[int] = []
        may_end = [asyncio.Event() for _ in range(5)]

        async def work(index: int) -> int:
            try:
                await may_end[index].wait()
                if index == 0:
                    raise OSError("lost")
            finally:
                ended.append(index)
            return index

        may_end[1].set()
        with pytest.raises(OSError, match="lost"):
            async for index in in_order_of_completion(map(work, range(5)), 5):
                found.append(index)
                may_end[{1: 2, 2: 0}[index]].set()
        return found

    assert asyncio.run(run()) == [1, 2]
    assert ended[:3] == [1, 2, 0]
    assert sorted(ended) == [0, 1, 2, 3, 4]
    assert not caplog.records


def test_the_work_of_waiting_is_proportional_to_what_is_waited_for() -> None:
    """Check that waiting for the next result does not ask every task to call back each time."""
    num_asked = 0

    class Counted(asyncio.Task[int]):
        def add_done_callback(self, *arguments: Any, **more: Any) -> None:
            nonlocal num_asked
            num_asked += 1
            super().add_done_callback(*arguments, **more)

    async def run(count: int) -> None:
        asyncio.get_running_loop().set_task_factory(lambda loop, work, **more: Counted(work, loop=loop, **more))

        async def work(index: int) -> int:
            for _ in range(index):  # one ends after the other
                await asyncio.sleep(0)
            return index

        assert len([i async for i in in_order_of_completion(map(work, range(count)), count)]) == count

    asyncio.run(run(300))
    assert num_asked < 3 * 300


def question(index: int) -> Question:
    prompt = Prompt(id=f"p{index}", domain="math", prompt="?", answer="1")
    return Question(prompt_id=index, prompt=prompt, input_ids=(1,))


class Tracked(np.ndarray):
    """Is an array that a weak reference can be made to."""


class FakeSampler(Sampler):
    """Gives its groups at once. most_alive: the most groups that were in memory at one time."""

    def __init__(self) -> None:
        rollout = RolloutSection(
            prompts_per_step=1, samples_per_prompt=2, max_prompt_tokens=4, max_response_tokens=4, max_running_requests=4
        )
        super().__init__(SimpleNamespace(num_slots=8), None, str, lambda responses, rewards: rewards, rollout, 1, 0)  # type: ignore[arg-type]
        self.num_alive = self.most_alive = 0

    async def _group(self, question: Question, policy_version: int) -> Group:
        await asyncio.sleep(0)
        samples = tuple(make_sample(question.prompt_id, index, 4) for index in range(2))
        held = np.zeros(1).view(Tracked)
        object.__setattr__(samples[0].response.segments[0], "rollout_logprobs", held)
        self.num_alive += 1
        self.most_alive = max(self.most_alive, self.num_alive)
        weakref.finalize(held, self._died)
        return Group(prompt_id=question.prompt_id, samples=samples)

    def _died(self) -> None:
        self.num_alive -= 1


def test_memory_is_that_of_the_groups_under_way_and_lines_are_made_off_the_loop(tmp_path: Path) -> None:
    sampler, threads = FakeSampler(), set[threading.Thread]()

    def lines(question: Question, group: Group) -> str:
        threads.add(threading.current_thread())
        return json.dumps({"position": question.prompt_id}) + "\n"

    async def run() -> int:
        # One thread: several would each hold a group until they are given the processor again.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        return await sample_into(tmp_path / "rows", sampler, [question(i) for i in range(300)], lines, "rows")

    gc.disable()  # by counts of references alone
    try:
        tokens = asyncio.run(run())
    finally:
        gc.enable()
    assert tokens == 300 * (1 + 4)
    # 4 * 8 slots / 2 responses, and one or two that are being written down, and one that the thread still holds.
    assert sampler.most_alive <= 16 + 3
    assert find_groups(tmp_path / "rows", 1, "")[0] == set(range(300))
    assert threading.main_thread() not in threads


async def finished(count: int, seconds: float = 0.0, first: int = 0) -> AsyncIterator[Finished]:
    for index in range(first, first + count):
        await asyncio.sleep(seconds)
        yield Finished(lines=f'{{"position": {index}}}\n' * 2, num_tokens=3, reward=1.0, error_share=0.0)


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ([0.0, 0.0], r"2 of 2 prompts, mean reward 0\.500, \d+ tokens/s"),
        ([0.25, 0.75], r"2 of 2 prompts, mean reward 0\.500, errors 50%, \d+ tokens/s"),
    ],
)
def test_the_progress_says_how_many_responses_could_not_be_judged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shares: list[float], told: str
) -> None:
    async def groups() -> AsyncIterator[Finished]:
        for share in shares:
            yield Finished(lines="{}\n", num_tokens=15, reward=0.5, error_share=share)

    caplog.set_level("INFO")
    asyncio.run(write_groups(tmp_path / "rows", groups(), 2, "prompts"))
    assert re.search(told, caplog.text)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    threads = []

    def fsync(number: int) -> None:
        threads.append(threading.current_thread())
        time.sleep(0.05)

    monkeypatch.setattr(append_log.os, "fsync", fsync)
    return threads


def test_groups_that_come_while_the_disk_is_busy_share_its_next_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, is_free = [], threading.Event()

    def fsync(number: int) -> None:
        threads.append(threading.current_thread())
        is_free.wait()

    async def groups() -> AsyncIterator[Finished]:
        async for group in finished(399):
            yield group
        await until(lambda: threads, "the disk is busy")
        is_free.set()
        async for group in finished(1, first=399):
            yield group

    monkeypatch.setattr(append_log.os, "fsync", fsync)
    assert asyncio.run(write_groups(tmp_path / "rows", groups(), 400, "rows")) == 1200
    assert find_groups(tmp_path / "rows", 2, "")[0] == set(range(400))
    assert len(threads) <= 3  # of what came first, of what came while the disk was busy, and of the last
    assert threading.main_thread() not in threads


def test_few_characters_wait_for_a_slow_disk(
    tmp_path: Path, slow_disk: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append_log, "_MOST_WAITING", 100)
    asyncio.run(write_groups(tmp_path / "rows", finished(60), 60, "rows"))
    # Two rows of 16 or 17 characters a group: the fourth fills the hundred, and waits for the disk.
    assert len(slow_disk) >= 60 / 5
    assert find_groups(tmp_path / "rows", 2, "")[0] == set(range(60))


def test_a_signal_leaves_whole_groups_that_were_told_of(tmp_path: Path, slow_disk: list[threading.Thread]) -> None:
    given_out = 0

    async def groups() -> AsyncIterator[Finished]:
        nonlocal given_out
        async for group in finished(10**6, 0.001):
            yield group
            given_out += 1  # the writer has taken it

    async def run() -> None:
        writing = asyncio.create_task(write_groups(tmp_path / "rows", groups(), 10**6, "rows"))
        await until(lambda: given_out > 10, "the writer has taken more than ten groups")
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing

    asyncio.run(run())
    positions, end = find_groups(tmp_path / "rows", 2, "")
    assert given_out > 10
    assert positions >= set(range(given_out))
    assert end == os.path.getsize(tmp_path / "rows")


def test_a_full_disk_is_raised_and_nothing_more_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(append_log.os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'rows'}'"):
        asyncio.run(write_groups(tmp_path / "rows", finished(10**6, 0.001), 10**6, "rows"))
