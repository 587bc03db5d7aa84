"""Tests that tool calls and reasoning are found in what a policy writes."""

from types import SimpleNamespace

import pytest
from agent_chat import chat_tokenizer

from megatron_rl.gateway.parsers import PARSERS, parser_for

TOOLS = [{"type": "function", "function": {"name": "add"}}]
# The response template, as transformers calls it, of the tokenizer in agent_chat.py.
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>", "content": "text"},
    },
}
JSON_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
LLAMA_CALL = '{"name": "add", "parameters": {"a": 1}}'
ADD = [("add", {"a": 1})]


def read(parser, text, context="", tools=TOOLS):
    said = PARSERS[parser].parse(text, context, tools)
    return said.reasoning, said.content, [(call.name, dict(call.arguments)) for call in said.calls], said.num_broken


@pytest.mark.parametrize(
    ("parser", "text", "expected"),
    [
        ("hermes", JSON_CALL, ("", "", ADD, 0)),
        ("hermes", f"<think>why</think>\n\nso {JSON_CALL}{JSON_CALL}", ("why", "so", ADD * 2, 0)),
        ("hermes", "no call", ("", "no call", [], 0)),
        # Arguments may be a text of JSON. What is no call stays where it is.
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", "", ADD, 0)),
        ("hermes", f"{JSON_CALL}<tool_call>{{", ("", "<tool_call>{", ADD, 1)),
        ("hermes", "<tool_call>[1]</tool_call>", ("", "<tool_call>[1]</tool_call>", [], 1)),
        ("hermes", '<tool_call>{"name": 3}</tool_call>', ("", '<tool_call>{"name": 3}</tool_call>', [], 1)),
        ("hermes", "<tool_call>" + "[" * 5000, ("", "<tool_call>" + "[" * 5000, [], 1)),
        ("ling", JSON_CALL, ("", "", ADD, 0)),
        (
            "ling",
            "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>"
            "<arg_value>x < y</arg_value></tool_call>",
            ("", "", [("add", {"a": 1, "b": "x < y"})], 0),
        ),
        ("ling", "<tool_call>now</tool_call>", ("", "", [("now", {})], 0)),
        ("ling", "<tool_call>add it</tool_call>", ("", "<tool_call>add it</tool_call>", [], 1)),
        ("llama3", LLAMA_CALL, ("", "", ADD, 0)),
        ("llama3", f'so <|python_tag|>{LLAMA_CALL}; {{"name": "b"}}', ("", "so", [*ADD, ("b", {})], 0)),
        ("llama3", f"{LLAMA_CALL} and more", ("", f"{LLAMA_CALL} and more", [], 1)),
        ("llama3", "{x}", ("", "{x}", [], 1)),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', ("", "", ADD, 0)),
        (
            "mistral",
            'so [TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "123456789"}, {"name": "now"}]',
            ("", "so", [*ADD, ("now", {})], 0),
        ),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]now[ARGS]{}', ("", "", [*ADD, ("now", {})], 0)),
        ("mistral", '[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1}', ("", "", ADD, 0)),
        ("mistral", "no call", ("", "no call", [], 0)),
        ("mistral", "[TOOL_CALLS]add[ARGS]{", ("", "[TOOL_CALLS]add[ARGS]{", [], 1)),
        ("mistral", "[TOOL_CALLS] []", ("", "[TOOL_CALLS] []", [], 1)),
        ("mistral", '[TOOL_CALLS] [{"name": 3}]', ("", '[TOOL_CALLS] [{"name": 3}]', [], 1)),
        ("mistral", "[TOOL_CALLS]add[ARGS][1]", ("", "[TOOL_CALLS]add[ARGS][1]", [], 1)),
        ("none", f"<think>why</think>{JSON_CALL}", ("why", JSON_CALL, [], 0)),
    ],
)
def test_each_family_writes_calls_in_its_own_way(parser, text, expected) -> None:
    assert read(parser, text) == expected


def test_without_tools_nothing_is_a_call() -> None:
    assert read("hermes", JSON_CALL, tools=[]) == ("", JSON_CALL, [], 0)
    assert read("mistral", "[TOOL_CALLS] []", tools=[]) == ("", "[TOOL_CALLS] []", [], 0)
    assert read("llama3", '{"name": "add"}', tools=[]) == ("", '{"name": "add"}', [], 0)


def test_the_template_may_have_begun_the_reasoning() -> None:
    assert read("none", "why</think>so", "<|assistant|>\n<think>\n") == ("why", "so", [], 0)
    # Cut off in the middle of it, all of it is reasoning.
    assert read("none", "because", "<|assistant|>\n<think>\n") == ("because", "", [], 0)
    assert read("none", "<think>because") == ("because", "", [], 0)
    assert read("none", "because") == ("", "because", [], 0)


def test_the_parser_is_found_by_the_tokenizer_and_an_unknown_name_is_refused() -> None:
    def found(template):
        return parser_for(SimpleNamespace(chat_template=template, response_template=None), "auto")

    assert found("{{ '<tool_call>' }}") is PARSERS["hermes"]
    assert found("<role>ASSISTANT</role><tool_call>") is PARSERS["ling"]
    assert found("<tool_call><arg_key>") is PARSERS["ling"]
    assert found("<|start_header_id|>ipython") is PARSERS["llama3"]
    assert found("{{ '[TOOL_CALLS]' }}") is PARSERS["mistral"]
    assert found("{{ messages }}") is PARSERS["none"]
    with pytest.raises(ValueError, match=r"tool_parser must be one of auto, template, hermes.*, got 'herms'.*hermes"):
        parser_for(SimpleNamespace(chat_template="", response_template=None), "herms")
    with pytest.raises(ValueError, match="needs a response_template in the model's tokenizer_config.json"):
        parser_for(SimpleNamespace(chat_template="", response_template=None), "template")


def test_a_tokenizer_that_describes_its_responses_is_taken_at_its_word(tmp_path) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    tokenizer.response_template = RESPONSES
    parse = parser_for(tokenizer, "auto").parse
    said = parse(f"<think>why</think>so{JSON_CALL}", "1+2?<|start|>assistant\n", TOOLS)
    assert (said.reasoning, said.content, [(c.name, dict(c.arguments)) for c in said.calls]) == ("why", "so", ADD)
    # Text that it cannot read is content.
    assert parse("<tool_call>{", "<|start|>assistant\n", TOOLS).content == "<tool_call>{"
