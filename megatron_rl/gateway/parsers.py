"""Reads what a text of the policy says: reasoning, an answer, and calls of tools, which each family writes in its own
way.

What is no whole call stays in the text, where whoever reads it sees what the policy tried.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_rl.parsing import meant, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THINK, _END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Call:
    """Holds a call of a tool by the policy. arguments: a JSON object."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Holds what a text says. num_broken: beginnings of calls in the content that are no whole calls."""

    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    num_broken: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseParser:
    """Reads the responses of one family.

    parse: a text of the policy, the text of its context, and the tools that it was offered.

    forced: what the policy finds written already where it has to call a tool, the one of that name or any (""). None
    where it cannot be made to.
    """

    parse: Callable[[str, str, list[Any]], Said]
    forced: Callable[[str], str] | None = field(default=None)


def parser_for(tokenizer: "PreTrainedTokenizerBase", name: str) -> ResponseParser:
    """Return the parser of that name; "auto" finds it by the tokenizer. Raise ValueError for a name that is not
    known."""
    has_own = getattr(tokenizer, "response_template", None) is not None
    template = str(tokenizer.chat_template)
    if name == "auto":
        if has_own:
            name = "template"
        elif "<tool_call>" in template:
            name = "ling" if "<arg_key>" in template or "<role>" in template else "hermes"
        elif "[TOOL_CALLS]" in template:
            name = "mistral"
        elif "<|python_tag|>" in template or "ipython" in template:
            name = "llama3"
        else:
            name = "none"
    if name == "template":
        if not has_own:
            raise ValueError(
                "rollout.tool_parser 'template' needs a response_template in the model's tokenizer_config.json; name "
                f"one of {', '.join(PARSERS)}"
            )
        return ResponseParser(parse=_by_template(tokenizer))
    if name not in PARSERS:
        raise ValueError(
            f"rollout.tool_parser must be one of auto, template, {', '.join(PARSERS)}, got {name!r}"
            f"{meant(name, PARSERS)}"
        )
    return PARSERS[name]


def thought(text: str, context: str) -> tuple[str, str]:
    """Return (reasoning, what follows it). The template may have begun the reasoning at the end of the context."""
    begun = context.rstrip().endswith(_THINK)
    stripped = text.lstrip()
    if stripped.startswith(_THINK):
        text, begun = stripped[len(_THINK) :], True
    reasoning, end, rest = text.partition(_END_THINK)
    if end:
        return reasoning.strip(), rest.lstrip()
    return (text.strip(), "") if begun else ("", text)


def _without_calls(text: str, context: str, _: list[Any]) -> Said:
    reasoning, content = thought(text, context)
    return Said(content=content, reasoning=reasoning)


def _in_tags(read: Callable[[str], Call | None]) -> Callable[[str, str, list[Any]], Said]:
    """Return a parser of calls in <tool_call> and </tool_call>, each of which `read` reads."""

    def parse(text: str, context: str, tools: list[Any]) -> Said:
        reasoning, content = thought(text, context)
        if not tools:
            return Said(content=content, reasoning=reasoning)
        kept: list[str] = []
        calls: list[Call] = []
        num_broken = 0
        first, *rest = content.split("<tool_call>")
        for part in rest:
            inside, end, behind = part.partition("</tool_call>")
            call = read(inside.strip()) if end else None
            if call is None:
                num_broken += 1
                kept.append(f"<tool_call>{part}")
            else:
                calls.append(call)
                kept.append(behind)
        content = "".join([first, *kept])
        return Said(
            content=content.strip() if calls else content,
            reasoning=reasoning,
            calls=tuple(calls),
            num_broken=num_broken,
        )

    return parse


def _json_call(text: str, key: str = "arguments") -> Call | None:
    """Read a call written as {"name": ..., "arguments": {...}}; None for what is none."""
    try:
        return _call_in(parse_json(text), key)
    except ValueError:
        return None


