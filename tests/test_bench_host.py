"""Tests tools/bench_host.py: what it times exists, the client reads its replies, and its conclusions are right."""

import asyncio
import base64
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import bench_host  # noqa: E402
from host_stand_ins import Replies, StandIn, reply_body  # noqa: E402

from megatron_rl.rollout.client import GenerationClient, SampleRequest  # noqa: E402
from megatron_rl.rollout.routing import RoutedShape, decode_routed_experts  # noqa: E402

REPLIES = Replies(num_tokens=20, vocab_size=1000, phase_seconds=0.0, routed=(3, 2, 5))


def test_all_that_is_timed_is_there() -> None:
    for module, name, _ in (*bench_host.TIMED, bench_host.DECODER):
        _, _, function = bench_host.named(module, name)
        assert callable(function)
    with pytest.raises(SystemExit, match="has no gone any more; correct TIMED"):
        bench_host.named("megatron_rl.rollout.journal", "gone")


def test_a_part_inside_of_a_part_counts_for_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(bench_host, "time", SimpleNamespace(thread_time=lambda: processor.seconds))
    clock = bench_host.Clock()

    def work() -> None:
        processor.seconds += 0.25

    inner = clock.timed("inner", work)
    with clock.part("outer"):
        inner()
    inner()
    assert clock.seconds == {"outer": 0.25, "inner": 0.25}


def test_the_client_reads_what_a_stand_in_answers() -> None:
    shape = RoutedShape(num_layers=3, moe_layers=(0, 1, 2), topk=2, num_experts=5)

    async def run() -> tuple[Any, dict[str, Any]]:
        stand_in = StandIn(REPLIES)
        async with await asyncio.start_server(stand_in.answer, "127.0.0.1", 0) as server:
            client = GenerationClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            assert await client.is_ready()
            wanted = SampleRequest(input_ids=[7] * 4, seed=1, max_new_tokens=20)
            found = await client.generate(wanted, temperature=1.0, timeout_seconds=240.0, routed=shape)
            told = await client._ask("GET", "/told", None, 240.0)
            await client.close()
            return found, told

    before = time.monotonic()
    one, told = asyncio.run(run())
    assert one.finish_reason == "stop"
    assert len(one.output_ids) == 20
    assert one.routed_experts.shape == (4 + 20 - 1, 3, 2)
    assert before < told["last_reply"] < time.monotonic()


def test_a_reply_has_a_token_for_each_log_prob_and_experts_for_all_but_the_last() -> None:
    reply = json.loads(reply_body(REPLIES, 4))
    logprobs = reply["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in logprobs] == reply["output_ids"]
    assert len(logprobs) == 20
    assert all(logprob <= 0 for logprob, _, _ in logprobs)
    text = reply["meta_info"]["routed_experts"]
    assert len(base64.b64decode(text)) == 23 * 3 * 2 * 4
    decode_routed_experts(text, 23, RoutedShape(num_layers=3, moe_layers=(0, 1, 2), topk=2, num_experts=5))


def test_the_law_of_growth_is_found_again() -> None:
    sizes = [1 / 64, 1 / 32, 1 / 8]
    assert bench_host.law(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx((3.0, 1.5))


def point(num_prompts: int, num_tokens: int, parts: dict[str, float], gpus: int = 4) -> dict[str, Any]:
    waits = {"from_last_reply_processor_seconds": gpus / 8, "from_last_reply_seconds": gpus / 4}
    memory = {"loop_stall_seconds": gpus / 100, "peak_bytes": {"rollout": 1e9 + gpus * 1e8}}
    return {"num_prompts": num_prompts, "num_tokens": num_tokens, "parts": parts, "gpus": gpus, **waits, **memory}


def test_seconds_of_a_token_and_of_a_response_are_told_apart() -> None:
    # 2 us of a token and 3 ms of a response, at 16 responses for a prompt.
    reading = [16 * n * (2e-6 * tokens + 3e-3) for n, tokens in ((8, 256), (8, 12_800), (16, 12_800))]
    sending = [16 * n * 5e-3 for n in (8, 8, 16)]
    points = [
        point(n, tokens, {"reading_replies": one, "send_work": other, "text": 1e-5})
        for (n, tokens), one, other in zip([(8, 256), (8, 12_800), (16, 12_800)], reading, sending, strict=True)
    ]
    found = bench_host.host_rates(points)
    assert set(found) == {"reading_replies", "send_work"}, "what takes no time has no rate"
    assert found["reading_replies"].when == "rollout"
    assert found["reading_replies"].token_seconds == pytest.approx(2e-6)
    assert found["reading_replies"].response_seconds == pytest.approx(3e-3)
    assert found["send_work"].when == "between"
    assert (found["send_work"].token_seconds, found["send_work"].response_seconds) == (0.0, pytest.approx(5e-3))


def test_the_table_extrapolates_each_part_and_puts_it_beside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"step_seconds": {"mean": 420.0}, "host_seconds": {"mean": 20.0}}
    monkeypatch.setattr(bench_host, "predicted", lambda gpus, host: step)
    # 4 and 16 GPUs are 1/64 and 1/16. What grows with them takes 64 s at 256; 8, 64 and 256 GPUs are 2, 16 and 64 s.
    points = [point(8, 12_800, {"reading_replies": 1.0}, 4), point(32, 12_800, {"reading_replies": 4.0}, 16)]
    points.insert(0, point(8, 256, {"reading_replies": 0.02}, 4))
    lines = bench_host.table(bench_host.summary(points, bench_host.host_rates(points))).splitlines()
    # 64 s / (512 x 16 x 12,800) = 0.61 us; 64 s of the 400 s without rank 0 are 16 %.
    assert lines[2] == "| reading replies | rollout | 0.61 | 1.00 | 2 | 16 | 64 | 16.0% |"
    assert "| 1 | 8 | 32 | 8.0% |" in lines[3]
    assert "| 2 | 16 | 64 | 16.0% |" in lines[4]
    assert "| 20 | 20 | 20 | 5.0% |" in lines[5]
    # 1 GB and 0.1 GB for each GPU.
    assert "| rollout | 1.8 | 7.4 | 26.6 |" in lines
    assert "loop: 0.160 s" in lines[-1]
