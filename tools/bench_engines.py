"""Compare the embedded server with real SGLang on a CPU, same model and same requests, as JSON.

    python tools/bench_engines.py [--batches 1,16,64] [--repeats 3]     (needs `make install-sglang`)

One server after the other, each alone on the machine: B prompts of 16 tokens at once, 64 new tokens each, one request
per prompt, median tokens/s over the repeats after a warm-up. Then the log-probs that SGLang gives the embedded server's
responses beside those that these were sampled with.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]

from bench_embedded import Connection  # noqa: E402
from make_tiny_model import main as make_tiny_model  # noqa: E402

from megatron_rl.config.rollout import RolloutSection  # noqa: E402
from megatron_rl.rollout.server import EmbeddedServer, GenerationServer, SglangServer, find_sglang  # noqa: E402

PROMPT_TOKENS, NEW_TOKENS, SLOTS = 16, 64, 64


def prompts(batch: int, repeat: int) -> list[list[int]]:
    chance = random.Random(f"{batch} {repeat}")
    return [[chance.randrange(3, 90) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]


async def generate(connections: list[Connection], asked: list[list[int]]) -> tuple[list[dict[str, Any]], float]:
    """Return the answers and the tokens per second."""
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "ignore_eos": True}
    bodies = [{"input_ids": ids, "sampling_params": params, "return_logprob": True} for ids in asked]
    started = time.perf_counter()
    answers = await asyncio.gather(*(c.post("/generate", b) for c, b in zip(connections, bodies, strict=False)))
    seconds = time.perf_counter() - started
    assert all(len(answer["output_ids"]) == NEW_TOKENS for answer in answers)
    return answers, len(asked) * NEW_TOKENS / seconds


async def measure(url: str, batches: list[int], repeats: int) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Return the tokens per second by batch, and the answers of the last round of the last batch."""
    connections = [Connection(url) for _ in range(max(batches))]
    rates: dict[str, int] = {}
    answers: list[dict[str, Any]] = []
    for batch in batches:
        found = []
        for repeat in range(repeats + 1):
            answers, rate = await generate(connections, prompts(batch, repeat))
            found.append(rate)
        rates[str(batch)] = round(statistics.median(found[1:]))
    return rates, answers


def logprobs_of(url: str, sequences: list[list[int]]) -> list[np.ndarray]:
    body = {
        "input_ids": sequences,
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answers = httpx.post(f"{url}/generate", json=body, timeout=600, trust_env=False).raise_for_status().json()
    return [
        np.array([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][PROMPT_TOKENS:]])
        for answer in answers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=lambda text: [int(b) for b in text.split(",")], default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    python = find_sglang(RolloutSection(prompts_per_step=1, samples_per_prompt=2, max_response_tokens=64))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_model([str(folder / "model")])
        result: dict[str, Any] = {}
        shared: dict[str, Any] = {"max_running_requests": SLOTS, "context_length": 128}

        def serve(server: GenerationServer) -> list[dict[str, Any]]:
            """Measure a server. Return the answers of the last round."""
            started = time.perf_counter()
            server.wait_ready(300)
            ready = time.perf_counter() - started
            kind = type(server).__name__.removesuffix("Server").lower()
            rates, answers = asyncio.run(measure(server.url, arguments.batches, arguments.repeats))
            result[kind] = {"ready_seconds": round(ready, 1), "tokens_per_second": rates}
            return answers

        server: GenerationServer = EmbeddedServer(folder / "model", folder / "embedded.log", **shared)
        try:
            sampled = serve(server)
        finally:
            server.stop()
        asked = prompts(arguments.batches[-1], arguments.repeats)
        server = SglangServer(folder / "model", folder / "sglang.log", python=python, **shared)
        try:
            serve(server)
            sequences = [ids + answer["output_ids"] for ids, answer in zip(asked, sampled, strict=True)]
            theirs = logprobs_of(server.url, sequences)
        finally:
            server.stop()
    ours = [np.array([pair[0] for pair in answer["meta_info"]["output_token_logprobs"]]) for answer in sampled]
    difference = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    result["logprob_difference"] = {
        "num_tokens": len(difference),
        "mean": float(difference.mean()),
        "p999": float(np.quantile(difference, 0.999)),
        "max": float(difference.max()),
    }
    result["ratio"] = {
        batch: round(rate / result["sglang"]["tokens_per_second"][batch], 2)
        for batch, rate in result["embedded"]["tokens_per_second"].items()
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