def _call_in(value: Any, key: str = "arguments") -> Call | None:
    """Read a call from such a value, parsed; None for what is none."""
    try:
        arguments = value.get(key, {})
        arguments = parse_json(arguments) if isinstance(arguments, str) else arguments
        name = value["name"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Call(name, arguments) if isinstance(name, str) and name and isinstance(arguments, dict) else None


_PAIR = re.compile(r"<arg_key>([^<]*)</arg_key>\s*<arg_value>((?:(?!</arg_value>).)*)</arg_value>", re.DOTALL)


def _ling_call(text: str) -> Call | None:
    """Read a call as Ling 2.0 writes it, which is JSON, or Ling 3.0: the name, and tagged keys and values. None for
    what is none."""
    if text.startswith("{"):
        return _json_call(text)
    name, tag, pairs = text.partition("<arg_key>")
    pairs = tag + pairs
    if not re.fullmatch(r"[\w.-]+", name.strip()) or _PAIR.sub("", pairs).strip():
        return None
    return Call(name.strip(), {key.strip(): _value(value) for key, value in _PAIR.findall(pairs)})


def _value(text: str) -> Any:
    """Return the value of JSON where the text is some; otherwise the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def _llama3(text: str, context: str, tools: list[Any]) -> Said:
    """Parse a text that is a call as a whole, or in which all behind <|python_tag|> are calls, with ";" between
    them."""
    reasoning, content = thought(text, context)
    before, tag, behind = content.partition("<|python_tag|>")
    written = behind if tag else content.strip()
    if not tools or not (tag or written.startswith("{")):
        return Said(content=content, reasoning=reasoning)
    calls = [_json_call(part, "parameters") for part in _objects(written)]
    whole = [call for call in calls if call is not None]
    if not whole or len(whole) < len(calls):
        return Said(content=content, reasoning=reasoning, num_broken=1)
    return Said(content=before.strip() if tag else "", reasoning=reasoning, calls=tuple(whole))


_NAMED_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?\[ARGS\](.*)", re.DOTALL)


def _mistral(text: str, context: str, tools: list[Any]) -> Said:
    """Parse calls behind [TOOL_CALLS], as Mistral's models write them: a list of JSON, or since 2025 a name, [ARGS] and
    the arguments, each behind a tag of its own."""
    reasoning, content = thought(text, context)
    before, *parts = content.split("[TOOL_CALLS]")
    if not tools or not parts:
        return Said(content=content, reasoning=reasoning)
    calls = [call for part in parts for call in _mistral_calls(part)]
    whole = [call for call in calls if call is not None]
    if len(whole) < len(calls):
        return Said(content=content, reasoning=reasoning, num_broken=1)
    return Said(content=before.strip(), reasoning=reasoning, calls=tuple(whole))


def _mistral_calls(part: str) -> list[Call | None]:
    named = _NAMED_CALL.fullmatch(part)
    try:
        if named is not None:
            return [_call_in({"name": named[1], "arguments": parse_json(named[2])})]
        value = parse_json(part)
    except ValueError:
        return [None]
    return [_call_in(one) for one in value] if isinstance(value, list) and value else [None]


def _objects(text: str) -> list[str]:
    """Divide a text into JSON objects one after the other, and what is left as the last."""
    found: list[str] = []
    decoder = json.JSONDecoder()
    text = text.strip()
    while text:
        try:
            _, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return [*found, text]
        found.append(text[:end])
        text = text[end:].lstrip(" \n;")
    return found


def _by_template(tokenizer: Any) -> Callable[[str, str, list[Any]], Said]:
    """Return a parser by the tokenizer's own description of its responses."""

    def parse(text: str, context: str, tools: list[Any]) -> Said:
        try:
            found = tokenizer.parse_response(text, prefix=context, tools=tools or None)
            calls = tuple(_call_of(call) for call in found.get("tool_calls") or ())
            return Said(
                content=str(found.get("content") or ""),
                reasoning=str(found.get("reasoning_content") or found.get("thinking") or ""),
                calls=calls,
            )
        except Exception:  # whatever a template of somebody else's makes of what a policy wrote
            return Said(content=text, num_broken=1)

    return parse


def _call_of(call: Mapping[str, Any]) -> Call:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    arguments = parse_json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a call are no object")
    return Call(str(function["name"]), arguments)


def _forced_in_tags(name: str) -> str:
    return '<tool_call>\n{"name": "' + (f'{name}", "arguments": ' if name else "")


def _forced_llama3(name: str) -> str:
    return '{"name": "' + (f'{name}", "parameters": ' if name else "")


PARSERS = {
    "hermes": ResponseParser(parse=_in_tags(_json_call), forced=_forced_in_tags),
    "llama3": ResponseParser(parse=_llama3, forced=_forced_llama3),
    "ling": ResponseParser(parse=_in_tags(_ling_call), forced=_forced_in_tags),
    "mistral": ResponseParser(parse=_mistral),
    "none": ResponseParser(parse=_without_calls),
}
