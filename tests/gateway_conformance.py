"""Tests the gateway by the unmodified OpenAI client: 40 kinds of requests, and hostile ones.

Plain tests that take a `served`: test_gateway.py runs them over the embedded server, real_sglang/test_gateway.py over
SGLang. The model is random, so what it says is bytes that no tokenizer would write so: what is recorded must be what
was sampled, and not what its text encodes to.
"""

import asyncio
import concurrent.futures
import contextlib
import socket
import time

import httpx
import numpy as np
import openai
import pytest
from agent_chat import END, START, write_chat_model
from subject import FLAGS
from until import wait_until

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.gateway.chat_tokens import ChatTokens
from megatron_rl.gateway.gateway import Gateway
from megatron_rl.gateway.parsers import parser_for
from megatron_rl.gateway.policy import Policy
from megatron_rl.gateway.trajectory import Limits, Seat, Trajectory
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.pool import ServerPool

CONTEXT, VOCAB = 512, 260
ASK = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


class Served:
    """Runs the gateway of a run over one server, in an event loop of its own."""

    def __init__(self, folder, start, *, seeds=True):
        """Start the server and the gateway. start: makes a server of a model directory. seeds: whether it takes
        seeds."""
        flags = f"{FLAGS} --max-position-embeddings {CONTEXT + 64} --init-std 0.12"
        assert write_chat_model(folder / "model", *flags.split()) == VOCAB
        self.tokenizer = load_tokenizer(folder / "model")
        end = self.tokenizer.eos_token_id
        self.seeds, self.server = seeds, start(folder / "model", folder / "server.log")
        self.server.wait_ready(600)
        rollout = RolloutSection(
            prompts_per_step=1, samples_per_prompt=2, max_response_tokens=64, max_running_requests=32
        )
        self.loop = BackgroundLoop()
        self.pool = ServerPool([self.server.url], rollout, key_of=lambda url: self.server.key)
        self.loop.run(self.pool.connect())
        self.loop.run(self._start(VOCAB, end))
        self.numbers = iter(range(10**6))

    async def _start(self, vocab, end):
        self.pool.assume(None, "0")
        self.policy = Policy(self.pool, 1.0, (end,))
        self.policy.open(3)
        self.chat = ChatTokens(self.tokenizer, parser_for(self.tokenizer, "auto"), (end,))
        self.gateway = Gateway("tiny", vocab, CONTEXT, 1.0)
        await self.gateway.start()

    def close(self):
        self.loop.run(self.gateway.close())
        self.loop.run(self.pool.close())
        self.loop.close()
        self.server.stop()

    def open(self, **limits):
        """Open a trajectory that may ask, and return it with a client for it."""
        limits = {"sequence_tokens": CONTEXT, "policy_tokens": 10**6, "turns": 10**6, **limits}

        async def make():
            seat = Seat(seed=1, prompt_id=next(self.numbers), sample_index=0)
            return self.gateway.open(Trajectory(seat, Limits(**limits), self.policy, self.chat))

        opened = self.loop.run(make())
        return opened, openai.OpenAI(base_url=opened.base_url, api_key=opened.key, max_retries=0)


@pytest.fixture
def opened(served):
    return served.open()


def asked(client, **more):
    return client.chat.completions.create(**{"model": "any", "messages": ASK, "max_tokens": 8, **more})


def recorded(opened):
    return opened.trajectory.recording.segments()


def assert_is_alive(served):
    _, client = served.open()
    assert asked(client, max_tokens=1).usage.completion_tokens == 1


# Requests that are understood ----------------------------------------------------------------------------------------

