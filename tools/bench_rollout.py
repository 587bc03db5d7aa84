"""Measure what the sampler costs, and what C3PO++ saves, as JSON.

    python tools/bench_rollout.py [--groups 48] [--phases 6] [--lengths FILE]

1. sampler: tokens/s of whole groups through sampler, pool and reward workers, against the bare embedded server driven
   by the simplest client (one connection per request, asyncio streams) with the same requests, alternating.
2. partial: seconds of rollout per step of one token budget, first waiting for every response, then by C3PO++, on
   response lengths from a file of one length per line (scaled down to a mean of 48 tokens), on
   - the embedded server, where a decode step takes longer the more responses run, as on any CPU, and
   - a simulated server whose step takes 4 ms whatever runs, which is closer to a GPU that waits for its memory.
"""

import argparse
import asyncio
import dataclasses
import functools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

from bench_embedded import SHAPE, Connection  # noqa: E402
from tiny_model import write_tiny_model  # noqa: E402

from megatron_rl.c3po.budget import ANY, PromptYield, Shortfall  # noqa: E402
from megatron_rl.config.reward import RewardSection  # noqa: E402
from megatron_rl.config.rollout import RolloutSection  # noqa: E402
from megatron_rl.data.prompts import Prompt  # noqa: E402
from megatron_rl.records import Group, UnfinishedGroup  # noqa: E402
from megatron_rl.reward.rewards import Rewards  # noqa: E402
from megatron_rl.rollout.client import Completion, SampleRequest  # noqa: E402
from megatron_rl.rollout.pool import ServerPool  # noqa: E402
from megatron_rl.rollout.sampler import Question, Sampler, fill_in_waves, sampling_seed  # noqa: E402
from megatron_rl.rollout.supervisor import start_servers  # noqa: E402

GROUP_SIZE, PROMPT_TOKENS, SLOTS, SEED = 8, 16, 64, 1
MEAN_TOKENS, LONGEST = 48, 960
ROLLOUT = RolloutSection(
    prompts_per_step=24,
    samples_per_prompt=GROUP_SIZE,
    max_prompt_tokens=PROMPT_TOKENS,
    max_response_tokens=LONGEST,
    max_running_requests=SLOTS,
    servers=1,
)
# No response ends by itself here: the traces say how long each is.
NEVER = 10_000


def question(position: int) -> Question:
    ids = random.Random(position).choices(range(2, SHAPE["vocab_size"]), k=PROMPT_TOKENS)
    prompt = Prompt(id=str(position), domain="bench", prompt="?", answer="1", meta={})
    return Question(prompt_id=position, prompt=prompt, input_ids=tuple(ids))


def zeros(responses: Sequence[Any], _: np.ndarray) -> np.ndarray:
    return np.zeros(len(responses))


class Traced(ServerPool):
    """Gives every response the length of its place in the trace, wherever it is resumed."""

    __slots__ = ("trace",)
    trace: Any

    def length_of(self, one: SampleRequest) -> int:
        return int(self.trace[one.seed % len(self.trace)])

    async def generate(self, wanted: SampleRequest, *others: Any) -> Completion:
        num_left = self.length_of(wanted) + PROMPT_TOKENS - len(wanted.input_ids)
        return await ServerPool.generate(self, dataclasses.replace(wanted, max_new_tokens=num_left), *others)


class Simulated:
    """Takes the place of a pool: `SLOTS` responses at once, first come first served, one token each per step."""

    STEP_SECONDS = 0.004

    def __init__(self, trace: np.ndarray) -> None:
        self.trace, self.num_slots = trace, SLOTS
        self._queue: list[list[Any]] = []  # [tokens left, tokens made, future]
        self._engine: asyncio.Task[None] | None = None

    async def abort_all(self) -> None:
        for entry in self._queue:
            entry[2].set_result("abort")
        self._queue.clear()

    async def generate(self, one: SampleRequest, *_: Any) -> Completion:
        left = int(self.trace[one.seed % len(self.trace)]) + PROMPT_TOKENS - len(one.input_ids)
        entry: list[Any] = [left, 0, asyncio.get_running_loop().create_future()]
        self._queue.append(entry)
        if self._engine is None or self._engine.done():
            self._engine = asyncio.create_task(self._run())
        reason = await entry[2]
        return Completion(
            output_ids=np.ones(entry[1], np.int32),
            logprobs=np.zeros(entry[1], np.float32),
            finish_reason=reason,
            weight_versions=("0",),
        )

    async def _run(self) -> None:
        due = time.perf_counter()
        while self._queue:
            due += self.STEP_SECONDS
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            for entry in self._queue[:SLOTS]:
                entry[0] -= 1
                entry[1] += 1
            for entry in [e for e in self._queue[:SLOTS] if e[0] <= 0]:
                self._queue.remove(entry)
                entry[2].set_result("length")


async def bare(url: str, questions: Sequence[Question], tokens: int, connections: list[Connection]) -> float:
    """Return the tokens per second of the simplest client."""

    async def one(question: Question, connection: Connection) -> int:
        params = {"max_new_tokens": tokens, "temperature": 1.0}
        body = {
            "input_ids": [list(question.input_ids)] * GROUP_SIZE,
            "sampling_params": [
                params | {"sampling_seed": sampling_seed(SEED, question.prompt_id, i)} for i in range(GROUP_SIZE)
            ],
            "return_logprob": True,
        }
        answers = await connection.post("/generate", body)
        return sum(len(answer["output_ids"]) for answer in answers)

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(q, c) for q, c in zip(questions, connections, strict=True)))
    return sum(counts) / (time.perf_counter() - started)


