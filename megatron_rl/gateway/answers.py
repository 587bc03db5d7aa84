"""Writes answers and errors as OpenAI's JSON, whole and as streams of server-sent events."""

import json
import time
from collections.abc import Iterator
from typing import Any

from megatron_rl.gateway.trajectory import Answer, call_id

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"  # a comment, which clients pass over


def chat_answer(answer: Answer, model: str) -> dict[str, Any]:
    """Return a chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.said.content, "refusal": None}
    if answer.said.reasoning:
        message["reasoning_content"] = answer.said.reasoning
    if answer.said.calls:
        message["tool_calls"] = _calls(answer)
        message["content"] = answer.said.content or None
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _chat_logprobs(answer),
        "finish_reason": answer.finish_reason,
    }
    return _head(answer, model, "chat.completion", "chatcmpl") | {"choices": [choice], "usage": _usage(answer)}


def text_answer(answer: Answer, model: str) -> dict[str, Any]:
    """Return a text completion."""
    choice = {
        "index": 0,
        "text": answer.said.content,
        "logprobs": _text_logprobs(answer),
        "finish_reason": answer.finish_reason,
    }
    return _head(answer, model, "text_completion", "cmpl") | {"choices": [choice], "usage": _usage(answer)}


def chat_events(answer: Answer, model: str, usage: bool) -> Iterator[bytes]:
    """Yield a chat completion as a stream. It is made once the turn is whole, since a lost server's work is sampled
    again."""
    head = _head(answer, model, "chat.completion.chunk", "chatcmpl")
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    if answer.said.reasoning:
        deltas.append({"reasoning_content": answer.said.reasoning})
    if answer.said.content:
        deltas.append({"content": answer.said.content})
    deltas += [{"tool_calls": [{"index": index, **call}]} for index, call in enumerate(_calls(answer))]
    for number, delta in enumerate([*deltas, {}]):
        is_last = number == len(deltas)
        choice = {"index": 0, "delta": delta, "finish_reason": answer.finish_reason if is_last else None}
        if answer.token_texts and number == 0:
            choice["logprobs"] = _chat_logprobs(answer)
        yield event(head | {"choices": [choice]})
    if usage:
        yield event(head | {"choices": [], "usage": _usage(answer)})
    yield DONE


def text_events(answer: Answer, model: str, usage: bool) -> Iterator[bytes]:
    """Yield a text completion as a stream."""
    whole = text_answer(answer, model)
    told = whole.pop("usage")
    yield event(whole)
    if usage:
        yield event(whole | {"choices": [], "usage": told})
    yield DONE


def event(content: dict[str, Any]) -> bytes:
    """Return one event of a stream."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def error_body(message: str, code: str, status: int) -> dict[str, Any]:
    """Return the body of an error, of which clients of OpenAI make an exception."""
    kind = "authentication_error" if status == 401 else "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _head(answer: Answer, model: str, kind: str, prefix: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{answer.id}", "object": kind, "created": int(time.time()), "model": model}


def _usage(answer: Answer) -> dict[str, int]:
    read, written = len(answer.turn.context_ids), len(answer.turn.output_ids)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "id": call_id(answer.id, index),
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for index, call in enumerate(answer.said.calls)
    ]


def _chat_logprobs(answer: Answer) -> dict[str, Any] | None:
    if not answer.token_texts:
        return None
    content = [
        {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace")), "top_logprobs": []}
        for text, logprob in zip(answer.token_texts, answer.turn.logprobs.tolist(), strict=True)
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(answer: Answer) -> dict[str, Any] | None:
    if not answer.token_texts:
        return None
    offsets = [0]
    for text in answer.token_texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": list(answer.token_texts),
        "token_logprobs": answer.turn.logprobs.tolist(),
        "top_logprobs": None,
        "text_offset": offsets[:-1],
    }