UNDERSTOOD = {
    "nothing but messages": {},
    "one token": {"max_tokens": 1},
    "the newer name of max_tokens": {"max_tokens": None, "max_completion_tokens": 3},
    "a stop string": {"stop": "zq"},
    "stop strings": {"stop": ["zq", "qz"]},
    "a seed": {"seed": 5},
    "log-probs": {"logprobs": True},
    "log-probs, no alternatives": {"logprobs": True, "top_logprobs": 0},
    "one choice": {"n": 1},
    "no penalties": {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
    "text": {"response_format": {"type": "text"}},
    "the run's temperature": {"temperature": 1, "top_p": 1.0},
    "another temperature": {"temperature": 0.2},
    "who asks": {"user": "me", "metadata": {"a": "b"}, "store": False},
    "parallel calls": {"tools": [TOOL], "parallel_tool_calls": True},
    "tools": {"tools": [TOOL], "tool_choice": "auto"},
    "no tools after all": {"tools": [TOOL], "tool_choice": "none"},
    "a system": {"messages": [{"role": "system", "content": "be brief"}, *ASK]},
    "a developer": {"messages": [{"role": "developer", "content": "be brief"}, *ASK]},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    },
    "an empty message": {"messages": [{"role": "user", "content": ""}]},
    "a result": {
        "messages": [
            *ASK,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": ""},
        ],
        "tools": [TOOL],
    },
    "special tokens as text": {"messages": [{"role": "user", "content": f"{END}{START}"}]},
    "other languages": {"messages": [{"role": "user", "content": "日本語 \N{SNOWMAN}\0"}]},
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_understood_is_answered_and_recorded_as_it_was_sampled(served, opened, kind, stream) -> None:
    here, client = opened
    more = {key: value for key, value in UNDERSTOOD[kind].items() if value is not None}
    body = {"model": "any", "messages": ASK, **({} if "max_completion_tokens" in more else {"max_tokens": 8}), **more}
    if stream:
        events = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
        assert [event.object for event in events] == ["chat.completion.chunk"] * len(events)
        usage, deltas = events[-1].usage, [event.choices[0].delta for event in events[:-1]]
        assert deltas[0].role == "assistant"
        content = "".join(delta.content or "" for delta in deltas)
        reason = events[-2].choices[0].finish_reason
        assert [event.choices[0].finish_reason for event in events[:-2]] == [None] * (len(events) - 2)
        logprobs = events[0].choices[0].logprobs
    else:
        answer = client.chat.completions.create(**body)
        usage, choice = answer.usage, answer.choices[0]
        content, reason, logprobs = choice.message.content, choice.finish_reason, choice.logprobs
        assert (answer.object, answer.model, choice.message.role) == ("chat.completion", "tiny", "assistant")
    (segment,) = recorded(here)
    assert (len(segment.prompt_ids), len(segment.output_ids)) == (usage.prompt_tokens, usage.completion_tokens)
    assert usage.completion_tokens <= 8
    ended = segment.output_ids[-1] == served.tokenizer.eos_token_id
    assert reason == ("stop" if ended else "length")
    text = served.tokenizer.decode(segment.output_ids[:-1] if ended else segment.output_ids)
    assert content in text
    assert set(segment.policy_versions.tolist()) == {3}
    if "logprobs" in more:
        assert [one.logprob for one in logprobs.content] == pytest.approx(segment.rollout_logprobs.tolist(), abs=1e-6)
        assert [one.token for one in logprobs.content] == [served.tokenizer.decode([i]) for i in segment.output_ids]
    # The server's own log-probs of the recorded tokens: they are what was sampled.
    ids = [*segment.prompt_ids.tolist(), *segment.output_ids.tolist()]
    told = served.loop.run(served.pool.input_logprobs(ids))[served.server.url]
    assert told[len(segment.prompt_ids) - 1 :] == pytest.approx(segment.rollout_logprobs, abs=2e-5)


def test_ids_that_were_sampled_are_read_again_as_they_are_over_many_turns(served, opened) -> None:
    here, client = opened
    messages = list(ASK)
    for turn in range(4):
        answer = asked(client, messages=messages, max_tokens=12)
        messages += [answer.choices[0].message, {"role": "user", "content": f"more {turn}"}]
    (segment,) = recorded(here)
    assert segment.num_turns == 4
    ids = np.concatenate([segment.prompt_ids, segment.output_ids])
    told = served.loop.run(served.pool.input_logprobs(ids.tolist()))[served.server.url]
    mask = np.concatenate([np.zeros(len(segment.prompt_ids), bool), segment.policy_mask])[1:]
    assert told[mask] == pytest.approx(segment.rollout_logprobs, abs=2e-5)
    # The responses are random bytes, whose text encodes to other tokens; not that of each, which may be only an end.
    said = [segment.output_ids[start:stop].tolist() for start, stop in segment.turns.tolist()]
    assert [served.tokenizer.encode(served.tokenizer.decode(ids)) for ids in said] != said


def test_bare_texts_and_token_ids_are_gone_on_with(served, opened) -> None:
    here, client = opened
    answer = client.completions.create(model="any", prompt="once", max_tokens=5, logprobs=0)
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(recorded(here)[0].rollout_logprobs, abs=1e-6)
    assert answer.object == "text_completion"
    ids = served.tokenizer.encode("once")
    assert recorded(here)[0].prompt_ids.tolist() == ids
    client.completions.create(model="any", prompt=[7, 8, 9], max_tokens=2)
    assert recorded(here)[1].prompt_ids.tolist() == [7, 8, 9]
    (first, *_, last) = client.completions.create(
        model="any", prompt="two", max_tokens=2, stream=True, stream_options={"include_usage": True}
    )
    assert first.choices[0].text in served.tokenizer.decode(recorded(here)[2].output_ids)
    assert last.usage.completion_tokens == len(recorded(here)[2].output_ids)


def test_models_are_listed(opened) -> None:
    _, client = opened
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "megatron_rl"


def test_the_same_seed_says_the_same_and_without_one_each_answer_is_another(served, opened) -> None:
    if not served.seeds:
        pytest.skip("this server takes no seeds")
    _, client = opened
    seeded = [asked(client, seed=7).choices[0].message.content for _ in range(2)]
    free = [asked(client).choices[0].message.content for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert free[0] != free[1]


def test_two_hundred_at_once_are_all_answered_and_recorded(served) -> None:
    pairs = [served.open() for _ in range(20)]

    def ask(number):
        here, client = pairs[number % 20]
        return here, asked(client, messages=[{"role": "user", "content": str(number)}], max_tokens=4).usage

    with concurrent.futures.ThreadPoolExecutor(64) as threads:
        found = list(threads.map(ask, range(200)))
    assert sum(usage.completion_tokens for _, usage in found) == sum(
        here.trajectory.recording.num_policy_tokens for here, _ in pairs
    )
    assert [here.trajectory.recording.num_turns for here, _ in pairs] == [10] * 20


# Requests that are refused -------------------------------------------------------------------------------------------

REFUSED = {
    "no messages": ({"messages": []}, "messages must be a list of messages, not empty"),
    "no list": ({"messages": "hi"}, "messages must be a list of messages"),
    "no role": ({"messages": [{"content": "hi"}]}, r"messages\[0\] must be an object with a role out of"),
    "another role": ({"messages": [{"role": "robot", "content": "hi"}]}, "role out of developer, system"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        r"messages\[0\].content must be text, and has a part of type 'image_url' \(not supported\)",
    ),
    "a number": (
        {"messages": [{"role": "user", "content": 5}]},
        r"messages\[0\].content must be a text or a list of parts of type 'text', got 5",
    ),
    "a tool that is no list": ({"extra_body": {"tools": "add"}}, r"tools must be a list of .*, got 'add'"),
    "a custom tool": (
        {"tools": [{"type": "custom", "custom": {"name": "a"}}]},
        r"tools\[0\] must be .*, got {'custom'",
    ),
    "a tool without a function": (
        {"tools": [TOOL, {"type": "function", "function": "add"}], "tool_choice": "required"},
        r"tools\[1\] must be \{\"type\": \"function\"",
    ),
    "nothing to answer": (
        {"messages": [*ASK, {"role": "assistant", "content": "me"}]},
        "last message is the assistant",
    ),
    "several choices": ({"n": 2}, "n must be 1"),
    "a schema": ({"response_format": {"type": "json_object"}}, "response_format must be"),
    "alternatives": ({"logprobs": True, "top_logprobs": 3}, "top_logprobs must be 0"),
    "a penalty": ({"presence_penalty": 0.5}, "presence_penalty must be 0"),
    "no tokens": ({"max_tokens": 0}, r"max_tokens must be an integer in \[1"),
    "a long stop": ({"stop": "x" * 2000}, "at most 1024 characters"),
    "many stops": ({"stop": ["x"] * 40}, "list of at most 32"),
    "no tool of that name": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
        r"tool_choice must be .* of one of the tools \(add\)",
    ),
    "a tool where there are none": ({"tool_choice": "required"}, "none are given"),
    "sound": ({"modalities": ["audio"]}, "'modalities' is not supported here"),
    "an unknown key": ({"extra_body": {"top_k": 5}}, "'top_k' is not supported here"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_refused_with_its_name_and_ends_nothing(opened, kind) -> None:
    here, client = opened
    body, message = REFUSED[kind]
    with pytest.raises(openai.BadRequestError, match=message):
        asked(client, **body)
    assert recorded(here) == ()
    assert asked(client, max_tokens=1).usage.completion_tokens == 1


def test_a_limit_is_an_error_that_clients_do_not_repeat(served) -> None:
    here, client = served.open(turns=1)
    asked(client)
    with pytest.raises(openai.BadRequestError, match=r"this trajectory has ended: it has had 1 turns") as error:
        asked(client)
    assert (error.value.code, here.trajectory.ended) == ("turns", "turns")
    here, client = served.open()
    with pytest.raises(openai.BadRequestError, match="tokens of context leave no room in the 512") as error:
        asked(client, messages=[{"role": "user", "content": "x" * 600}])
    assert here.trajectory.ended == "length"


# Keys ----------------------------------------------------------------------------------------------------------------


def test_a_key_opens_its_own_trajectory_alone(served) -> None:
    (mine, _), (other, _) = served.open(), served.open()
    for key, url in [
        ("", mine.base_url),
        ("wrong", mine.base_url),
        (other.key, mine.base_url),
        (mine.key, other.base_url),
    ]:
        with pytest.raises(openai.AuthenticationError):
            asked(openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0))
    served.loop.run(shut(served, mine))
    with pytest.raises(openai.AuthenticationError):
        asked(openai.OpenAI(base_url=mine.base_url, api_key=mine.key, max_retries=0))
    assert recorded(mine) == recorded(other) == ()


async def shut(served, opened):
    served.gateway.shut(opened)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/models",
        "/trajectories",
        "/trajectories/x/v1/models",
        "/../../etc/passwd",
        "//v1/models",
        "/%2e%2e/models",
    ],
)
def test_other_paths_lead_nowhere(served, path) -> None:
    mine, _ = served.open()
    root = mine.base_url.removesuffix("/v1").rpartition("/trajectories")[0]
    answer = httpx.get(root + path, headers={"Authorization": f"Bearer {mine.key}"}, trust_env=False, timeout=240)
    assert answer.status_code in (401, 404)
    assert "error" in answer.json()


