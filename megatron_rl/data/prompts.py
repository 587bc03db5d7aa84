"""The JSONL row contracts.

A prompt row:  {"domain": str, "prompt": str, "answer": str, optional "id": str, "source": str, "meta": {...}}
A chat row:    {"messages": [{"role": "system" | "user" | "assistant", "content": str}, ...], optional "id", "meta"}
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.parsing import bounded_lines, parse_json, shown

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One verifiable question. `id` is unique in its file; without one in the row it is a hash of the content."""

    id: str
    domain: str
    prompt: str
    answer: str
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """One conversation to imitate; its assistant messages are the targets."""

    id: str
    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


def prompt_id(domain: str, prompt: str, answer: str) -> str:
    """16 hexadecimal digits that depend on the content only, so they survive reordering the file."""
    return _digest([domain, prompt, answer])


def read_prompts(path: str | Path) -> list[Prompt]:
    """All rows of a prompt file; ValueError names file, line, field and value of the first bad row."""
    prompts = []
    first_line: dict[str, int] = {}
    for line, row in _rows(path, allowed=("domain", "prompt", "answer", "id", "source", "meta")):
        where = f"{path}:{line}"
        domain, prompt, answer = (_text(row, name, where) for name in ("domain", "prompt", "answer"))
        identity = _text(row, "id", where) if "id" in row else prompt_id(domain, prompt, answer)
        source = _text(row, "source", where) if "source" in row else ""
        meta = _meta(row, where)
        _claim_id(first_line, identity, line, where)
        prompts.append(Prompt(id=identity, domain=domain, prompt=prompt, answer=answer, source=source, meta=meta))
    return _not_empty(prompts, path)


def read_chats(path: str | Path) -> list[Chat]:
    """All rows of a chat file; ValueError names file, line, field and value of the first bad row."""
    chats = []
    first_line: dict[str, int] = {}
    for line, row in _rows(path, allowed=("messages", "id", "meta")):
        where = f"{path}:{line}"
        messages = _messages(row, where)
        content = [part for message in messages for part in (message.role, message.content)]
        identity = _text(row, "id", where) if "id" in row else _digest(content)
        meta = _meta(row, where)
        _claim_id(first_line, identity, line, where)
        chats.append(Chat(id=identity, messages=messages, meta=meta))
    return _not_empty(chats, path)


def _rows(path: str | Path, allowed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank."""
    if not Path(path).is_file():
        raise ValueError(f"data file {path} does not exist")
    with Path(path).open("rb") as file:
        for line, raw in enumerate(bounded_lines(file, path), start=1):
            if not raw.strip():
                continue
            try:
                row = parse_json(raw)
            except ValueError as error:
                raise ValueError(f"{path}:{line}: not valid UTF-8 JSON ({error}); write one object per line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{line}: must be a JSON object, got {shown(row)}; write one object per line")
            for name in row:
                if name not in allowed:
                    raise ValueError(
                        f"{path}:{line}: unknown field {name!r} = {shown(row[name])}; "
                        f"the fields are {', '.join(allowed)}; put anything else into 'meta'"
                    )
            yield line, row


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        got = shown(value) if name in row else "no such field"
        raise ValueError(f"{where}: field {name!r} must be a non-empty string, got {got}; fill it in or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: field {name!r} holds half of a surrogate pair, got {shown(value)}; repair its escapes"
        ) from None
    return value


def _meta(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise ValueError(f"{where}: field 'meta' must be an object, got {shown(meta)}; write {{}} or leave it out")
    return meta


def _messages(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    value = row.get("messages")
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}: field 'messages' must be a non-empty list, got {shown(value)}; "
            'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        )
    messages = []
    for index, item in enumerate(value):
        name = f"messages[{index}]"
        if not isinstance(item, dict) or set(item) != {"role", "content"}:
            raise ValueError(
                f"{where}: field {name!r} must be an object of 'role' and 'content', got {shown(item)}; "
                "leave out other keys"
            )
        if item["role"] not in ROLES:
            raise ValueError(
                f"{where}: field '{name}.role' must be one of {', '.join(ROLES)}, got {shown(item['role'])}; "
                "rename the role"
            )
        messages.append(Message(role=item["role"], content=_text(item, "content", f"{where}: {name}")))
    if messages[-1].role != "assistant":
        raise ValueError(
            f"{where}: field 'messages' must end with an assistant message, got role {messages[-1].role!r} last; "
            "drop what follows the last answer"
        )
    if messages[0].role == "assistant":
        raise ValueError(
            f"{where}: field 'messages' must not begin with an assistant message, got role 'assistant' first; "
            "put the question before it"
        )
    return tuple(messages)


def _claim_id(first_line: dict[str, int], identity: str, line: int, where: str) -> None:
    if identity in first_line:
        raise ValueError(
            f"{where}: field 'id' must be unique in its file, got {identity!r} as in line {first_line[identity]} "
            "(without an id it is a hash of the content); drop the duplicate or give it another id"
        )
    first_line[identity] = line


def _not_empty(records: list[Any], path: str | Path) -> list[Any]:
    if not records:
        raise ValueError(f"{path} holds no rows; write one JSON object per line")
    return records


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
