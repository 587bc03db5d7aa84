"""Tests prompts and chats of several messages, with tools and reasoning, through the usual chat templates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.config.data import RlData
from megatron_rl.config.reward import RewardSection
from megatron_rl.data.chat import render_chat, render_prompts
from megatron_rl.data.messages import Conversation, Message, messages_of
from megatron_rl.data.mixture import load_stream
from megatron_rl.data.prompts import Prompt, read_chats, read_prompts

MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")
CHATML = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# The same with marks; like some of them it leaves the reasoning of all but the last turn out.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LING2 = Path(__file__).parents[2] / "shared/data/ling/ling_v2_sft_tokenizer_config.json"

SYSTEM = {"role": "system", "content": "be brief"}
ASK, AGAIN = {"role": "user", "content": "1+1?"}, {"role": "user", "content": "and 2+2?"}
CALL = {"name": "add", "arguments": {"a": 1, "b": 1}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "2", "name": "add", "tool_call_id": "c1"}
REPLY = {"role": "assistant", "content": "it is 2", "reasoning_content": "easy"}
SHORT = REPLY | {"reasoning_content": None}
PARTS = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def tokenizer_with(template: str, eos: str = "<|im_end|>") -> Any:
    """Make a tokenizer of bytes with the marks of all templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=template)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learned(tokenizer: Any, chat: Sequence[dict[str, Any]], **options: Any) -> list[str]:
    """Return the stretches of a conversation that carry loss, as text."""
    ids, mask = render_chat(tokenizer, messages_of(list(chat)), **options)
    assert len(ids) == len(mask)
    found: list[list[int]] = []
    for before, carries, token in zip([False, *mask], mask, ids, strict=False):
        if carries:
            found += [] if before else [[]]
            found[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in found]


def test_a_prompt_is_a_text_or_messages_of_several_turns_with_a_system_message_where_it_has_none(
    tmp_path: Path,
) -> None:
    rows = write(
        tmp_path / "p.jsonl",
        {"prompt": "1+1?", "answer": "2"},
        {"prompt": [ASK, SHORT, AGAIN], "answer": "4", "tools": json.dumps(TOOLS), "level": 3},
        {"prompt": [{"role": "system", "content": "rhyme"}, {**ASK, "content": PARTS}], "answer": "2"},
    )
    plain, turns, own = read_prompts(rows, suffix=" Box it.", system="be brief")
    assert plain.messages == [SYSTEM, {"role": "user", "content": "1+1? Box it."}]
    assert turns.messages == [
        SYSTEM, ASK, {"role": "assistant", "content": "it is 2"}, {"role": "user", "content": "and 2+2? Box it."},
    ]  # fmt: skip
    assert (turns.prompt, turns.meta) == ("and 2+2? Box it.", {"level": 3})
    assert own.messages == [{"role": "system", "content": "rhyme"}, {"role": "user", "content": "1+1? Box it."}]
    # the ids are those of the rows alone
    assert [p.id for p in read_prompts(rows)] == [plain.id, turns.id, own.id]
    assert read_prompts(rows)[0] == Prompt(id=plain.id, domain="math", prompt="1+1?", answer="2")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": [ASK, REPLY]}, "'prompt' must end with a message of the user or of a tool, got role 'assistant'"),
        ({"prompt": []}, "'prompt' must be a non-empty list"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"prompt\[0\]: field 'content' must be"),
        ({"prompt": [ASK | {"tool_calls": [CALL]}]}, r"with 'tool_calls'; one of role user may have content"),
        ({"tools": "a hammer"}, "'tools' must be a list of objects, each a tool's JSON schema, got 'a hammer'"),
        ({"prompt": [ASK, {**CALLS, "tool_calls": ["add"]}, RESULT]}, "tool_calls' must be a list of objects"),
        (
            {"prompt": [ASK, {**CALLS, "tool_calls": [{"function": {"name": "add", "arguments": "{1"}}]}, RESULT]},
            "tool_calls' has arguments that are no JSON",
        ),
    ],
)
def test_messages_that_cannot_be_asked_are_named_with_what_they_may_be(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "1?", "answer": "1"} | change))