def test_a_path_to_another_trajectory_by_way_of_ones_own_leads_nowhere(served) -> None:
    mine, other = served.open()[0], served.open()[0]
    host, port = mine.base_url.split("/")[2].split(":")
    name = other.base_url.split("/")[-2]
    for path in (
        f"{mine.base_url[len(host) + len(port) + 8 :]}/../../{name}/v1/models",
        f"/trajectories/{name}%2fv1/models",
    ):
        with socket.create_connection((host, int(port)), 240) as line:
            line.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {mine.key}\r\n\r\n".encode())
            assert int(line.recv(4096).split()[1]) in (401, 404)


def test_a_page_in_a_browser_is_refused(served) -> None:
    mine, _ = served.open()
    headers = {"Authorization": f"Bearer {mine.key}", "Origin": "http://evil.example"}
    assert httpx.get(f"{mine.base_url}/models", headers=headers, trust_env=False, timeout=240).status_code == 403


# Hostile clients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False])
def test_a_hundred_megabytes_are_not_read(served, told) -> None:
    mine, _ = served.open()
    chunk = b" " * 2**20

    def chunks():
        for _ in range(100):
            yield chunk

    headers = {"Authorization": f"Bearer {mine.key}", "Content-Type": "application/json"}
    if told:
        headers["Content-Length"] = str(100 * 2**20)
    with contextlib.suppress(httpx.TransportError):  # it may close before all is sent
        answer = httpx.post(
            f"{mine.base_url}/chat/completions", content=chunks(), headers=headers, trust_env=False, timeout=240
        )
        assert answer.status_code == 413
    # Without the key not even that.
    headers["Authorization"] = "Bearer wrong"
    with contextlib.suppress(httpx.TransportError):
        answer = httpx.post(
            f"{mine.base_url}/chat/completions", content=chunks(), headers=headers, trust_env=False, timeout=240
        )
        assert answer.status_code == 401
    assert_is_alive(served)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"null",
        b'{"messages": ' + b"[" * 10**5,
        b'{"n": 1, "n": 1}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"1" * 5000,
    ],
)
def test_what_is_no_json_object_is_refused(served, content) -> None:
    mine, _ = served.open()
    headers = {"Authorization": f"Bearer {mine.key}", "Content-Type": "application/json"}
    answer = httpx.post(
        f"{mine.base_url}/chat/completions", content=content, headers=headers, trust_env=False, timeout=240
    )
    assert answer.status_code in (400, 415)
    assert answer.json()["error"]["message"]


