"""The JSONL row contracts.

A prompt row:  {"prompt": str, "answer": str, optional "domain": str, "id": str, "source": str, "meta": {...}}
A chat row:    {"messages": [{"role": "system" | "user" | "assistant", "content": str}, ...], optional "id", "meta"}

A number is taken for its text. Columns with other names go into "meta".
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_rl.data.curation.test_layouts import looks_like_tests
from megatron_rl.data.rows import Problems, likely_column, rows_of
from megatron_rl.parsing import shown

ROLES = ("system", "user", "assistant")
DEFAULT_DOMAIN = "math"
_PROMPT_FIELDS = ("domain", "prompt", "answer", "id", "source", "meta")
_CHAT_FIELDS = ("messages", "id", "meta")
_LONGEST_COLUMNS = 300  # characters of a list of columns

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One verifiable question. `id` is unique in its file; without one in the row it is a hash of the content.
    where: file:line, for messages."""

    id: str
    domain: str
    prompt: str
    answer: str
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What the model is given."""
        return [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """One conversation to imitate; its assistant messages are the targets. where: file:line, for messages."""

    id: str
    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


Record = TypeVar("Record", bound=Prompt | Chat)


class Wrong(ValueError):
    """A field of a row cannot be used. The message names it, its value and the remedy."""


def prompt_id(domain: str, prompt: str, answer: str) -> str:
    """16 hexadecimal digits that depend on the content only, so they survive reordering the file."""
    return _digest([domain, prompt, answer])


def read_prompts(
    path: str | Path,
    domain: str = DEFAULT_DOMAIN,
    suffix: str = "",
    problems: Problems | None = None,
    most: int | None = None,
    remarks: bool = True,
) -> list[Prompt]:
    """Read the rows of a prompt file. ValueError tells of everything that is wrong with its first wrong rows, with
    file, line, field and value; where `problems` are given, they are noted there.

    domain: of rows that name none. suffix: goes behind every prompt; an id that is made from the content does not
    depend on it. most: rows to read; default: all. remarks: log what was taken for granted, where all are read.
    """
    reader = _Reader(path, problems, _PROMPT_FIELDS, remarks and most is None)
    without_domain: Counter[str] = Counter()
    prompts = []
    for line, row in rows_of(path, reader.problems, most):
        row_domain = row.get("domain")
        if row_domain is None:
            row = {**row, "domain": "code" if looks_like_tests(_plain_answer(row)) else domain}
            without_domain[row["domain"]] += 1
        taken = [reader.text(row, name, line) for name in ("domain", "prompt", "answer")]
        optional = [reader.optional(row, name, line) for name in ("id", "source")]
        meta = reader.meta(row, line)
        if None in taken or None in optional or meta is None:
            continue
        (its_domain, prompt, answer), (identity, source) = map(str, taken), map(str, optional)
        identity = identity or prompt_id(its_domain, prompt, answer)
        if reader.claims_id(identity, line):
            text = prompt + suffix
            prompts.append(
                Prompt(id=identity, domain=its_domain, prompt=text, answer=answer, source=source, meta=meta,
                       where=f"{path}:{line}")
            )  # fmt: skip
    return reader.done(
        prompts, [f"{count:,} rows name no domain and are taken as {name!r}" for name, count in without_domain.items()]
    )


def read_chats(path: str | Path, problems: Problems | None = None, most: int | None = None) -> list[Chat]:
    """Read the rows of a chat file, as `read_prompts` does."""
    reader = _Reader(path, problems, _CHAT_FIELDS, most is None)
    chats = []
    for line, row in rows_of(path, reader.problems, most):
        messages, meta = reader.messages(row, line), reader.meta(row, line)
        identity = reader.optional(row, "id", line)
        if messages is None or meta is None or identity is None:
            continue
        identity = identity or _digest([part for message in messages for part in (message.role, message.content)])
        if reader.claims_id(identity, line):
            chats.append(Chat(id=identity, messages=messages, meta=meta, where=f"{path}:{line}"))
    return reader.done(chats, [])


class _Reader:
    """The fields of one file's rows. What is wrong is noted, and its value is None."""

    def __init__(self, path: str | Path, problems: Problems | None, fields: Sequence[str], remarks: bool) -> None:
        """remarks: whether what was taken for granted is logged."""
        self._path, self._fields, self._tells, self._remarks = path, fields, problems is None, remarks
        self.problems = Problems() if problems is None else problems
        self._first_line: dict[str, int] = {}
        self._others: dict[str, None] = {}  # columns that go into meta, in their order

    def text(self, row: Mapping[str, Any], name: str, line: int) -> str | None:
        try:
            return text_of(row, name)
        except Wrong as wrong:
            near = None if name in row else likely_column(name, [c for c in row if c not in self._fields])
            hint = f"; its column {near!r} may be it" if near else ""
            self._note(line, name, f"{wrong}{hint}", unmapped=name not in row or isinstance(row[name], list | dict))
            return None

    def optional(self, row: Mapping[str, Any], name: str, line: int) -> str | None:
        """ "" where the row has none."""
        return "" if row.get(name) in (None, "") else self.text(row, name, line)

    def messages(self, row: Mapping[str, Any], line: int) -> tuple[Message, ...] | None:
        try:
            return messages_of(row.get("messages"))
        except Wrong as wrong:
            near = None if "messages" in row else likely_column("messages", list(row))
            hint = f"; its column {near!r} may be it" if near else ""
            self._note(line, "messages", f"{wrong}{hint}", unmapped="messages" not in row)
            return None

    def meta(self, row: Mapping[str, Any], line: int) -> Mapping[str, Any] | None:
        """Join a row's meta and its other columns; a key of `meta` goes before a column of that name."""
        meta = row.get("meta", {})
        if not isinstance(meta, dict):
            self._note(line, "meta", f"field 'meta' must be an object, got {shown(meta)}; write {{}} or leave it out")
            return None
        others = {name: value for name, value in row.items() if name not in self._fields}
        self._others.update(dict.fromkeys(others))
        return others | meta if others else meta

    def claims_id(self, identity: str, line: int) -> bool:
        first = self._first_line.setdefault(identity, line)
        if first != line:
            self._note(
                line,
                "id",
                f"field 'id' must be unique in its file, got {identity!r} as in line {first} (without an id it is a "
                "hash of the content); drop the duplicate or give it another id",
            )
        return first == line

    def done(self, records: list[Record], remarks: list[str]) -> list[Record]:
        """The records; remarks on what was taken for granted are made once, when the whole file is read."""
        if self._tells:
            self.problems.tell()
        if self._others:
            columns = ", ".join(map(str, self._others))[:_LONGEST_COLUMNS]
            remarks = [*remarks, f"columns {columns} are no fields of ours and go into meta"]
        for remark in remarks if self._remarks else []:
            log.info("%s: %s", self._path, remark)
        return records

    def _note(self, line: int, fault: str, text: str, unmapped: bool = False) -> None:
        self.problems.add(self._path, line, fault, f"{self._path}:{line}: {text}", unmapped)


