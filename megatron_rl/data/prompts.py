"""Defines and reads the JSONL row contracts.

A prompt row:  {"prompt": str or messages, "answer": str, optional "domain", "id", "source", "tools", "meta": {...}}
A chat row:    {"messages": [...], optional "id", "tools", "meta": {...}}

`messages.py` says what messages are; tools is a list of objects. A number is taken for its text. Columns with other
names go into "meta".
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_rl.data.curation.test_layouts import looks_like_tests
from megatron_rl.data.messages import (
    Conversation,
    Wrong,
    messages_of,
    of_text,
    prompt_of,
    text_of,
    tools_of,
    with_suffix,
    with_system,
)
from megatron_rl.data.messages import Message as Message
from megatron_rl.data.rows import Problems, likely_column, rows_of
from megatron_rl.parsing import shown

DEFAULT_DOMAIN = "math"
_PROMPT_FIELDS = ("domain", "prompt", "answer", "id", "source", "tools", "meta")
_CHAT_FIELDS = ("messages", "id", "tools", "meta")
_LONGEST_COLUMNS = 300  # characters of a list of columns

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Holds one verifiable question. `id` is unique in its file; without one in the row it is a hash of the content.
    prompt: the last message. asked: the whole conversation, where it is more than that. where: file:line, for messages.
    """

    id: str
    domain: str
    prompt: str
    answer: str
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    asked: Conversation | None = None
    where: str = field(default="", compare=False)

    @property
    def conversation(self) -> Conversation:
        """Return the conversation that the model is given."""
        return self.asked or of_text(self.prompt)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Return the conversation as plain data."""
        return [message.as_dict() for message in self.conversation.messages]

    @property
    def text(self) -> str:
        """Return all that is said in it."""
        return "\n".join(message.content for message in self.conversation.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Holds one conversation to imitate; its assistant messages are the targets. where: file:line, for messages."""

    id: str
    messages: tuple[Message, ...]
    tools: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


Record = TypeVar("Record", bound=Prompt | Chat)


def prompt_id(domain: str, prompt: str, answer: str) -> str:
    """Return 16 hexadecimal digits that depend on the content only, so they survive reordering the file."""
    return _digest([domain, prompt, answer])


def read_prompts(
    path: str | Path,
    domain: str = DEFAULT_DOMAIN,
    suffix: str = "",
    problems: Problems | None = None,
    most: int | None = None,
    remarks: bool = True,
    system: str = "",
    needs_answer: bool = True,
) -> list[Prompt]:
    """Read the rows of a prompt file. ValueError tells of everything that is wrong with its first wrong rows, with
    file, line, field and value; where `problems` are given, they are noted there.

    domain: of rows that name none. suffix: goes after every prompt, system: before those without a system message; an
    id that is made from the content does not depend on them. most: rows to read; default: all. remarks: log what was
    taken for granted, where all are read. needs_answer: else rows may have none, which is "".
    """
    reader = _Reader(path, problems, _PROMPT_FIELDS, remarks and most is None)
    without_domain: Counter[str] = Counter()
    prompts = []
    for line, row in rows_of(path, reader.problems, most):
        of_row = row
        if row.get("domain") is None:
            of_row = {"domain": "code" if looks_like_tests(_plain_answer(row)) else domain}
            without_domain[of_row["domain"]] += 1
        answer_of = reader.text if needs_answer else reader.optional
        taken = [reader.text(of_row, "domain", line), answer_of(row, "answer", line)]
        optional = [reader.optional(row, name, line) for name in ("id", "source")]
        asks, meta = reader.prompt(row, line), reader.meta(row, line)
        if asks is None or None in taken or None in optional or meta is None:
            continue
        (its_domain, answer), (identity, source) = map(str, taken), map(str, optional)
        said = asks.messages[0].content if asks.is_plain else json.dumps(asks.parts())
        identity = identity or prompt_id(its_domain, said, answer)
        if reader.claims_id(identity, line):
            messages = with_system(with_suffix(asks.messages, suffix), system)
            whole = Conversation(messages=messages, tools=asks.tools)
            prompts.append(
                Prompt(id=identity, domain=its_domain, prompt=messages[-1].content, answer=answer, source=source,
                       meta=meta, asked=None if whole.is_plain else whole, where=f"{path}:{line}")
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
        identity, tools = reader.optional(row, "id", line), reader.tools(row, line)
        if messages is None or meta is None or identity is None or tools is None:
            continue
        more = [one.more for one in messages if one.more] + ([tools] if tools else [])
        identity = identity or _digest([part for one in messages for part in (one.role, one.content)] + more)
        if reader.claims_id(identity, line):
            chats.append(Chat(id=identity, messages=messages, tools=tools, meta=meta, where=f"{path}:{line}"))
    return reader.done(chats, [])


class _Reader:
    """Reads the fields of one file's rows. What is wrong is noted, and its value is None."""

    def __init__(self, path: str | Path, problems: Problems | None, fields: Sequence[str], remarks: bool) -> None:
        """Prepare to read the rows of a file. remarks: whether what was taken for granted is logged."""
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
        """Read a text that a row may lack; "" where the row has none."""
        return "" if row.get(name) in (None, "") else self.text(row, name, line)

    def prompt(self, row: Mapping[str, Any], line: int) -> Conversation | None:
        """Read a text or messages, and the tools that go with them."""
        tools = self.tools(row, line)
        if not isinstance(row.get("prompt"), list):
            text = self.text(row, "prompt", line)
            messages = None if text is None else of_text(text).messages
        else:
            try:
                messages = prompt_of(row["prompt"])
            except Wrong as wrong:
                self._note(line, "prompt", str(wrong), unmapped=True)
                messages = None
        return None if messages is None or tools is None else Conversation(messages=messages, tools=tools)

    def tools(self, row: Mapping[str, Any], line: int) -> str | None:
        """Read the tools of a row; "" where the row has none."""
        try:
            return tools_of(row.get("tools"))
        except Wrong as wrong:
            self._note(line, "tools", str(wrong))
            return None

    def messages(self, row: Mapping[str, Any], line: int) -> tuple[Message, ...] | None:
        try:
            return messages_of(row.get("messages"))
        except Wrong as wrong:
            near = None if "messages" in row else likely_column("messages", list(row))
            hint = f"; its column {near!r} may be it" if near else ""
            if "messages" not in row and not near and likely_column("prompt", list(row)):
                hint = "; of a question and a response, a mapping with the key `response` makes these (docs/sft.md)"
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
        """Return the records; remarks on what was taken for granted are made once, when the whole file is read."""
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


def _plain_answer(row: Mapping[str, Any]) -> str:
    try:
        return text_of(row, "answer")
    except Wrong:
        return ""


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
