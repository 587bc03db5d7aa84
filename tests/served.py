"""Asks a real generation server and returns its answers."""

from typing import Any

import httpx

from megatron_rl.rollout.server import GenerationServer


def answers(server: GenerationServer, bodies: list[dict[str, Any]], *, seconds: float) -> list[Any]:
    """Wait for the server, post each body to /generate in turn, stop the server, and return the answers."""
    try:
        server.wait_ready(seconds)
        url = f"{server.url}/generate"
        return [httpx.post(url, json=body, timeout=seconds).raise_for_status().json() for body in bodies]
    finally:
        server.stop()


def input_logprobs(
    server: GenerationServer, sequences: list[list[int]], *, max_new_tokens: int, seconds: float
) -> list[list[float | None]]:
    """Return the log-prob of every token of each sequence. The first token has none."""
    body = {
        "input_ids": sequences,
        "sampling_params": {"max_new_tokens": max_new_tokens},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    (found,) = answers(server, [body], seconds=seconds)
    return [[lp for lp, _, _ in answer["meta_info"]["input_token_logprobs"]] for answer in found]