async def bench_sampler(pool: ServerPool, url: str, key: str, num_groups: int, rewards: Rewards) -> dict[str, Any]:
    tokens = 64
    short = ROLLOUT.model_copy(update={"max_response_tokens": tokens})
    sampler = Sampler(pool, rewards, str, zeros, short, SEED, (NEVER,))
    questions = [question(i) for i in range(num_groups)]
    connections = [Connection(url, key) for _ in questions]
    ours, theirs = [], []
    for _ in range(9):
        theirs.append(await bare(url, questions, tokens, connections))
        started = time.perf_counter()
        groups = await sampler.sample(questions, 0)
        seconds = time.perf_counter() - started
        ours.append(sum(s.response.num_policy_tokens for g in groups for s in g.samples) / seconds)
    ours, theirs = ours[1:], theirs[1:]  # the first round warms up
    return {
        "sampler_tokens_per_second": round(statistics.median(ours)),
        "bare_tokens_per_second": round(statistics.median(theirs)),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
    }


async def phases(sampler: Sampler, partial: bool, num_phases: int, budget: int) -> tuple[list[float], dict[str, Any]]:
    """Return the seconds of each rollout phase under one budget per step; surplus goes to the next, as in a run."""
    cursor, surplus, per_prompt = 0, 0, PromptYield()
    unfinished: Sequence[UnfinishedGroup] = []
    seconds, lengths, purged = [], [], 0

    def take(_: str, count: int) -> list[Question]:
        nonlocal cursor
        first, cursor = cursor, cursor + count
        return [question(i) for i in range(first, cursor)]

    def everything(_: Group) -> bool:
        return True

    for step in range(num_phases):
        shortfall = Shortfall(unit="tokens", missing=budget - surplus, margin=1.0, per_prompt=per_prompt.decayed())
        started = time.perf_counter()
        if partial:
            resumed = [(question(group.prompt_id), group) for group in unfinished]
            found = await sampler.fill_partially(resumed, take, step, [shortfall], everything, 100)
        else:
            found = await fill_in_waves(
                functools.partial(lambda step, count: sampler.sample(take(ANY, count), step), step),
                ROLLOUT.prompts_per_step,
                shortfall,
                everything,
                100,
            )
        seconds.append(time.perf_counter() - started)
        unfinished, per_prompt = found.unfinished, shortfall.per_prompt
        purged += len(found.purged)
        brought = [s.response.num_policy_tokens for group in found.kept for s in group.samples]
        lengths += brought
        surplus += sum(brought) - budget
    return seconds, {"mean_completed_tokens": round(float(np.mean(lengths)), 1), "purged_groups": purged}


async def bench_partial(pool: Any, rewards: Rewards, num_phases: int, budget: int) -> dict[str, Any]:
    sampler = Sampler(pool, rewards, str, zeros, ROLLOUT, SEED, (NEVER,))
    waiting, of_waiting = await phases(sampler, False, num_phases, budget)
    partial, of_partial = await phases(sampler, True, num_phases, budget)
    # The first phase of each finds nothing that an earlier one left.
    return {
        "waiting_seconds": round(statistics.mean(waiting[1:]), 3),
        "partial_seconds": round(statistics.mean(partial[1:]), 3),
        "ratio": round(statistics.mean(waiting[1:]) / statistics.mean(partial[1:]), 2),
        "waiting": of_waiting,
        "partial": of_partial,
    }


async def bench(arguments: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    lengths = np.loadtxt(arguments.lengths, dtype=np.int64) if arguments.lengths else lognormal()
    trace = np.clip(np.rint(lengths * (MEAN_TOKENS / lengths.mean())), 1, LONGEST).astype(np.int64)
    random.Random(0).shuffle(trace)
    budget = 24 * GROUP_SIZE * MEAN_TOKENS
    with start_servers(model, folder, ROLLOUT, "float32") as supervisor, Rewards(RewardSection()) as rewards:
        supervisor.wait_ready()
        pool = ServerPool(supervisor.urls, ROLLOUT, key_of=supervisor.key_of)
        traced = Traced(supervisor.urls, ROLLOUT, key_of=supervisor.key_of)
        traced.trace = trace
        try:
            await pool.connect()
            await traced.connect()
            pool.assume(model, "0")
            traced.assume(model, "0")
            url = supervisor.urls[0]
            result = {"sampler": await bench_sampler(pool, url, supervisor.key_of(url), arguments.groups, rewards)}
            result["partial_embedded"] = await bench_partial(traced, rewards, arguments.phases, budget)
            result["partial_simulated"] = await bench_partial(Simulated(trace), rewards, arguments.phases, budget)
        finally:
            await pool.close()
            await traced.close()
    shape = {"mean": round(float(trace.mean()), 1), "p50": int(np.median(trace)), "p99": int(np.quantile(trace, 0.99))}
    return result | {"budget_tokens": budget, "slots": SLOTS, "length_tokens": shape | {"max": int(trace.max())}}


def lognormal() -> np.ndarray:
    """Draw lengths with the median and spread of the lengths of DeepSeek-R1's answers in ServeGen's trace."""
    return np.exp(np.random.default_rng(0).normal(np.log(792), 1.14, 100_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--phases", type=int, default=6)
    parser.add_argument("--lengths", type=Path, help="one length per line; default a log-normal like DeepSeek-R1's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model", **SHAPE)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (model / "config.json").write_text(json.dumps(config | {"eos_token_id": NEVER}), encoding="utf-8")
        result = asyncio.run(bench(arguments, model, Path(folder)))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
