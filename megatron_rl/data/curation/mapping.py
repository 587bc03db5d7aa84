"""One row of any layout to a Prompt, the record that everything after this works on."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.data.curation.code_tests import TEST_LAYOUTS
from megatron_rl.data.curation.config import Layout
from megatron_rl.data.prompts import Prompt, prompt_id
from megatron_rl.reward.answers import boxed_answer, stated_answer
from megatron_rl.reward.code_tests import problem_of_tests

_ABSENT = object()
_NO_ANSWER = re.compile(
    r"[\s$.]*|[?-]+|n/a|null|nan|tbd|proof|not found|no answer|see (?:the )?(?:solution|explanation)\.?", re.IGNORECASE
)


class Unusable(Exception):
    """A row that can be no record. reason: a key of the report; detail: for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def to_prompt(row: object, layout: Layout, source: str) -> Prompt:
    """The record of a row; raises Unusable. What it lets through keeps the contract of data/prompts.py."""
    prompt = prompt_of(row, layout)
    answer = _tests(row, layout) if layout.tests else _answer(row, layout)
    domain = layout.domain or _text(row, layout.domain_column)
    if not domain.strip():
        raise Unusable("malformed", f"column {layout.domain_column!r}, the domain, is empty")
    if domain == "code" and (problem := problem_of_tests(answer)):
        raise Unusable("unreadable_tests", problem)
    name = _optional(row, layout.id_column)
    record = Prompt(
        id=name or prompt_id(domain, prompt, answer),
        domain=domain,
        prompt=prompt,
        answer=answer,
        source=_optional(row, layout.source_column) or source,
        meta=_meta(row, layout.meta),
    )
    _check_encodable(record)
    return record


def prompt_of(row: object, layout: Layout) -> str:
    """The question of a row; raises Unusable."""
    if not isinstance(row, Mapping):
        raise Unusable("malformed", f"a row must be an object, got {_shown(row)}")
    text = _text(row, layout.prompt)
    for pattern in layout.remove:
        text = re.sub(pattern, "", text)
    below = _optional(row, layout.append).rstrip()
    text = f"{text.rstrip()}\n\n{below}" if below else text
    if not text.strip():
        raise Unusable("missing_prompt", f"column {layout.prompt!r} is empty")
    return text


def _look_up(row: Any, column: str) -> Any:
    """The value at a dotted path: keys of objects, positions in lists (-1 is the last). Raises Unusable."""
    value = _find(row, column)
    if value is _ABSENT:
        known = ", ".join(map(str, row)) if isinstance(row, Mapping) else _shown(row)
        raise Unusable("malformed", f"no column {column!r}; the row has {known}")
    return value


def _find(row: Any, column: str) -> Any:
    value = row
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and re.fullmatch(r"-?\d+", part):
            if not -len(value) <= int(part) < len(value):
                return _ABSENT
            value = value[int(part)]
        else:
            return _ABSENT
    return value


def _text(row: Any, column: str) -> str:
    """Text, or a number as text; "" for null. A list of one is its item."""
    value = _look_up(row, column)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise Unusable("malformed", f"column {column!r} must be text or a number, got {_shown(value)}")


def _optional(row: Any, column: str) -> str:
    return _text(row, column) if column and _find(row, column) is not _ABSENT else ""


def _answer(row: Any, layout: Layout) -> str:
    text: str | None = _text(row, layout.answer)
    if layout.answer_pattern is not None:
        *_, text = [None, *re.findall(layout.answer_pattern, text or "")]
    if text and layout.answer_from == "boxed":
        text = boxed_answer(text)
    elif text and layout.answer_from == "stated":
        text = stated_answer(text)
    if text is None or _NO_ANSWER.fullmatch(text.strip()):
        raise Unusable("missing_answer", f"column {layout.answer!r} gives {_shown(_text(row, layout.answer))}")
    return text


def _tests(row: Any, layout: Layout) -> str:
    value = _look_up(row, layout.tests_column) if layout.tests_column else None
    if layout.tests_column and not value:
        raise Unusable("missing_answer", f"column {layout.tests_column!r} has no tests")
    try:
        return json.dumps(TEST_LAYOUTS[layout.tests](row, value), ensure_ascii=False)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unusable("unreadable_tests", f"not the layout {layout.tests}: {type(error).__name__}: {error}") from None


def _meta(row: Any, columns: Sequence[str]) -> dict[str, Any]:
    """What JSON cannot hold (dates, bytes) becomes text."""
    meta: dict[str, Any] = {}
    for column in columns:
        value = _find(row, column)
        if isinstance(value, Mapping):
            meta |= value
        elif value is not _ABSENT:
            meta[column.rpartition(".")[2]] = value
    return json.loads(json.dumps(meta, default=str)) if meta else meta


def _check_encodable(record: Prompt) -> None:
    meta = json.dumps(record.meta, ensure_ascii=False)
    try:
        "\0".join((record.id, record.domain, record.prompt, record.answer, record.source, meta)).encode()
    except UnicodeEncodeError as error:
        raise Unusable("invalid_characters", f"half of a surrogate pair, {error.object[error.start]!r}") from None


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
