"""Tests routed experts from a server to a response: what is asked for, what is believed, and which server can
answer."""

import asyncio
import base64
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rank_zero import config_of
from samples import make_segment, make_trajectory
from tiny_model import write_tiny_model

from megatron_rl.families import load_architecture
from megatron_rl.rollout.client import (
    Completion,
    GenerationClient,
    RequestRefused,
    SampleRequest,
    ServerLost,
    gather_all,
)
from megatron_rl.rollout.connection import ConnectionFailed
from megatron_rl.rollout.routing import RoutedShape, decode_routed_experts, routed_shape, step_routing
from megatron_rl.rollout.sampler import _extended
from megatron_rl.rollout.versions import capabilities

SHAPE = RoutedShape(num_layers=2, moe_layers=(1,), topk=2, num_experts=6)


def encoded(experts: list) -> str:
    return base64.b64encode(np.array(experts, np.int32).tobytes()).decode()


GOOD = [[[0, 0], [5, 3]], [[0, 0], [0, 1]]]


def test_routed_experts_are_read_as_bytes() -> None:
    found = decode_routed_experts(encoded(GOOD), 2, SHAPE)
    assert found.dtype == np.uint8
    assert found.tolist() == GOOD
    assert decode_routed_experts("", 0, SHAPE).shape == (0, 2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"must be base64 of int32, got 'None'"),
        ("a%b", r"must be base64 of int32, got 'a%b'"),
        (base64.b64encode(b"abcde").decode(), r"must be base64 of int32"),
        (encoded(GOOD[:1]), r"holds 4 numbers, expected \[prompt \+ output - 1, layers, topk\] = \(2, 2, 2\)"),
        (encoded([[[0, 0], [5, 6]], [[0, 0], [0, 1]]]), r"must be in \[0, 6\), got 0 to 6"),
        (encoded([[[0, 0], [5, -1]], [[0, 0], [0, 1]]]), r"must be in \[0, 6\), got -1 to 5"),
        (encoded([[[0, 0], [5, 3]], [[0, 0], [4, 4]]]), r"twice at position 1 in layer 1 \(\[4, 4\]\)"),
    ],
)
def test_what_cannot_be_routed_experts_is_refused(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_routed_experts(text, 2, SHAPE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("embedded-0.1.0", True),
        ("0.5.21", False),
        ("0.5.22", True),
        ("0.5.23.post1", True),
        ("0.6.0", True),
        ("0.4.99", False),
        ("1.0.0", True),
    ],
)
def test_servers_that_return_routed_experts_are_known_by_their_version(version: str, supported: bool) -> None:
    assert capabilities(version).routed_experts is supported


class Answering:
    """Stands in for a connection that answers by a function."""

    is_open = True

    def __init__(self, answer: Callable[[dict], dict]) -> None:
        self._answer = answer

    async def ask(
        self,
        method: str,
        target: str,
        content: bytes,
        headers: dict,
        admitted: Callable[[], Awaitable[object]] | None = None,
    ) -> tuple[int, bytes]:
        if admitted is not None:
            await admitted()
        return 200, await self.content(json.loads(content))

    async def content(self, body: dict) -> bytes:
        return json.dumps(self._answer(body)).encode()

    def close(self) -> None:
        pass


def ask(answer: Callable[[dict], dict], shape: RoutedShape | None) -> Completion:
    """Continue a prompt of two tokens by a server that answers with `answer(body)`."""

    async def run() -> Completion:
        client = GenerationClient("http://fake")
        client._idle = [Answering(answer)]  # type: ignore[list-item]
        wanted = SampleRequest(input_ids=[7, 8], seed=1, max_new_tokens=1)
        generated = await client.generate(wanted, temperature=1.0, timeout_seconds=240.0, routed=shape)
        await client.close()
        return generated

    return asyncio.run(run())


def answer(**meta: object) -> dict:
    return {
        "output_ids": [3],
        "meta_info": {
            "output_token_logprobs": [[-1.0, 3, None]],
            "finish_reason": {"type": "stop", "matched": 3},
            "weight_version": "0",
            **meta,
        },
    }


def test_the_client_asks_for_routed_experts_only_where_it_is_told_to() -> None:
    asked = []
    found = ask(lambda body: asked.append(body) or answer(routed_experts=encoded(GOOD)), SHAPE)
    assert found.routed_experts is not None
    assert found.routed_experts.tolist() == GOOD
    assert ask(lambda body: asked.append(body) or answer(), None).routed_experts is None
    assert [body.get("return_routed_experts") for body in asked] == [True, None]


def test_an_answer_without_them_or_of_another_length_names_the_server() -> None:
    for meta, message in (({}, "got 'None'"), ({"routed_experts": encoded(GOOD * 2)}, "holds 16 numbers")):
        with pytest.raises(RequestRefused, match=f"http://fake/generate: routed_experts .*{message}"):
            ask(lambda _, meta=meta: answer(**meta), SHAPE)


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=8))
def test_an_expert_that_is_named_twice_is_found_wherever_it_is(rows: list[list[int]]) -> None:
    shape = RoutedShape(num_layers=1, moe_layers=(0,), topk=3, num_experts=6)
    text = encoded([[row] for row in rows])
    wrong = [position for position, row in enumerate(rows) if len(set(row)) < 3]
    if wrong:
        with pytest.raises(ValueError, match=rf"twice at position {wrong[0]} in layer 0 "):
            decode_routed_experts(text, len(rows), shape)
    else:
        assert decode_routed_experts(text, len(rows), shape).tolist() == [[row] for row in rows]