def text_of(row: Mapping[str, Any], name: str) -> str:
    """The text of a field; raises Wrong. A number is taken for its text, and of an answer a list of texts for JSON of
    answers that are all right, and an object for JSON of tests."""
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    elif name == "answer" and (isinstance(value, dict) or is_list_of_texts(value)):
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str) or not value.strip():
        got = shown(value) if name in row else "no such field"
        remedy = "write it in quotes" if isinstance(value, bool | float) else "fill it in or drop the row"
        raise Wrong(f"field {name!r} must be a non-empty string, got {got}; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Wrong(f"field {name!r} holds half of a surrogate pair, got {shown(value)}; repair its escapes") from None
    return value


def is_list_of_texts(value: object) -> bool:
    """Tell whether this is a list of texts, none of them empty: answers that are all right."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item.strip() for item in value)


def _plain_answer(row: Mapping[str, Any]) -> str:
    try:
        return text_of(row, "answer")
    except Wrong:
        return ""


def messages_of(value: object) -> tuple[Message, ...]:
    """The messages of a conversation; raises Wrong."""
    if not isinstance(value, list) or not value:
        raise Wrong(
            f"field 'messages' must be a non-empty list, got {shown(value)}; "
            'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        )
    messages = []
    for index, item in enumerate(value):
        name = f"messages[{index}]"
        if not isinstance(item, dict) or set(item) != {"role", "content"}:
            raise Wrong(
                f"field {name!r} must be an object of 'role' and 'content', got {shown(item)}; leave out other keys"
            )
        if item["role"] not in ROLES:
            raise Wrong(
                f"field '{name}.role' must be one of {', '.join(ROLES)}, got {shown(item['role'])}; rename the role"
            )
        try:
            messages.append(Message(role=item["role"], content=text_of(item, "content")))
        except Wrong as wrong:
            raise Wrong(f"{name}: {wrong}") from None
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
    return tuple(messages)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
