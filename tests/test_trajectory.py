"""Tests what a policy reads in a trajectory's requests and what is recorded. The test says what the policy writes."""

import asyncio
import json
import re

import numpy as np
import pytest
from agent_chat import END, START, Scripted, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.chat import render_behind, render_conversation
from megatron_rl.data.messages import Conversation, Message
from megatron_rl.gateway.chat_tokens import ChatTokens
from megatron_rl.gateway.parsers import parser_for
from megatron_rl.gateway.policy import Policy
from megatron_rl.gateway.recording import Recording, Turn
from megatron_rl.gateway.requests import parse_chat, parse_text
from megatron_rl.gateway.trajectory import Limits, Seat, Trajectory, TrajectoryEnded, call_id

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
ASK = {"role": "user", "content": "1+2?"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


class Talk:
    """Holds a trajectory and a policy that writes what the test says."""

    def __init__(self, tokenizer, say, *, turns=8, policy_tokens=2000, sequence_tokens=4000, **options):
        self.tokenizer = tokenizer
        self.servers = Scripted(tokenizer, say)
        self.policy = Policy(self.servers, 1.0, (tokenizer.eos_token_id,))
        self.policy.open(0)
        self.chat = ChatTokens(tokenizer, parser_for(tokenizer, "auto"), (tokenizer.eos_token_id,))
        limits = Limits(sequence_tokens=sequence_tokens, policy_tokens=policy_tokens, turns=turns)
        self.trajectory = Trajectory(
            Seat(seed=1, prompt_id=2, sample_index=0), limits, self.policy, self.chat, **options
        )

    async def ask(self, messages, **body):
        """Ask once. Return the message that the client gets, what the policy read, and the answer."""
        answer = await self.trajectory.chat(parse_chat({"messages": messages, **body}))
        message = {"role": "assistant", "content": answer.said.content}
        if answer.said.calls:
            message["tool_calls"] = [
                {"id": "x", "function": {"name": one.name, "arguments": json.dumps(dict(one.arguments))}}
                for one in answer.said.calls
            ]
        read = self.tokenizer.decode(list(self.servers.asked[-1].input_ids)) if self.servers.asked else ""
        return message, read, answer

    def shown(self):
        """Return the segments as text, with what the policy sampled in [ ]."""
        return [shown(self.tokenizer, segment) for segment in self.trajectory.recording.segments()]


def shown(tokenizer, segment):
    text, at = tokenizer.decode(segment.prompt_ids.tolist()), 0
    for start, stop in segment.turns.tolist():
        text += tokenizer.decode(segment.output_ids[at:start].tolist())
        text += f"[{tokenizer.decode(segment.output_ids[start:stop].tolist())}]"
        at = stop
    assert at == len(segment.output_ids)
    return text


def run(work):
    return asyncio.run(work)


def test_a_conversation_goes_on_with_the_tokens_that_were_sampled_thinking_included(tokenizer) -> None:
    async def talk():
        here = Talk(tokenizer, ["<think>hm</think>three", "<think>so</think>six"])
        first, read, answer = await here.ask([ASK])
        assert read == f"{START}user\n1+2?{END}\n{START}assistant\n"
        assert (answer.said.content, answer.said.reasoning, answer.finish_reason) == ("three", "hm", "stop")
        # The client sends no thinking back, and spaces of its own.
        first["content"] += " \n"
        _, read, _ = await here.ask([ASK, first, {"role": "user", "content": "times 2?"}])
        before = f"{START}user\n1+2?{END}\n{START}assistant\n<think>hm</think>three{END}"
        assert read == f"{before}\n{START}user\ntimes 2?{END}\n{START}assistant\n"
        assert here.shown() == [
            f"{START}user\n1+2?{END}\n{START}assistant\n[<think>hm</think>three{END}]"
            f"\n{START}user\ntimes 2?{END}\n{START}assistant\n[<think>so</think>six{END}]"
        ]
        assert here.trajectory.last_text == "<think>so</think>six"

    run(talk())


def test_with_the_templates_history_a_turn_whose_thinking_it_leaves_out_is_a_sequence_of_its_own(tokenizer) -> None:
    async def talk():
        here = Talk(tokenizer, ["<think>hm</think>three", "six", "nine"], as_sampled=False)
        first, _, _ = await here.ask([ASK])
        asked = [ASK, first, {"role": "user", "content": "times 2?"}]
        second, _, _ = await here.ask(asked)
        await here.ask([*asked, second, {"role": "user", "content": "plus 3?"}])
        assert here.shown() == [
            f"{START}user\n1+2?{END}\n{START}assistant\n[<think>hm</think>three{END}]",
            # The second has no thinking, so the third goes on with it.
            f"{START}user\n1+2?{END}\n{START}assistant\nthree{END}\n{START}user\ntimes 2?{END}\n{START}assistant\n"
            f"[six{END}]\n{START}user\nplus 3?{END}\n{START}assistant\n[nine{END}]",
        ]

    run(talk())


def test_calls_of_tools_are_found_and_their_results_go_behind_what_was_sampled(tokenizer) -> None:
    async def talk():
        here = Talk(tokenizer, [f"<think>add</think>let me {CALL}", "3"])
        first, read, answer = await here.ask([ASK], tools=[TOOL])
        assert f"Tools: {json.dumps([TOOL])}" in read
        assert answer.finish_reason == "tool_calls"
        assert [(one.name, one.arguments) for one in answer.said.calls] == [("add", {"a": 1, "b": 2})]
        assert (answer.said.content, answer.said.reasoning) == ("let me", "add")
        result = {"role": "tool", "tool_call_id": "x", "content": f"3 {END}"}
        await here.ask([ASK, first, result], tools=[TOOL])
        (text,) = here.shown()
        assert text.endswith(
            f"assistant\n[<think>add</think>let me {CALL}{END}]\n{START}tool\n3 {END}{END}\n{START}assistant\n[3{END}]"
        )
        # A tool's text makes no special token: the {END} in its result is plain text.
        (segment,) = here.trajectory.recording.segments()
        ids = segment.output_ids[segment.turns[0, 1] : segment.turns[1, 0]].tolist()
        assert ids.count(tokenizer.eos_token_id) == 1
        assert here.trajectory.counts["tool_calls"] == 1

    run(talk())


def test_ids_of_calls_are_what_mistrals_templates_ask_for() -> None:
    ids = [call_id(digest, index) for digest in ("a" * 64, "b" * 64) for index in range(20)]
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", one) for one in ids)
    assert len(set(ids)) == len(ids)
    assert call_id("a" * 64, 3) == ids[3]


def test_the_end_of_a_turn_that_the_policy_did_not_write_is_the_templates(tokenizer) -> None:
    async def talk():
        here = Talk(tokenizer, ["a long story", "the end"])
        first, _, answer = await here.ask([ASK], max_tokens=6)
        assert (answer.finish_reason, first["content"]) == ("length", "a long")
        await here.ask([ASK, first, {"role": "user", "content": "go on"}])
        (text,) = here.shown()
        assert f"[a long]{END}\n{START}user\ngo on{END}" in text

    run(talk())


def test_a_stop_string_is_recorded_and_not_told(tokenizer) -> None:
    async def talk():
        here = Talk(tokenizer, ["think OBS: made up", "done"])
        first, _, answer = await here.ask([ASK], stop=["OBS:"])
        assert (first["content"], answer.finish_reason) == ("think ", "stop")
        await here.ask([ASK, first, {"role": "user", "content": "go on"}])
        (text,) = here.shown()
        assert f"[think OBS:]{END}\n{START}user" in text

    run(talk())


def test_where_a_client_changes_history_a_new_segment_begins(tokenizer) -> None:
    async def talk():
        here = Talk(tokenizer, ["three", "six", "seven"])
        first, _, _ = await here.ask([ASK])
        later = {"role": "user", "content": "times 2?"}
        await here.ask([ASK, {**first, "content": "4"}, later])
        # The first answer is still known, and its segment goes on.
        await here.ask([ASK, first, later])
        beginning = f"{START}user\n1+2?{END}\n{START}assistant\n"
        end = f"\n{START}user\ntimes 2?{END}\n{START}assistant\n"
        assert here.shown() == [
            f"{beginning}[three{END}]{end}[seven{END}]",
            f"{beginning}4{END}{end}[six{END}]",
        ]
        # Two requests go on from one answer. In the second its tokens are read, not trained again.
        await_again = Talk(tokenizer, ["three", "six", "seven"])
        first, _, _ = await await_again.ask([ASK])
        for _ in range(2):
            await await_again.ask([ASK, first, later])
        assert await_again.shown() == [
            f"{beginning}[three{END}]{end}[six{END}]",
            f"{beginning}three{END}{end}[seven{END}]",
        ]

    run(talk())


def test_bare_texts_go_on_with_sampled_tokens_and_token_ids_are_taken_as_they_are(tokenizer) -> None:
    async def talk():
        here = Talk(tokenizer, ["act OBS:", "end", "ids"])
        first = await here.trajectory.complete(parse_text({"prompt": "Q ", "stop": "OBS:"}, 300))
        assert first.said.content == "act "
        await here.trajectory.complete(parse_text({"prompt": "Q act OBS: 3\n"}, 300))
        ids = tokenizer.encode("Q act OBS: 3\nen", add_special_tokens=False)
        await here.trajectory.complete(parse_text({"prompt": ids}, 300))
        assert here.shown() == [f"Q [act OBS:] 3\n[end{END}]", f"Q act OBS: 3\nen[ids{END}]"]

    run(talk())


def test_a_call_that_must_come_is_begun_for_the_policy_and_not_trained(tokenizer) -> None:
    async def talk():
        here = Talk(tokenizer, ['{"a": 1}}</tool_call>'])
        choice = {"type": "function", "function": {"name": "add"}}
        _, _, answer = await here.ask([ASK], tools=[TOOL], tool_choice=choice)
        assert [(one.name, one.arguments) for one in answer.said.calls] == [("add", {"a": 1})]
        (text,) = here.shown()
        assert text.endswith('assistant\n<tool_call>\n{"name": "add", "arguments": [{"a": 1}}</tool_call>' + f"{END}]")

    run(talk())


@pytest.mark.parametrize(
    ("limits", "code"),
    [({"turns": 1}, "turns"), ({"policy_tokens": 6}, "length"), ({"sequence_tokens": 40}, "length")],
)
def test_each_limit_ends_a_trajectory_with_its_reason(tokenizer, limits, code) -> None:
    async def talk():
        here = Talk(tokenizer, ["three", "never"], **limits)
        first, _, _ = await here.ask([ASK])
        asked = [ASK, first, {"role": "user", "content": "times 2?"}]
        for _ in range(2):
            with pytest.raises(TrajectoryEnded) as error:
                await here.ask(asked)
            assert error.value.code == here.trajectory.ended == code
        assert len(here.servers.asked) == 1

    run(talk())


def test_no_turn_may_take_more_than_is_left(tokenizer) -> None:
    async def talk():
        here = Talk(tokenizer, lambda _: "x" * 50, policy_tokens=30)
        first, _, answer = await here.ask([ASK], max_tokens=20)
        assert answer.finish_reason == "length"
        await here.ask([ASK, first, {"role": "user", "content": "more"}], max_tokens=20)
        assert [wanted.max_new_tokens for wanted in here.servers.asked] == [20, 10]
        with pytest.raises(TrajectoryEnded):
            await here.ask([ASK])
        # Several at a time share what is left, and wait where one may take all.
        here = Talk(tokenizer, lambda _: "yes", policy_tokens=30)
        await asyncio.gather(*(here.ask([ASK]) for _ in range(3)))
        assert sorted(wanted.max_new_tokens for wanted in here.servers.asked) == [22, 26, 30]

    run(talk())


def test_seeds_belong_to_what_is_asked_and_not_to_when(tokenizer) -> None:
    async def seeds(order, **body):
        here = Talk(tokenizer, lambda _: "yes", policy_tokens=9999)
        questions = {name: [{"role": "user", "content": name}] for name in "ab"}
        found = {}
        for name in order:
            await here.ask(questions[name], **body)
            found.setdefault(name, []).append(here.servers.asked[-1].seed)
        return found

    first, second = run(seeds("abab")), run(seeds("bbaa"))
    assert first == second
    assert len({*first["a"], *first["b"]}) == 4  # the same question again is sampled anew
    assert len(set(run(seeds("aa", seed=5))["a"])) == 1  # unless a seed says otherwise


def test_what_was_sampled_before_a_kill_is_not_sampled_again(tokenizer) -> None:
    kept = {}

    async def talk(say, **options):
        here = Talk(tokenizer, say, keep=kept.__setitem__, recall=kept.get, **options)
        first, _, _ = await here.ask([ASK])
        await here.ask([ASK, first, {"role": "user", "content": "times 2?"}])
        return here

    whole = run(talk(["three", "six"]))
    again = run(talk([]))
    assert again.servers.asked == []
    assert again.shown() == whole.shown()
    assert [s.rollout_logprobs.tolist() for s in again.trajectory.recording.segments()] == [
        s.rollout_logprobs.tolist() for s in whole.trajectory.recording.segments()
    ]


# Token by token ------------------------------------------------------------------------------------------------------


@st.composite
def turn_lists(draw):
    """Draw turns of a trajectory whose contexts continue an earlier one, a part of it, or none."""
    turns, wholes = [], [()]
    for number in range(draw(st.integers(1, 8))):
        base = draw(st.sampled_from(wholes))
        cut = draw(st.integers(0, len(base))) if draw(st.booleans()) else len(base)
        context = (*base[:cut], *draw(st.lists(st.integers(0, 3), min_size=1 if cut == 0 else 0, max_size=4)))
        output = tuple(1000 * (number + 1) + i for i in range(draw(st.integers(1, 4))))  # told apart from all others
        turns.append((context, output))
        wholes.append(context + output)
    return turns


@given(turn_lists())
def test_every_sampled_token_is_trained_once_behind_exactly_what_the_policy_read(turns) -> None:
    recording = Recording()
    for number, (context, output) in enumerate(turns):
        recording.add(
            Turn(
                context_ids=np.array(context, np.int32),
                output_ids=np.array(output, np.int32),
                logprobs=-np.array(output, np.float32),
                policy_versions=np.full(len(output), number, np.int32),
                finish_reason="stop",
            )
        )
    found = []
    for segment in recording.segments():
        assert len(segment.prompt_ids) > 0
        ids = [*segment.prompt_ids.tolist(), *segment.output_ids.tolist()]
        assert segment.turns[-1, 1] == len(segment.output_ids)
        done = 0
        for start, stop in segment.turns.tolist():
            where = len(segment.prompt_ids) + start
            found.append((tuple(ids[:where]), tuple(segment.output_ids[start:stop].tolist())))
            count = stop - start
            assert (-segment.rollout_logprobs[done : done + count]).tolist() == list(found[-1][1])
            done += count
        assert (np.diff(segment.policy_versions) >= 0).all()
    assert sorted(found) == sorted(turns)
    assert recording.num_policy_tokens == sum(len(output) for _, output in turns)
    assert recording.num_turns == len(turns)


TEXTS = st.text(st.sampled_from("ab <>|\n{}é"), max_size=8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=1, max_size=4), st.booleans())
def test_what_stands_behind_an_answer_is_what_the_template_writes_there(tokenizer, turns, with_tools) -> None:
    messages = []
    for asked, answered, calls in turns:
        more = json.dumps({"tool_calls": [{"function": {"name": "add", "arguments": {"a": asked}}}]}) if calls else ""
        messages.append(Message(role="user", content=f"{asked}{END}"))
        messages.append(Message(role="assistant", content=answered, more=more))
        if calls:
            messages.append(Message(role="tool", content=f"{answered}{START}"))
    messages.append(Message(role="user", content="?"))
    chat = Conversation(messages=tuple(messages), tools=json.dumps([TOOL]) if with_tools else "")
    whole = render_conversation(tokenizer, chat)
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        up_to = Conversation(messages=tuple(messages[:index]), tools=chat.tools)
        said = message.content
        for call in json.loads(message.more or "{}").get("tool_calls", ()):
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            said += f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
        ids = [
            *render_conversation(tokenizer, up_to),
            *tokenizer.encode(said, add_special_tokens=False),
            *render_behind(tokenizer, chat, index),
        ]
        assert tokenizer.decode(ids) == tokenizer.decode(whole)
        assert ids == whole
