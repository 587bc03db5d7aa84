"""Compare the gateway of agents with the bare pool of servers, on the same single-turn requests, and measure its
memory.

    python tools/bench_gateway.py MODEL [--requests 400] [--tokens 64] [--at-once 64] [--rounds 5] [--trajectories 500]
        [--equal]

MODEL: a directory as of tools/make_tiny_model.py; an embedded server serves it. Both ask for the same prompts with the
same limits, spread from a quarter of TOKENS to seven quarters, as responses of a real policy are (--equal: all of
TOKENS). They take turns, since others use the machine too. `ratio` is the gateway's tokens/s over the bare pool's, the
median of the rounds. The client is the one that agents get, in this process too, so that its time counts as the
gateway's. `trajectory_bytes`: resident memory that so many trajectories of 20 turns add while all of them are open,
less what one has.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.chat import load_tokenizer, render_prompt
from megatron_rl.families import load_architecture
from megatron_rl.gateway.chat_tokens import ChatTokens
from megatron_rl.gateway.gateway import Gateway, Opened
from megatron_rl.gateway.model import Model
from megatron_rl.gateway.parsers import parser_for
from megatron_rl.gateway.policy import Policy
from megatron_rl.gateway.trajectory import Limits, Seat, Trajectory
from megatron_rl.rollout.client import SampleRequest
from megatron_rl.rollout.pool import ServerPool
from megatron_rl.rollout.server import EmbeddedServer

CONTEXT = 512
TURNS = 20


class Bench:
    """Holds a pool, and a gateway on it."""

    def __init__(self, model: Path, pool: ServerPool, tokens: int, is_equal: bool) -> None:
        architecture = load_architecture(model)
        self.pool, self.tokens, self.ends = pool, tokens, tuple(architecture.eos_token_ids)
        self.tokenizer = load_tokenizer(model)
        self.policy = Policy(pool, 1.0, self.ends)
        self.policy.open(0)
        self.chat = ChatTokens(self.tokenizer, parser_for(self.tokenizer, "auto"), self.ends)
        self.gateway = Gateway("model", architecture.vocab_size, CONTEXT, 1.0)
        self.number, self.is_equal = 0, is_equal

    def begin(self) -> Opened:
        """Open a trajectory of its own for each request."""
        self.number += 1
        limits = Limits(sequence_tokens=CONTEXT, policy_tokens=CONTEXT, turns=1000)
        seat = Seat(seed=1, prompt_id=self.number, sample_index=0)
        return self.gateway.open(Trajectory(seat, limits, self.policy, self.chat))

    def limit(self, number: int) -> int:
        """Return the tokens that a request may have. Every length in the range comes equally often, in a scattered
        order."""
        if self.is_equal:
            return self.tokens
        least, most = self.tokens // 4, 7 * self.tokens // 4
        return least + number * 37 % (most - least + 1)

    async def bare(self, number: int) -> int:
        """Send one request to the pool, rendered as the gateway renders it. Return the number of tokens that came."""
        ids = render_prompt(self.tokenizer, f"{number} + {number}?")
        wanted = SampleRequest(input_ids=ids, seed=number, max_new_tokens=self.limit(number))
        return len((await self.pool.generate(wanted, 1.0)).output_ids)

    async def asked(self, number: int) -> int:
        """Send the same request through the gateway."""
        opened = self.begin()
        await Model(opened.base_url, opened.key).chat(f"{number} + {number}?", max_tokens=self.limit(number))
        self.gateway.shut(opened)
        return opened.trajectory.recording.num_policy_tokens

    async def rate(self, ask: object, count: int, at_once: int) -> float:
        """Return the tokens/s of so many requests."""
        room = asyncio.Semaphore(at_once)

        async def one(number: int) -> int:
            async with room:
                return await ask(number)  # type: ignore[operator]

        started = time.perf_counter()
        found = await asyncio.gather(*map(one, range(count)))
        return sum(found) / (time.perf_counter() - started)

    async def held(self, count: int) -> int:
        """Return the bytes that so many open trajectories of many turns take."""
        opened = [self.begin() for _ in range(count)]
        before = psutil.Process().memory_info().rss

        async def play(one: Opened) -> None:
            model, messages = Model(one.base_url, one.key), [{"role": "user", "content": "go"}]
            for _ in range(TURNS):
                reply = await model.chat(messages, max_tokens=8)
                messages += [reply.message, {"role": "user", "content": "more"}]

        await asyncio.gather(*map(play, opened))
        return psutil.Process().memory_info().rss - before


async def measured(arguments: argparse.Namespace, url: str) -> dict[str, float | list[float]]:
    rollout = RolloutSection(prompts_per_step=1, samples_per_prompt=2, max_response_tokens=64, max_running_requests=64)
    pool = ServerPool([url], rollout)
    await pool.connect()
    pool.assume(None, "0")
    bench = Bench(arguments.model, pool, arguments.tokens, arguments.equal)
    await bench.gateway.start()
    rates: dict[str, list[float]] = {"bare": [], "gateway": []}
    for number in range(arguments.rounds + 1):
        for name, ask in (("bare", bench.bare), ("gateway", bench.asked)):
            rate = await bench.rate(ask, arguments.requests, arguments.at_once)
            rates[name] += [rate] if number else []  # the first warms up
    held = await bench.held(arguments.trajectories)
    await bench.gateway.close()
    await pool.close()
    bench.chat.close()
    ratios = [ours / theirs for ours, theirs in zip(rates["gateway"], rates["bare"], strict=True)]
    return {
        "bare_tokens_per_second": statistics.median(rates["bare"]),
        "gateway_tokens_per_second": statistics.median(rates["gateway"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "trajectories": arguments.trajectories,
        "trajectory_bytes": held,
        "resident_bytes": psutil.Process().memory_info().rss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    for name, default in (("requests", 400), ("tokens", 64), ("at-once", 64), ("rounds", 5), ("trajectories", 500)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--equal", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(
            arguments.model, Path(folder) / "server.log", max_running_requests=64, context_length=CONTEXT
        )
        try:
            server.wait_ready(300)
            print(json.dumps(asyncio.run(measured(arguments, server.url)), indent=1))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
