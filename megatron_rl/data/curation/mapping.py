"""Maps one row of any layout to a Prompt, the record that everything after this works on, or to a Chat."""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_rl.data.curation.config import Layout
from megatron_rl.data.curation.test_layouts import TEST_LAYOUTS, recognised_tests
from megatron_rl.data.messages import Wrong, is_list_of_texts, messages_of
from megatron_rl.data.prompts import Chat, Prompt, prompt_id
from megatron_rl.reward.answers import boxed_answer, stated_answer
from megatron_rl.reward.code_tests import problem_of_tests

_ABSENT = object()
_ROLES = {
    "human": "user",
    "User": "user",
    "prompter": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "bard", "bing", "Assistant"), "assistant"),
}
_NO_ANSWER = re.compile(
    r"[\s$.]*|[?-]+|n/a|null|nan|tbd|proof|not found|no answer|see (?:the )?(?:solution|explanation)\.?", re.IGNORECASE
)


class Unusable(Exception):
    """Says that a row can be no record. reason: a key of the report; detail: for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def to_prompt(row: object, layout: Layout, source: str) -> Prompt:
    """Return the record of a row; raises Unusable. What it lets through keeps the contract of data/prompts.py."""
    prompt = prompt_of(row, layout)
    is_tests = bool(layout.tests)
    if layout.options:
        prompt, answer = _shuffled_options(row, layout, prompt)
    elif layout.tests:
        answer = _tests(row, layout)
    else:
        answer, is_tests = _answer(row, layout)
    domain = _domain(row, layout, is_tests and not layout.tests)
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
    _check_encodable(record.id, domain, prompt, answer, record.source, json.dumps(record.meta, ensure_ascii=False))
    return record


def has_column(row: object, column: str) -> bool:
    """Tell whether a row has a column. column: a dotted path."""
    return _find(row, column) is not _ABSENT


def left_out(columns: Iterable[str], layout: Layout) -> list[str]:
    """List the columns of a source that a layout does not take, in their order. Layouts of tests, and conversations
    without `meta`, take what they find."""
    if layout.tests or (layout.is_chat and not layout.meta):
        return []
    return [name for name in columns if name not in layout.columns]


def to_chat(row: object, layout: Layout) -> Chat:
    """Return the conversation of a row for supervised fine-tuning; raises Unusable. Columns that are no part of it go
    into `meta`, or those of layout.meta where it names some."""
    if not isinstance(row, Mapping):
        raise Unusable("malformed", f"a row must be an object, got {_shown(row)}")
    taken = (layout.prompt, layout.append, layout.response) if layout.response else (layout.chat,)
    if layout.response:
        asked, answer = prompt_of(row, layout), _text(row, layout.response)
        given: Any = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    else:
        given = _look_up(row, layout.chat)
    if not isinstance(given, list):
        raise Unusable("malformed", f"column {layout.chat!r} must be a list of messages, got {_shown(given)}")
    try:
        messages = messages_of([_message(item) for item in given])
    except Wrong as wrong:
        raise Unusable("unusable_conversation", str(wrong)) from None
    text = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    others = [name for name in row if name not in {layout.id_column, *(part.partition(".")[0] for part in taken)}]
    meta = _meta(row, layout.meta or others)
    name = _optional(row, layout.id_column)
    _check_encodable(name, text, json.dumps(meta, ensure_ascii=False))
    return Chat(id=name or hashlib.sha256(text.encode()).hexdigest()[:16], messages=messages, meta=meta)


def _message(item: object) -> object:
    """Return {role, content} of a message that calls them so, or from and value; `messages_of` refuses what this
    leaves."""
    if not isinstance(item, Mapping):
        return item
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    return {"role": _ROLES.get(str(role), role), "content": content}


def _domain(row: Any, layout: Layout, found_tests: bool) -> str:
    """Return the domain of a row. found_tests: where an answer was expected. Such a row is one of code, unless its own
    domain is another one than mathematics or science: of these two no answer can be tests."""
    own = _optional(row, layout.domain_column) if layout.domain else _text(row, layout.domain_column)
    own = layout.domains.get(own, own)
    domain = own or layout.domain
    if not domain.strip():
        raise Unusable("malformed", f"column {layout.domain_column!r}, the domain, is empty")
    return "code" if found_tests and (not own or own in ("math", "stem")) else domain


def _shuffled_options(row: Any, layout: Layout, prompt: str) -> tuple[str, str]:
    """Return the prompt with its options below it, and the letter of the right one. The order is a function of the seed
    and the question."""
    options = [_text(row, column).strip() for column in layout.options]
    if not all(options):
        raise Unusable("missing_answer", f"column {layout.options[options.index('')]!r}, an option, is empty")
    if options[0] in options[1:]:
        raise Unusable("malformed", f"two options are the right one, {_shown(options[0])}")
    order = list(range(len(options)))
    random.Random(f"options {layout.options_seed} {prompt}").shuffle(order)
    lines = [f"({letter}) {options[place]}" for letter, place in zip("ABCDEFGHIJ", order, strict=False)]
    return "\n".join([f"{prompt.rstrip()}\n", *lines]), "ABCDEFGHIJ"[order.index(0)]


def prompt_of(row: object, layout: Layout) -> str:
    """Return the question of a row; raises Unusable."""
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
    """Return the value at a dotted path: keys of objects, positions in lists (-1 is the last). Raises Unusable."""
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
    """Return a text, or a number as text; "" for null. A list of one item counts as that item."""
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


def _answer(row: Any, layout: Layout) -> tuple[str, bool]:
    """Return the answer, and whether the column holds tests of a program instead."""
    value = _look_up(row, layout.answer)
    try:
        tests = recognised_tests(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unusable("unreadable_tests", f"column {layout.answer!r}: {type(error).__name__}: {error}") from None
    if tests is not None:
        return json.dumps(tests, ensure_ascii=False), True
    if is_list_of_texts(value) and len(value) > 1:
        return json.dumps(value, ensure_ascii=False), False  # answers that are all right
    text: str | None = _text(row, layout.answer)
    if layout.answer_pattern is not None:
        *_, text = [None, *re.findall(layout.answer_pattern, text or "")]
    if text and layout.answer_from == "boxed":
        text = boxed_answer(text)
    elif text and layout.answer_from == "stated":
        text = stated_answer(text)
    if text is None or _NO_ANSWER.fullmatch(text.strip()):
        raise Unusable("missing_answer", f"column {layout.answer!r} gives {_shown(_text(row, layout.answer))}")
    return text, False


def _tests(row: Any, layout: Layout) -> str:
    value = _look_up(row, layout.tests_column) if layout.tests_column else None
    if layout.tests_column and not value:
        raise Unusable("missing_answer", f"column {layout.tests_column!r} has no tests")
    try:
        return json.dumps(TEST_LAYOUTS[layout.tests](row, value), ensure_ascii=False)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unusable("unreadable_tests", f"not the layout {layout.tests}: {type(error).__name__}: {error}") from None


def _meta(row: Any, columns: Sequence[str]) -> dict[str, Any]:
    """Return these columns for `meta`. What JSON cannot hold (dates, bytes) becomes text."""
    meta: dict[str, Any] = {}
    for column in columns:
        value = _find(row, column)
        if isinstance(value, Mapping):
            meta |= value
        elif value is not _ABSENT:
            meta[column.rpartition(".")[2]] = value
    return json.loads(json.dumps(meta, default=str)) if meta else meta


def _check_encodable(*texts: str) -> None:
    try:
        "\0".join(texts).encode()
    except UnicodeEncodeError as error:
        raise Unusable("invalid_characters", f"half of a surrogate pair, {error.object[error.start]!r}") from None


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
