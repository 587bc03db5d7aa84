"""Compare reward functions of the user's own with a bare process pool, on the same chunks of a trivial function.

    python tools/bench_own_rewards.py [--groups 400] [--size 16] [--workers 2] [--rounds 5]

A chunk is the responses to one prompt. Ours is the whole way of `Rewards.verdicts`: arguments by name, limits and
verdicts; chunks that wait are put together. The bare pool is concurrent.futures.ProcessPoolExecutor with as many
workers from a forkserver, which calls the same function with the same texts. All chunks are there at once. The two take
turns, since others use the machine too. Prints one JSON object; `ratio` is ours over the bare pool's by the clock, the
median of the rounds, and `cpu_ratio` the same by CPU time of all processes.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_rl.config.reward import RewardSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.score import Attempt

Task = tuple[Prompt, list[Attempt]]


def trivial(response: str, answer: str) -> float:
    """Return 1 if the response has the answer in it; both sides call this function."""
    return float(answer in response)


def chunk(texts: list[str], answer: str) -> list[float]:
    """Score a chunk, as the bare pool does."""
    return [trivial(text, answer) for text in texts]


def ours(rewards: Rewards, tasks: Sequence[Task]) -> tuple[float, float]:
    """Time our rewards, as `timed` does."""

    async def all_of() -> None:
        for found in await asyncio.gather(*(rewards.verdicts(*task) for task in tasks)):
            assert all(verdict.score == 1.0 for verdict in found)

    return timed(lambda: asyncio.run(all_of()), tasks)


def bare(pool: ProcessPoolExecutor, tasks: Sequence[Task]) -> tuple[float, float]:
    """Time the bare pool, as `timed` does."""

    def all_of() -> None:
        futures = [pool.submit(chunk, [one.text for one in attempts], task.answer) for task, attempts in tasks]
        assert all(score == 1.0 for future in futures for score in future.result())

    return timed(all_of, tasks)


def timed(work: Callable[[], object], tasks: Sequence[Task]) -> tuple[float, float]:
    """Return the seconds for a response, by the clock and of CPU."""
    started, used = time.perf_counter(), cpu_seconds()
    work()
    count = sum(len(attempts) for _, attempts in tasks)
    return (time.perf_counter() - started) / count, (cpu_seconds() - used) / count


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and all below it."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("groups", 1000), ("size", 16), ("workers", 2), ("rounds", 5), ("characters", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    tasks = []
    for i in range(arguments.groups):
        task = Prompt(id=str(i), domain="d", prompt=f"What is {i}?", answer=str(i))
        texts = [f"{i} " + "x" * arguments.characters for _ in range(arguments.size)]
        tasks.append((task, [Attempt(text=text, num_tokens=len(text)) for text in texts]))
    section = RewardSection(kind=f"{Path(__file__).resolve()}:trivial", workers=arguments.workers)
    context = multiprocessing.get_context("forkserver")
    with (
        tempfile.TemporaryDirectory() as folder,
        Rewards(section, Path(folder)) as rewards,
        ProcessPoolExecutor(arguments.workers, mp_context=context) as pool,
    ):
        ours(rewards, tasks[:20]), bare(pool, tasks[:20])  # warm
        rounds = [(ours(rewards, tasks), bare(pool, tasks)) for _ in range(arguments.rounds)]
    result = {
        **vars(arguments),
        "ours_per_second": round(1 / statistics.median(a for (a, _), _ in rounds)),
        "bare_pool_per_second": round(1 / statistics.median(b for _, (b, _) in rounds)),
        "ratio": round(statistics.median(b / a for (a, _), (b, _) in rounds), 3),
        "cpu_ratio": round(statistics.median(b / a for (_, a), (_, b) in rounds), 3),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