def test_slow_clients_hold_up_nobody(served) -> None:
    mine, _ = served.open()
    host, port = mine.base_url.split("/")[2].split(":")
    lines = [socket.create_connection((host, int(port)), 240) for _ in range(50)]
    try:
        for number, line in enumerate(lines):
            head = f"POST {mine.base_url[len('http://') + len(host) + len(port) + 1 :]}/chat/completions HTTP/1.1\r\n"
            head += f"Host: {host}\r\nAuthorization: Bearer {mine.key}\r\nContent-Type: application/json\r\n"
            line.sendall((head + "Content-Length: 1000000\r\n\r\n" + "{" * (number * 10000)).encode()[: 50 * number])
        assert_is_alive(served)  # while they go on: none of them ends by itself
    finally:
        for line in lines:
            line.close()


def test_who_leaves_is_not_sampled_for(served) -> None:
    here, client = served.open()
    served.loop.run(close_clock(served))
    try:
        for stream in (False, True):
            with pytest.raises(openai.APITimeoutError):
                asked(client.with_options(timeout=0.3), stream=stream)
        wait_until(lambda: not here.num_requests, "the gateway has noticed that the client has left")
    finally:
        served.loop.run(open_clock(served))
    assert recorded(here) == ()
    assert asked(client, max_tokens=1).usage.completion_tokens == 1


