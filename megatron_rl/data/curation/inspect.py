"""Processes one row on its own: mapping, rules, benchmarks, and the hashes by which rows are compared later."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasketch import MinHash

from megatron_rl.data.curation.config import CurationConfig, Layout
from megatron_rl.data.curation.contamination import Index
from megatron_rl.data.curation.mapping import Unusable, to_chat, to_prompt
from megatron_rl.data.curation.rules import CHAT_RULES, RULES
from megatron_rl.data.curation.sources import Piece, parsed
from megatron_rl.data.curation.text import digest, numbers_digest, shingles, short_digest, token_hashes, tokens
from megatron_rl.data.messages import Message, messages_of
from megatron_rl.data.prompts import Prompt
from megatron_rl.parsing import parse_json

# prompt: digest of what exact duplicates have in common, as two halves. near: whether it is compared by bands.
# text, identity: of the prompt as it stands and of the id. size: bytes of its line.
ROW = np.dtype(
    [("prompt", "<u8", 2), ("answer", "<u8"), ("text", "<u8"), ("identity", "<u8"), ("size", "<u4"), ("line", "<u4"),
     ("file", "<u4"), ("source", "<u2"), ("near", "?")]
)  # fmt: skip


CHAT = "(conversation)"  # the domain of conversations, within curation


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Holds a dropped row and why it was dropped. row: the record, or the raw row where there is none. details: of the
    reason."""

    reason: str
    file: str
    line: int
    details: Mapping[str, Any]
    row: Any

    def as_line(self) -> str:
        found = {"reason": self.reason, "file": self.file, "line": self.line, **self.details, "row": self.row}
        return json.dumps(found, default=str) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """Holds what is left of a piece. lines: JSON of the records, one after the other; rows: ROW [number of records];
    bands: uint64 [number of records, bands]."""

    lines: bytes
    rows: np.ndarray
    bands: np.ndarray
    dropped: list[Dropped]


