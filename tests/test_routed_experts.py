"""Routed experts on their way from a server to a response: what is asked for, what is believed, and who can answer."""

import asyncio
import base64
import json
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from tiny_model import write_tiny_model

from megatron_rl.families import load_architecture
from megatron_rl.records import Response
from megatron_rl.rollout.client import Completion, GenerationClient, RequestRefused, SampleRequest
from megatron_rl.rollout.routing import RoutedShape, decode_routed_experts, routed_shape
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


def ask(answer: Callable[[dict], dict], shape: RoutedShape | None) -> Completion:
    """One continuation of a prompt of two tokens, from a server that answers the body with `answer`."""

    async def run() -> Completion:
        client = GenerationClient("http://fake")
        transport = httpx.MockTransport(lambda request: httpx.Response(200, json=[answer(json.loads(request.content))]))
        client._idle = [httpx.AsyncClient(base_url=client.url, transport=transport)]
        wanted = [SampleRequest(input_ids=[7, 8], seed=1, max_new_tokens=1)]
        (generated,) = await client.generate(wanted, temperature=1.0, timeout_seconds=5.0, routed=shape)
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


def test_a_resumed_response_has_the_routed_experts_of_the_last_answer_that_brought_tokens() -> None:
    prompt = np.array([7, 8], np.int32)
    nothing = np.zeros(0, np.int32)
    blank = Response(
        prompt_id=0,
        sample_index=0,
        prompt_ids=prompt,
        output_ids=nothing,
        rollout_logprobs=np.zeros(0, np.float32),
        policy_versions=nothing,
        finish_reason="",
    )
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
    assert waiting.routed_experts is response.routed_experts
    whole = _extended(waiting, part(2, "stop", record), 1)
    assert whole.routed_experts is record
    assert len(record) == len(prompt) + whole.num_output_tokens - 1


def test_a_model_with_more_experts_than_a_byte_can_name_is_refused(tmp_path) -> None:
    config = load_architecture(write_tiny_model(tmp_path))
    assert routed_shape(config) == RoutedShape(num_layers=3, moe_layers=(1, 2), topk=2, num_experts=6)
    with pytest.raises(ValueError, match=r"rollout.router_replay works for up to 256 experts, the model has 257"):
        routed_shape(config.model_copy(update={"num_experts": 257}))