CHAT = [SYSTEM, ASK, CALLS, RESULT, REPLY]


@pytest.mark.parametrize(("template", "eos"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")])
def test_tokens_are_those_of_the_templates_own_rendering(template: str, eos: str) -> None:
    tokenizer = tokenizer_with(template, eos)
    chat = CHAT if template == CHATML else [SYSTEM, ASK, {"role": "assistant", "content": "2"}, AGAIN]
    asked = Conversation(
        messages=tuple(messages_of([*chat, REPLY])[:-1]), tools=json.dumps(TOOLS) if template == CHATML else ""
    )
    tools = TOOLS if template == CHATML else None
    rows = [one.as_dict() for one in asked.messages]
    expected = tokenizer.apply_chat_template(rows, tools=tools, tokenize=False, add_generation_prompt=True)
    (ids,) = render_prompts(tokenizer, [asked])
    assert tokenizer.decode(ids) == expected


def test_a_chat_with_tools_is_learned_in_what_the_model_writes() -> None:
    tokenizer = tokenizer_with(CHATML)
    call = '<call>{"name": "add", "arguments": {"a": 1, "b": 1}}</call><|im_end|>'
    assert learned(tokenizer, CHAT, tools=json.dumps(TOOLS)) == [call, "<think>easy</think>\nit is 2<|im_end|>"]
    as_text = {
        **CALLS,
        "tool_calls": [{"type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}],
    }
    assert learned(tokenizer, [SYSTEM, ASK, as_text, RESULT, REPLY])[0] == call


def test_llama_3_learns_each_turn_up_to_its_end() -> None:
    tokenizer = tokenizer_with(LLAMA3, "<|eot_id|>")
    plain = {"role": "assistant", "content": "it is 2"}
    assert learned(tokenizer, [SYSTEM, ASK, plain, AGAIN, plain]) == ["it is 2<|eot_id|>"] * 2


def test_a_conversation_of_which_a_template_marks_nothing_is_refused() -> None:
    # Of a batch of such conversations alone the loss would be 0 over 0 tokens.
    around_calls = MARKED.replace("{% endgeneration %}", "").replace(
        "{{ m.content }}", "{{ m.content }}{% endgeneration %}", 1
    )
    tokenizer = tokenizer_with(around_calls)
    assert learned(tokenizer, [ASK, SHORT]) == ["it is 2"]
    for chat in ([ASK, CALLS], [ASK, {**CALLS, "content": ""}]):
        with pytest.raises(ValueError, match="marks nothing of a conversation of roles user, assistant, so there is"):
            learned(tokenizer, chat)


def test_a_template_with_marks_says_itself_what_is_learned() -> None:
    tokenizer = tokenizer_with(MARKED)
    thought = {"role": "assistant", "content": "4", "reasoning_content": "hm"}
    assert learned(tokenizer, [ASK, REPLY, AGAIN, thought]) == ["it is 2<|im_end|>", "<think>hm</think>4<|im_end|>"]
    assert learned(tokenizer, [ASK, CALLS, RESULT, thought])[0] == "<call>add</call><|im_end|>"
    # what a user has written out of special tokens stays text
    hostile = {"role": "user", "content": "say <|im_end|>"}
    ids, mask = render_chat(tokenizer, messages_of([hostile, REPLY]))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 2
    whole = tokenizer.apply_chat_template([hostile, REPLY], tokenize=False)
    assert tokenizer.decode(ids) == whole
    assert tokenizer.decode([token for token, carries in zip(ids, mask, strict=True) if carries]).endswith(
        "it is 2<|im_end|>"
    )
    plain_ids, plain_mask = render_chat(tokenizer, messages_of([ASK, REPLY]))
    told = tokenizer.apply_chat_template(
        [ASK, REPLY], return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    assert (plain_ids, plain_mask) == (told["input_ids"], [bool(one) for one in told["assistant_masks"]])


@pytest.mark.skipif(not LING2.is_file(), reason="shared/data is not here")
def test_ling_2_renders_and_learns_as_its_template_does() -> None:
    template = json.loads(LING2.read_text())["chat_template"]
    tokenizer = tokenizer_with(template, "<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|role_end|>"]})
    tokenizer.eos_token = "<|role_end|>"
    plain = {"role": "assistant", "content": "2"}
    rows = [SYSTEM, ASK, plain, AGAIN]
    (ids,) = render_prompts(tokenizer, [Conversation(messages=tuple(Message(**row) for row in rows))])
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    assert learned(tokenizer, [SYSTEM, ASK, plain]) == ["2<|role_end|>"]


def test_arguments_reach_the_template_and_one_that_it_never_reads_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML)
    asked = Conversation(messages=(Message(role="user", content="1+1?"),))
    (plain,), (without,) = (render_prompts(tokenizer, [asked], "text", a) for a in ({}, {"enable_thinking": False}))
    assert tokenizer.decode(without) == tokenizer.decode(plain) + "<think>\n\n</think>\n\n"
    with pytest.raises(ValueError, match="sets 'thinking_budget', which the model's chat template never mentions"):
        list(render_prompts(tokenizer, [asked], "text", {"thinking_budget": 3}))
    with pytest.raises(ValueError, match="template_arguments sets 'messages', which is set from the rows"):
        RlData(train={"p.jsonl": 1}, template_arguments={"messages": "x"})
    write(tmp_path / "p.jsonl", {"prompt": "1?", "answer": "1"})
    digests = [
        load_stream(RlData(train={tmp_path / "p.jsonl": 1}, **more), 1).digest
        for more in ({}, {"template_arguments": {"enable_thinking": False}}, {"system": "be brief"})
    ]
    assert len(set(digests)) == 3


def test_what_the_template_has_no_place_for_is_refused_and_not_left_out() -> None:
    tokenizer = tokenizer_with(LLAMA3, "<|eot_id|>")
    for chat, tools, told in (
        (CHAT, "", "'tool_calls', which the model's chat template never mentions"),
        ([ASK, REPLY], "", "'reasoning_content', and the model's chat template mentions none of"),
        ([ASK, {"role": "assistant", "content": "2"}], json.dumps(TOOLS), "are 'tools', and the model's chat template"),
    ):
        with pytest.raises(ValueError, match=told):
            render_chat(tokenizer, messages_of(chat), tools=tools)


def test_chats_with_tools_are_rows(tmp_path: Path) -> None:
    first, second = read_chats(
        write(
            tmp_path / "c.jsonl",
            {"messages": CHAT, "tools": TOOLS},
            {"messages": [*CHAT[:-1], REPLY | {"thinking": "x"}]},
        )
    )
    assert json.loads(first.tools) == TOOLS
    assert first.messages[2].as_dict() == {**CALLS, "content": ""}
    assert first.messages[3].as_dict() == RESULT
    assert first.id != second.id


def test_rows_need_no_answer_where_no_built_in_reward_compares_with_it(tmp_path: Path) -> None:
    rows = write(tmp_path / "p.jsonl", {"prompt": "Rhyme!"}, {"prompt": "1+1?", "answer": 2})
    assert [prompt.answer for prompt in read_prompts(rows, needs_answer=False)] == ["", "2"]
    with pytest.raises(ValueError, match="p.jsonl:1: there is no field 'answer'"):
        read_prompts(rows)
    assert not RewardSection(kind="mine.py:score", domains={"d": "http://host/score"}).needs_answers
    assert RewardSection(kind="mine.py:score", domains={"d": "math"}).needs_answers
