"""Reads the messages of a conversation as rows have them, for chat templates to take.

{"role": "system" | "user" | "assistant" | "tool", "content": str or text parts}; an assistant's may have tool_calls and
reasoning (reasoning_content, reasoning or thinking), a tool's name and tool_call_id.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.parsing import parse_json, shown

ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
_MORE = {"assistant": (*REASONING, "tool_calls"), "tool": ("name", "tool_call_id")}


class Wrong(ValueError):
    """Says that a field of a row cannot be used. The message names it, its value and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Holds one message. more: the other keys of the message as one JSON object, in their order; "" for none."""

    role: str
    content: str
    more: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates and endpoints take it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Holds what a chat template renders. tools: JSON of a list of tool descriptions; "" for none."""

    messages: tuple[Message, ...]
    tools: str = ""

    @property
    def is_plain(self) -> bool:
        """Tell whether it is one message of the user and nothing else."""
        return len(self.messages) == 1 and self.messages[0].role == "user" and not self.tools

    def parts(self) -> list[Any]:
        """Return all that it says, as JSON."""
        return [[[message.role, message.content, message.more] for message in self.messages], self.tools]


def of_text(text: str) -> Conversation:
    """Return a conversation of one question."""
    return Conversation(messages=(Message(role="user", content=text),))


def text_of(row: Mapping[str, Any], name: str) -> str:
    """Return the text of a field; raises Wrong. A number is taken for its text, and of an answer a list of texts for
    JSON of answers that are all right, and an object for JSON of tests."""
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    elif name == "answer" and (isinstance(value, dict) or is_list_of_texts(value)):
        value = json.dumps(value, ensure_ascii=False)
    if name not in row:
        raise Wrong(f"there is no field {name!r}; the row has {', '.join(map(shown, row)) or 'none'}")
    if not isinstance(value, str) or not value.strip():
        remedy = "write it in quotes" if isinstance(value, bool | float) else "fill it in or drop the row"
        raise Wrong(f"field {name!r} must be a non-empty string, got {shown(value)}; {remedy}")
    _refuse_half_pairs(value, name)
    return value


def is_list_of_texts(value: object) -> bool:
    """Tell whether this is a list of texts, none of them empty: answers that are all right."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item.strip() for item in value)


def prompt_of(value: object, name: str = "prompt") -> tuple[Message, ...]:
    """Return the messages of a prompt that the model is to continue; raises Wrong."""
    messages = _messages(value, name)
    if messages[-1].role not in ("user", "tool"):
        raise Wrong(
            f"field {name!r} must end with a message of the user or of a tool, got role {messages[-1].role!r} last; "
            "drop what the model is to say itself"
        )
    return messages


def messages_of(value: object) -> tuple[Message, ...]:
    """Return the messages of a conversation that is to be learned from; raises Wrong."""
    messages = _messages(value, "messages")
    if messages[-1].role != "assistant":
        raise Wrong(
            f"field 'messages' must end with an assistant message, got role {messages[-1].role!r} last; "
            "drop what follows the last answer"
        )
    if messages[0].role == "assistant":
        raise Wrong(
            "field 'messages' must not begin with an assistant message, got role 'assistant' first; "
            "put the question before it"
        )
    return messages


def tools_of(value: object) -> str:
    """Return JSON of the tools that a row names, "" for none; raises Wrong."""
    if isinstance(value, str) and value.strip():
        with contextlib.suppress(ValueError):
            value = parse_json(value)
    if value is None or value == [] or value == "":
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Wrong(
            f"field 'tools' must be a list of objects, each a tool's JSON schema, got {shown(value)}; give a column of "
            "another meaning another name"
        )
    return json.dumps(value, ensure_ascii=False)


def _messages(value: object, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise Wrong(
            f"field {field!r} must be a non-empty list, got {shown(value)}; "
            'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        )
    messages = []
    for index, item in enumerate(value):
        name = f"{field}[{index}]"
        try:
            messages.append(_message(item, name))
        except _OfContent as wrong:
            raise Wrong(f"{name}: {wrong}") from None
    return tuple(messages)


class _OfContent(Wrong):
    """Says that a field of a message cannot be used. It names only the field in the message."""


def _message(item: object, name: str) -> Message:
    if not isinstance(item, dict) or "role" not in item:
        raise Wrong(
            f"field {name!r} must be an object of 'role' and 'content', got {shown(item)}; leave out other keys"
        )
    role = item["role"]
    if role not in ROLES:
        raise Wrong(f"field '{name}.role' must be one of {', '.join(ROLES)}, got {shown(role)}; rename the role")
    more = {key: part for key, part in item.items() if key not in ("role", "content") and part not in (None, "", [])}
    if unknown := [key for key in more if key not in _MORE.get(role, ())]:
        known = ", ".join(("content", *_MORE.get(role, ())))
        raise Wrong(
            f"field {name!r} must be an object of 'role' and 'content', got {shown(item)}, with {unknown[0]!r}; one of "
            f"role {role} may have {known}; leave out other keys"
        )
    if "tool_calls" in more:
        more["tool_calls"] = tool_calls_of(more["tool_calls"], name)
    for key in (*REASONING, *_MORE["tool"]):
        if key in more:
            more[key] = _content({key: more[key]}, key)
    is_empty = item.get("content") in (None, "")
    content = "" if is_empty and "tool_calls" in more else _content(item, "content")
    return Message(role=role, content=content, more=json.dumps(more, ensure_ascii=False) if more else "")


def _content(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        item = {key: "".join(str(part.get("text", "")) for part in value)}
    try:
        return text_of(item, key)
    except Wrong as wrong:
        raise _OfContent(str(wrong)) from None


def tool_calls_of(value: object, name: str) -> list[dict[str, Any]]:
    """Return the calls of a message, with arguments as objects, which every template can write; raises Wrong."""
    remedy = 'write [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise Wrong(f"field '{name}.tool_calls' must be a list of objects, got {shown(value)}; {remedy}")
    calls = []
    for call in value:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Wrong(f"field '{name}.tool_calls' must name the function of each call, got {shown(call)}; {remedy}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except ValueError as error:
                raise Wrong(
                    f"field '{name}.tool_calls' has arguments that are no JSON ({error}), {shown(arguments)}; {remedy}"
                ) from None
        if not isinstance(arguments, dict):
            raise Wrong(f"field '{name}.tool_calls' has arguments that are no object, {shown(arguments)}; {remedy}")
        whole = call if "function" in call else {"type": "function"}
        calls.append(whole | {"function": function | {"arguments": arguments}})
    _refuse_half_pairs(json.dumps(calls, ensure_ascii=False), f"{name}.tool_calls")
    return calls


def _refuse_half_pairs(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Wrong(f"field {name!r} holds half of a surrogate pair, got {shown(text)}; repair its escapes") from None


def with_suffix(messages: Sequence[Message], suffix: str) -> tuple[Message, ...]:
    """Return the messages with a text appended to the last one."""
    last = messages[-1]
    return (*messages[:-1], Message(role=last.role, content=last.content + suffix, more=last.more))


def with_system(messages: Sequence[Message], system: str) -> tuple[Message, ...]:
    """Return the messages with a system message before them, unless they have one or there is none."""
    if not system or messages[0].role == "system":
        return tuple(messages)
    return (Message(role="system", content=system), *messages)