def test_requests_of_one_trajectory_have_a_limit(served) -> None:
    _, client = served.open()
    served.loop.run(close_clock(served))
    try:
        with concurrent.futures.ThreadPoolExecutor(70) as threads:
            calls = [threads.submit(asked, client, messages=ASK, max_tokens=1) for _ in range(70)]
            wait_until(lambda: sum(call.done() for call in calls) == 6, "six of the seventy are refused")
            assert all(isinstance(call.exception(), openai.RateLimitError) for call in calls if call.done())
            assert_waits(served)
            served.loop.run(open_clock(served))
    finally:
        served.loop.run(open_clock(served))
    assert sum(call.exception() is None for call in calls) == 64


def assert_waits(served):
    """Check that a request between phases waits for its answer, so that the client's own timeout ends it."""
    _, client = served.open()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(model="any", messages=ASK, max_tokens=1)


async def close_clock(served):
    served.policy.clock.close()


async def open_clock(served):
    served.policy.open(3)
    await asyncio.sleep(0)


def test_who_waits_long_is_shown_that_the_line_lives(served, monkeypatch) -> None:
    monkeypatch.setattr("megatron_rl.gateway.gateway._SILENT_SECONDS", 0.05)
    for stream in (False, True):
        here, client = served.open()
        served.loop.run(close_clock(served))
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            call = threads.submit(asked, client, max_tokens=3, stream=stream)
            time.sleep(0.4)
            served.loop.run(open_clock(served))
            answer = call.result()
            if stream:
                assert [event.choices[0].finish_reason for event in answer][-1] in ("stop", "length")
            else:
                assert answer.usage.completion_tokens == len(recorded(here)[0].output_ids)
