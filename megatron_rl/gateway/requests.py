"""Reads OpenAI's JSON bodies into validated records. What is not understood is refused, unless it changes nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.data.messages import REASONING, Message, Wrong, tool_calls_of, tools_of
from megatron_rl.rollout.embedded.fields import RequestError, boolean, cut, default, integer, string
from megatron_rl.rollout.embedded.protocol import MAX_STOP_STRINGS

MAX_TEXT = 2**24

# Fields that a request may have and this gateway does not look at: they change nothing here.
_IGNORED = {
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("parallel_tool_calls", "stream_options"),
}
# The run, not the request, sets how the policy is sampled.
OF_THE_RUN = ("temperature", "top_p")
# Accepted with the value that means what is done anyway.
_OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
}
_SHARED = {*_IGNORED, *OF_THE_RUN, *_OFF, "max_tokens", "stop", "seed", "stream", "logprobs"}
_CHAT = _SHARED | {"messages", "tools", "tool_choice", "max_completion_tokens"}
_TEXT = _SHARED | {"prompt"}
_TOOL = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Holds what requests of both kinds say. max_tokens: None for as many as there is room for. usage: a stream tells
    it."""

    max_tokens: int | None
    stop: tuple[str, ...]
    seed: int | None
    stream: bool
    usage: bool
    logprobs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """Holds a request for a chat completion. tools: JSON of a list, "" for none. tool: the policy must call it; "" any,
    None does not have to."""

    messages: tuple[Message, ...]
    tools: str
    tool: str | None
    options: Options


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """Holds a request for a text completion. prompt: a text or token ids."""

    prompt: str | tuple[int, ...]
    options: Options


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Read the body of /v1/chat/completions. Raise RequestError, which names what is wrong."""
    _refuse_unknown(body, _CHAT)
    tools = _tools(body.get("tools"))
    shows_tools, tool = _tool_choice(body.get("tool_choice"), tools)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages must be a list of messages, not empty, got {cut(messages)}")
    found = tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))
    if found[-1].role == "assistant":
        raise RequestError(
            "the last message is the assistant's, and the policy answers others; put a message of the user or of a "
            "tool behind it"
        )
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    logprobs = boolean("logprobs", default(body, "logprobs", False))
    return ChatRequest(
        messages=found,
        tools=tools if shows_tools else "",
        tool=tool,
        options=_options(body, limit, logprobs),
    )


def parse_text(body: dict[str, Any], vocab_size: int) -> TextRequest:
    """Read the body of /v1/completions. Raise RequestError, which names what is wrong."""
    _refuse_unknown(body, _TEXT)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    logprobs = body.get("logprobs")
    if logprobs is not None:
        integer("logprobs", logprobs, 0, 1)
    options = _options(body, "max_tokens", logprobs is not None)
    if isinstance(prompt, list):
        if not prompt:
            raise RequestError("prompt must be a text or token ids, not empty, got []")
        return TextRequest(
            prompt=tuple(integer("a token id in prompt", token, 0, vocab_size - 1) for token in prompt), options=options
        )
    return TextRequest(prompt=string("prompt", prompt, MAX_TEXT), options=options)


def asks_for_other_sampling(body: Mapping[str, Any], temperature: float, top_p: float) -> str:
    """Return the field by which a request asks to be sampled otherwise than the run samples, with its value; "" for
    none."""
    of_run = {"temperature": temperature, "top_p": top_p}
    return next(
        (f"{name} {cut(body[name])}" for name in OF_THE_RUN if body.get(name) not in (None, of_run[name])),
        "",
    )


def _tools(value: Any) -> str:
    """Return JSON of the tools; "" for none."""
    if value is not None and not isinstance(value, list):
        raise RequestError(f"tools must be a list of {_TOOL}, got {cut(value)}")
    for index, tool in enumerate(value or ()):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"tools[{index}] must be {_TOOL}, got {cut(tool)}")
    tools = tools_of(value)
    try:
        tools.encode()
    except UnicodeEncodeError:
        raise RequestError("tools must be Unicode text, got half of a surrogate pair") from None
    return tools


def _tool_choice(value: Any, tools: str) -> tuple[bool, str | None]:
    """Tell whether tools are shown to the policy, and return the name of the one that it must call, "" for any, None
    where it must call none."""
    if value is None or value in ("auto", "none"):
        return value != "none", None
    names = [tool.get("function", tool).get("name") for tool in json.loads(tools)] if tools else []
    if value == "required" and names:
        return True, ""
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is not None and name in names:
        return True, str(name)
    raise RequestError(
        f'tool_choice must be "auto", "none", "required" or {{"type": "function", "function": {{"name": ...}}}} of one '
        f"of the tools ({', '.join(map(str, names)) or 'none are given'}), got {cut(value)}"
    )


def _refuse_unknown(body: Mapping[str, Any], known: set[str]) -> None:
    for key, value in body.items():
        if value is None:
            continue
        if key not in known and value not in (False, 0, "", [], {}):
            raise RequestError(f"{cut(key)} is not supported here, got {cut(value)}; leave it out")
        if key in _OFF and value not in _OFF[key]:
            raise RequestError(f"{key} must be {_OFF[key][0]!r} (not supported), got {cut(value)}; leave it out")


def _options(body: Mapping[str, Any], limit: str, logprobs: bool) -> Options:
    values = dict(body)
    stop = default(values, "stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOP_STRINGS:
        raise RequestError(f"stop must be a string or a list of at most {MAX_STOP_STRINGS}, got {cut(stop)}")
    told = default(values, "stream_options", {})
    if not isinstance(told, dict):
        raise RequestError(f"stream_options must be an object, got {cut(told)}")
    most, seed = values.get(limit), values.get("seed")
    return Options(
        max_tokens=None if most is None else integer(limit, most, 1, 2**31 - 1),
        stop=tuple(string("a string in stop", one) for one in stops),
        seed=None if seed is None else integer("seed", seed, -(2**63), 2**64 - 1),
        stream=boolean("stream", default(values, "stream", False)),
        usage=boolean("stream_options.include_usage", default(told, "include_usage", False)),
        logprobs=logprobs,
    )


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise RequestError(f"{name} must be an object with a role out of {', '.join(_ROLES)}, got {cut(value)}")
    role = _ROLES[value["role"]]
    more: dict[str, Any] = {}
    if role == "assistant":
        try:
            if value.get("tool_calls"):
                more["tool_calls"] = tool_calls_of(value["tool_calls"], name)
        except Wrong as error:
            raise RequestError(str(error)) from None
        more |= {key: _text(value[key], f"{name}.{key}") for key in REASONING if value.get(key)}
    elif role == "tool":
        more |= {key: _text(value[key], f"{name}.{key}") for key in ("name", "tool_call_id") if value.get(key)}
    known = {"role", "content", "name", "tool_call_id", "tool_calls", *REASONING}
    for key in value.keys() - known:
        if value[key] not in (None, False, "", [], {}):
            raise RequestError(f"{name}.{cut(key)} is not supported, got {cut(value[key])}; leave it out")
    content = value.get("content")
    return Message(
        role=role,
        content="" if content is None else _text(content, f"{name}.content"),
        more=json.dumps(more, ensure_ascii=False) if more else "",
    )


def _text(value: Any, name: str) -> str:
    """Read a text, or the texts of a list of parts."""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise RequestError(f"{name} must be text, and has a part of type {cut(kind)} (not supported)")
        value = "".join(str(part.get("text") or "") for part in value)
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a text or a list of parts of type 'text', got {cut(value)}")
    return "" if value == "" else string(name, value, MAX_TEXT)