class Inspector:
    """Inspects pieces of rows. It is made once per process; `inspect` keeps no state."""

    def __init__(self, config: CurationConfig, index: Index | None) -> None:
        self._sources = [(source, source.layout()) for source in config.source]
        self._rules = frozenset(config.rules)
        self._settings = config.duplicates
        self._index = index
        self._permutations = MinHash(config.duplicates.bands * config.duplicates.band_rows, seed=1).permutations

    def inspect(self, source: int, file: int, piece: Piece) -> Inspected:
        """Inspect the rows of a piece. source, file: what the rows are numbered with."""
        lines: list[bytes] = []
        dropped: list[Dropped] = []
        rows = np.zeros(len(piece.rows), ROW)
        bands = np.zeros((len(piece.rows), self._settings.bands), np.uint64)
        for line, raw in zip(piece.lines, piece.rows, strict=True):
            found = self._one(source, raw, rows[len(lines)], bands[len(lines)])
            if isinstance(found, bytes):
                rows[len(lines)]["line"] = line
                lines.append(found)
            else:
                reason, details, row = found
                dropped.append(Dropped(reason=reason, file=piece.file, line=line, details=details, row=row))
        rows, bands = rows[: len(lines)], bands[: len(lines)]
        rows["source"], rows["file"] = source, file
        return Inspected(lines=b"".join(lines), rows=rows, bands=bands.copy(), dropped=dropped)

    def _one(
        self, number: int, raw: Any, row: np.void, bands: np.ndarray
    ) -> bytes | tuple[str, Mapping[str, Any], object]:
        """Return the record's line, with `row` and `bands` filled in; or reason, details and row of a dropped one."""
        source, layout = self._sources[number]
        try:
            value = parsed(raw)
        except (ValueError, RecursionError) as error:
            text = raw.decode(errors="backslashreplace")
            return "malformed", {"details": f"not valid UTF-8 JSON: {error}"}, text
        try:
            record = record_from(value, layout, source.name)
        except Unusable as unusable:
            return unusable.reason, {"details": unusable.detail}, value
        defect = defect_of(record, layout, self._rules.difference(source.skip_rules))
        if defect:
            return defect[0], {"details": defect[1]}, as_row(record)
        words = tokens(record.prompt)
        hashes = token_hashes(words)
        contamination = self._index and self._index.find(words, hashes)
        if contamination:
            return "contamination", contamination, as_row(record)
        line = (json.dumps(as_row(record), ensure_ascii=False) + "\n").encode()
        row["size"] = len(line)
        self._hash(record, words, hashes, row, bands)
        return line

    def _hash(self, record: Prompt, words: list[str], hashes: np.ndarray, row: np.void, bands: np.ndarray) -> None:
        is_chat = record.domain == CHAT
        verbatim = is_chat or record.domain in self._settings.verbatim_domains
        same = record.prompt.strip() if verbatim or not words else " ".join(words)
        if is_chat:  # another response to the same question is another row
            same = record.answer
        row["prompt"] = np.frombuffer(digest(same), np.uint64)
        row["answer"] = 0 if is_chat else short_digest(record.answer.strip())
        row["text"] = short_digest(record.prompt)
        row["identity"] = short_digest(record.id)
        if self._settings.near and not verbatim and words:
            row["near"] = True
            numbers = numbers_digest(words) if self._settings.same_numbers else 0
            bands[:] = self._bands(shingles(hashes, self._settings.shingle_tokens), numbers)

    def _bands(self, runs: np.ndarray, numbers: int) -> np.ndarray:
        """Return one hash for each band of the MinHash signature. Rows with other numbers share none."""
        signature = MinHash(
            len(self._permutations[0]), hashfunc=int, permutations=self._permutations, scheme="affine32"
        )
        signature.update_batch((runs >> np.uint64(32)).tolist())
        values = signature.hashvalues.astype(np.uint64).reshape(self._settings.bands, self._settings.band_rows)
        mixed = np.full(self._settings.bands, numbers, np.uint64)
        for column in values.T:
            mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        return mixed


def record_from(row: object, layout: Layout, source: str) -> Prompt:
    """Return the record of a row; raises Unusable. A conversation is one of the domain CHAT: its prompt is what the
    user says in it, its answer JSON of the messages."""
    if not layout.is_chat:
        return to_prompt(row, layout, source)
    chat = to_chat(row, layout)
    return _as_record(chat.id, chat.messages, chat.meta)


def defect_of(record: Prompt, layout: Layout, rules: Collection[str]) -> tuple[str, str] | None:
    """Return the first rule that finds something, and what. What a layout makes on purpose is no defect."""
    for name, rule in RULES.items():
        if (
            name not in rules
            or (layout.is_chat and name not in CHAT_RULES)
            or (layout.options and name == "multiple_choice")
        ):
            continue
        found = rule(record)
        if found:
            return name, found
    return None


def as_row(record: Prompt) -> dict[str, Any]:
    """Return the record as a row by the contract of data/prompts.py."""
    meta = {"meta": record.meta} if record.meta else {}
    if record.domain == CHAT:
        return {"id": record.id, "messages": parse_json(record.answer), **meta}
    row = {"id": record.id, "domain": record.domain, "prompt": record.prompt, "answer": record.answer}
    return row | {"source": record.source} | meta


def from_row(row: Mapping[str, Any]) -> Prompt:
    """Return the record of what `as_row` made."""
    if "messages" in row:
        return _as_record(row["id"], messages_of(row["messages"]), row.get("meta", {}))
    return Prompt(**row)


def _as_record(identity: str, messages: Sequence[Message], meta: Mapping[str, Any]) -> Prompt:
    said = "\n".join(message.content for message in messages if message.role == "user")
    plain = [{"role": message.role, "content": message.content} for message in messages]
    return Prompt(id=identity, domain=CHAT, prompt=said, answer=json.dumps(plain, ensure_ascii=False), meta=meta)
