"""Guesses the layout of a file, by its columns and by how many of its rows can be read so."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.data.curation.config import Layout
from megatron_rl.data.curation.inspect import record_from
from megatron_rl.data.curation.mapping import Unusable
from megatron_rl.data.curation.presets import PRESETS
from megatron_rl.data.curation.test_layouts import looks_like_tests
from megatron_rl.data.rows import likely_column

_META_CHARACTERS = 200  # columns with longer texts are solutions and the like
_ID_NAMES = ("id", "uid", "uuid", "question_id", "problem_id", "task_id", "mid", "ID")
_OPTION = "incorrect answer"

Rows = Sequence[Mapping[str, Any]]


def guess_layout(rows: Rows) -> dict[str, Any]:
    """Return the keys of a [[source]] by which the most rows can be read: a preset, of several the one that fits most
    of the columns; or columns by their names, where they read more. Empty where no row can be read.

    rows: the first ones of a file.
    """
    by_name = _columns(rows)
    # A conversation that ends with an answer is one to imitate, whatever other columns there are.
    presets = [name for name in PRESETS if "chat" not in by_name or "chat" in PRESETS[name]]
    if not any("input" in row for row in rows) and "alpaca" in presets:
        presets.remove("alpaca")  # an output alone may as well be an answer
    scored = [(_score(rows, layout_of({"preset": name})), -place, name) for place, name in enumerate(presets)]
    (num_read, _), _, preset = max(scored)
    if by_name and _score(rows, layout_of(by_name))[0] > num_read:
        return by_name
    return {"preset": preset} if num_read else {}


def layout_of(keys: Mapping[str, Any]) -> Layout:
    """Return the layout that keys of a [[source]] give."""
    given = {name: value for name, value in keys.items() if name != "preset"}
    return Layout.model_validate({**PRESETS.get(keys.get("preset", ""), {}), **given})


def _score(rows: Rows, layout: Layout) -> tuple[int, int]:
    """Return (rows that can be read, how well it fits). The fit counts columns that it names and that are there, less
    what it cuts out of prompts and is not there."""
    num_read, fits = 0, 0
    for row in rows:
        try:
            record = record_from(row, layout, "")
        except Unusable:
            continue
        num_read += 1
        if layout.remove:
            fits += 1 if record.prompt.strip() != _plain_prompt(row, layout) else -1
    columns = layout.columns & {name for row in rows for name in row}
    # Tests say more than an answer, an answer that stands alone more than one in a solution.
    says = 10 * bool(layout.tests or layout.answer_pattern) + (layout.answer_from == "text")
    return num_read, fits * 100 + len(columns) + says


def _plain_prompt(row: Mapping[str, Any], layout: Layout) -> str:
    return record_from(row, layout.model_copy(update={"remove": ()}), "").prompt.strip()


def _columns(rows: Rows) -> dict[str, Any]:
    """Return keys by the names of the columns, where the names say what is what; else an empty dict."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    first = {name: next((row[name] for row in rows if row.get(name) not in (None, "")), None) for name in names}
    chat = next((name for name in names if _is_chat(first[name])), "")
    if chat:
        return {"chat": chat, **({"id_column": found} if (found := _id_column(names)) else {})}
    tests = next((name for name in names if _holds_tests(first[name])), "")
    prompt = likely_column("prompt", [name for name in names if name != tests])
    answer = tests or likely_column("answer", [name for name in names if name != prompt])
    if prompt is None or answer is None:
        return {}
    keys: dict[str, Any] = {"prompt": f"{prompt}.-1.content" if _is_messages(first[prompt]) else prompt}
    keys |= {"tests": "any", "tests_column": tests} if tests else {"answer": answer}
    # Alpaca's rows say what to do in one column, and with what in the other.
    below = next((name for name in names if name.lower() == "input"), None) if prompt.lower() == "instruction" else None
    if below is not None and below != answer:
        keys["append"] = below
    keys["domain"] = "code" if tests else "math"
    if "domain" in names:
        keys["domain_column"] = "domain"
    if found := _id_column(names):
        keys["id_column"] = found
    taken = {prompt, answer, below, "domain", keys.get("id_column")}
    meta = [name for name in names if name not in taken and _is_small(first[name])]
    return keys | ({"meta": meta} if meta else {})


def _id_column(names: Sequence[str]) -> str | None:
    return next((name for name in _ID_NAMES if name in names), None)


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _is_chat(value: object) -> bool:
    """Tell whether this is a conversation that ends with an answer."""
    if not isinstance(value, list) or not _is_messages(value):
        return False
    return str(value[-1].get("role", value[-1].get("from"))).lower() in ("assistant", "gpt", "chatgpt", "model", "bot")


def _holds_tests(value: object) -> bool:
    return isinstance(value, str | list | Mapping) and looks_like_tests(value)


def _is_small(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= _META_CHARACTERS)
