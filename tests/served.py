"""What a real generation server says of given tokens."""

import httpx

from megatron_rl.rollout.server import GenerationServer


def input_logprobs(
    server: GenerationServer, sequences: list[list[int]], *, max_new_tokens: int, seconds: float
) -> list[list[float | None]]:
    """Of every token of each sequence, the first without one. Waits for the server, asks it once and stops it."""
    try:
        server.wait_ready(seconds)
        body = {
            "input_ids": sequences,
            "sampling_params": {"max_new_tokens": max_new_tokens},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answers = httpx.post(f"{server.url}/generate", json=body, timeout=seconds).raise_for_status().json()
    finally:
        server.stop()
    return [[lp for lp, _, _ in answer["meta_info"]["input_token_logprobs"]] for answer in answers]