def test_no_more_bodies_with_routed_experts_are_read_than_there_are_places() -> None:
    num_open = most = 0

    class Slow(Answering):
        async def content(self, body: dict) -> bytes:
            nonlocal num_open, most
            num_open += 1
            most = max(most, num_open)
            await asyncio.sleep(0.01)
            num_open -= 1
            return await super().content(body)

    async def run(routed: RoutedShape | None) -> int:
        nonlocal most
        most, bodies = 0, asyncio.Semaphore(2)
        clients = [GenerationClient("http://fake", bodies=bodies) for _ in range(8)]
        for client in clients:
            client._idle = [Slow(lambda _: answer(routed_experts=encoded(GOOD)))]  # type: ignore[list-item]
        wanted = SampleRequest(input_ids=[7, 8], seed=1, max_new_tokens=1)
        found = await gather_all(
            client.generate(wanted, temperature=1.0, timeout_seconds=240.0, routed=routed) for client in clients
        )
        assert [len(one.output_ids) for one in found] == [1] * 8
        for client in clients:
            await client.close()
        return most

    assert asyncio.run(run(SHAPE)) == 2
    assert asyncio.run(run(None)) == 8


def test_a_place_for_a_body_is_free_again_after_a_failure() -> None:
    class Broken(Answering):
        async def content(self, body: dict) -> bytes:
            raise ConnectionFailed("gone")

    async def run() -> None:
        bodies = asyncio.Semaphore(1)
        for connection in (
            Broken(lambda _: {}),
            Answering(lambda _: answer(routed_experts="a%b")),
            Answering(lambda _: answer(routed_experts=encoded(GOOD))),
        ):
            client = GenerationClient("http://fake", bodies=bodies)
            client._idle = [connection]  # type: ignore[list-item]
            wanted = SampleRequest(input_ids=[7, 8], seed=1, max_new_tokens=1)
            with contextlib.suppress(ServerLost, RequestRefused):
                await client.generate(wanted, temperature=1.0, timeout_seconds=240.0, routed=SHAPE)
            assert not bodies.locked()

    asyncio.run(run())


def test_bytes_of_a_step_by_hand_and_what_is_too_much(tmp_path: Path) -> None:
    shape = RoutedShape(num_layers=28, moe_layers=tuple(range(28)), topk=6, num_experts=64)
    # A budget of 1,000 tokens on each of 8 ranks; every token has 28 x 6 numbers of 4 bytes, and base64 makes 4 of 3.
    step = step_routing(config_of(tmp_path, "budget.tokens=1000", "budget.scope=per_gpu"), shape, 8)
    assert (step.tokens, step.kept_bytes, step.wire_bytes) == (8_000, 8_000 * 168, 8_000 * 168 * 16 // 3)
    assert list(step.problems(shape)) == []
    # Without a budget: 2 prompts, 2 responses each, of 50 tokens at most.
    step = step_routing(config_of(tmp_path, "algorithm.name=grpo"), shape, 8)
    assert step.tokens == 200
    # 25e9 / (168 x 16 / 3) = 27,901,785.7 tokens.
    allowed, refused = (
        step_routing(config_of(tmp_path, f"budget.tokens={n}"), shape, 1) for n in (27_901_785, 27_901_786)
    )
    assert list(allowed.problems(shape)) == []
    (problem,) = refused.problems(shape)
    assert "sends 25.0 GB through rank 0" in problem
    assert "27,901,786 tokens x 28 layers x 6 experts" in problem
    assert "rollout.router_replay = false, or sample at most 27,901,785 tokens" in problem


def test_a_resumed_response_has_the_routed_experts_of_the_last_answer_that_brought_tokens() -> None:
    blank = make_trajectory(0, 0, [make_segment(0, num_prompt_tokens=2)]).response
    record = np.arange(8, dtype=np.uint8).reshape(4, 1, 2)

    def part(count: int, reason: str, routed: np.ndarray | None) -> Completion:
        return Completion(
            output_ids=np.full(count, 3, np.int32),
            logprobs=np.zeros(count, np.float32),
            finish_reason=reason,
            weight_versions=("0",),
            routed_experts=routed,
        )

    response = _extended(blank, part(1, "abort", record[:2]), 0)
    waiting = _extended(response, part(0, "abort", None), 1)
    assert waiting.segments[0].routed_experts is response.segments[0].routed_experts
    whole = _extended(waiting, part(2, "stop", record), 1)
    assert whole.segments[0].routed_experts is record
    assert len(record) == 2 + whole.num_policy_tokens - 1


def test_a_model_with_more_experts_than_a_byte_can_name_is_refused(tmp_path) -> None:
    config = load_architecture(write_tiny_model(tmp_path))
    assert routed_shape(config) == RoutedShape(num_layers=3, moe_layers=(1, 2), topk=2, num_experts=6)
    with pytest.raises(ValueError, match=r"rollout.router_replay works for up to 256 experts, the model has 257"):
        routed_shape(config.model_copy(update={"num_experts": 257}))


def test_layers_without_experts_are_not_looked_at_wherever_they_are() -> None:
    experts = np.arange(2 * 4 * 2).reshape(2, 4, 2)
    for moe_layers in ((0, 1, 2, 3), (1, 2, 3), (1, 3), (2,)):
        shape = RoutedShape(num_layers=4, moe_layers=moe_layers, topk=2, num_experts=20)
        assert shape.of_moe_layers(experts).tolist() == [[row[i] for i in moe_layers] for row in experts.tolist()]
