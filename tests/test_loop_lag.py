"""Tests a clock that stands still while its event loop is late, and that a pool blames no server for a late loop."""

import asyncio
import contextlib
import json
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from clock_loop import ClockLoop
from until import until

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.open_files import possible_open_files, raise_open_files
from megatron_rl.rollout import loop_lag
from megatron_rl.rollout.client import SampleRequest, gather_all
from megatron_rl.rollout.loop_lag import LoopLag
from megatron_rl.rollout.pool import Place, ServerPool


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[ClockLoop]:
    """Yield a loop whose time the clock of a late loop takes for the real one."""
    made = ClockLoop()
    monkeypatch.setattr(loop_lag, "time", SimpleNamespace(monotonic=made.time))
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def measured(lag: LoopLag) -> Iterator[None]:
    lag.start()
    try:
        yield
    finally:
        lag.close()


def test_the_clock_goes_on_while_the_loop_waits_and_stands_while_it_is_held(loop: ClockLoop) -> None:
    async def run() -> None:
        lag = LoopLag()
        with measured(lag):
            began, started = lag.clock(), loop.time()
            await asyncio.sleep(0.3)
            assert lag.clock() - began == pytest.approx(loop.time() - started) == pytest.approx(0.3)
            began = lag.clock()
            loop.hold(0.7)
            assert lag.clock() - began <= 0.11, "it stands before the loop has gone on"
            await asyncio.sleep(0.05)
            assert lag.clock() - began <= 0.11 + 0.1, "and counts it when it has"
            assert 0.55 <= lag.take_largest() <= 0.7
            assert lag.take_largest() < 0.55, "it is that of the time since the last look"

    loop.run_until_complete(run())


def test_a_time_limit_does_not_count_the_time_that_the_loop_was_held(loop: ClockLoop) -> None:
    async def run() -> None:
        lag = LoopLag()
        with measured(lag):
            async with lag.timeout(0.5):
                loop.hold(1.0)
                await asyncio.sleep(0.2)  # three awaits of a reply that has long come
            with pytest.raises(TimeoutError):
                async with lag.timeout(0.2):
                    await asyncio.sleep(60)
            started = loop.time()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(30), lag.timeout(0):
                    await asyncio.sleep(60)
            assert loop.time() - started < 10

    loop.run_until_complete(run())


@pytest.fixture
def few_files() -> Iterator[None]:
    """Set a soft limit of 256 open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# A pool ---------------------------------------------------------------------------------------------------------------

ROLLOUT = RolloutSection(
    prompts_per_step=1,
    samples_per_prompt=2,
    max_prompt_tokens=12,
    max_response_tokens=8,
    max_running_requests=512,
    silence_seconds=5.0,
)


class StandIn:
    """Stands in for a server, on the loop of the test.

    It answers /generate with as many tokens as the seed says, once `may_answer` is set. asked: its requests.
    is_waited_for: set by a question after its health that comes while `is_healthy` is not set, which waits for that.
    """

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[dict] = []
        self.may_answer, self.is_healthy, self.is_waited_for = (asyncio.Event() for _ in range(3))
        self.may_answer.set()
        self.is_healthy.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = head.partition("content-length: ")[2].partition("\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                answer: dict = {}
                if head.startswith("post /generate"):
                    self.asked.append(json.loads(body))
                    await self.may_answer.wait()
                    count = json.loads(body)["sampling_params"]["sampling_seed"]
                    meta = {"finish_reason": {"type": "stop"}, "weight_version": "0"}
                    answer = {
                        "output_ids": [7] * count,
                        "meta_info": meta | {"output_token_logprobs": [[-1.5, 7, None]] * count},
                    }
                elif head.startswith("get /health"):
                    if not self.is_healthy.is_set():
                        self.is_waited_for.set()
                    await self.is_healthy.wait()
                content = json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        writer.close()


@contextlib.asynccontextmanager
async def stand_in() -> AsyncIterator[StandIn]:
    made = StandIn()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, backlog=4096)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()


@contextlib.asynccontextmanager
async def connected(*urls: str) -> AsyncIterator[ServerPool]:
    pool = ServerPool(urls, ROLLOUT)
    try:
        await pool.connect()
        pool.assume(Path("unused"), "0")
        yield pool
    finally:
        await pool.close()


def requests(count: int) -> list[SampleRequest]:
    return [SampleRequest(input_ids=[5], seed=1 + i % 8, max_new_tokens=8) for i in range(count)]


def test_more_responses_than_the_soft_limit_of_files_on_a_loop_that_is_held_lose_nothing(
    few_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        loop, held = asyncio.get_running_loop(), 0.0
        real = loop.time

        def clock() -> float:
            return real() + held

        monkeypatch.setattr(loop, "time", clock)
        monkeypatch.setattr(loop_lag, "time", SimpleNamespace(monotonic=clock))
        async with stand_in() as server, connected(server.url) as pool:
            server.may_answer.clear()
            work = asyncio.create_task(gather_all(pool.generate(one, 1.0) for one in requests(300)))
            await until(lambda: len(server.asked) == 300, "the server has all requests")
            server.is_healthy.clear()
            await server.is_waited_for.wait()
            held = 5 * ROLLOUT.silence_seconds  # at once: no other moment of the loop comes between
            server.is_healthy.set()
            await asyncio.sleep(0.3)  # three looks at the clock: all of it counts as the loop's
            server.may_answer.set()
            found = await work
            assert [len(one.output_ids) for one in found] == [1 + i % 8 for i in range(300)]
            assert len(server.asked) == 300
            assert (pool.counts.num_taken_out, pool.counts.num_resent) == (0, 0)
            assert pool.lag.take_largest() > 4 * ROLLOUT.silence_seconds

    raise_open_files()
    asyncio.run(run())


def test_a_server_that_is_silent_is_taken_out_and_what_it_owed_is_sent_to_another() -> None:
    async def run() -> None:
        async with stand_in() as server, stand_in() as silent, connected(silent.url, server.url) as pool:
            silent.may_answer.clear()
            silent.is_healthy.clear()
            found = await gather_all(pool.generate(one, 1.0) for one in requests(8))
            assert [len(one.output_ids) for one in found] == list(range(1, 9))
            assert (len(silent.asked), len(server.asked)) == (4, 8)
            assert (pool.counts.num_taken_out, pool.counts.num_resent) == (1, 4)
            silent.is_healthy.set()

    asyncio.run(run())


def test_responses_of_a_group_go_to_one_server_while_that_has_room_and_groups_to_the_least_busy() -> None:
    async def run(most: float) -> list[list[int]]:
        async with stand_in() as one, stand_in() as two, connected(one.url, two.url) as pool:
            places = [Place(most=most), Place(most=most)]
            await gather_all(pool.generate(r, 1.0, place=place) for place in places for r in requests(4))
            return [
                [sum(body["sampling_params"]["sampling_seed"] == s for body in server.asked) for s in (1, 2, 3, 4)]
                for server in (one, two)
            ]

    assert asyncio.run(run(float("inf"))) == [[1, 1, 1, 1], [1, 1, 1, 1]]
    found = asyncio.run(run(3))
    assert [sum(counts) for counts in found] == [4, 4]


# Limits ---------------------------------------------------------------------------------------------------------------


def test_the_soft_limit_of_open_files_becomes_the_hard_one(few_files: None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_open_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (possible_open_files(), hard)
