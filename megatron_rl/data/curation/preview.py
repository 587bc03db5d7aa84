"""Runs `megatron-rl inspect`, which shows how the rows of a file can be read, what curation would drop, and the mapping
that does it."""

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import tomli_w

from megatron_rl.data.curation.config import Layout
from megatron_rl.data.curation.guess import guess_layout, layout_of
from megatron_rl.data.curation.inspect import CHAT, as_row, defect_of, record_from
from megatron_rl.data.curation.mapping import Unusable, left_out
from megatron_rl.data.curation.presets import PRESETS
from megatron_rl.data.curation.rules import RULES
from megatron_rl.data.curation.sources import files_of, parsed, pieces_of
from megatron_rl.data.judged import BY_FORMULAS, doubts
from megatron_rl.data.prompts import Prompt
from megatron_rl.files import write_whole

_LOOKED_AT = 1000
_GUESSED_BY = 100
_SHOWN = 3
_TEXT_CHARACTERS = 300

Numbered = tuple[str, Any]  # file:line, row


@dataclass(slots=True, kw_only=True)
class Preview:
    """Holds what is shown of the rows of a file. kept: records with where they stand. dropped: how many by reason.
    first: of each reason."""

    num_rows: int = 0
    kept: list[tuple[str, Prompt]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)


def run_inspect(pattern: str, preset: str, output: Path | None) -> str:
    """Write the mapping of a file, or of files of one layout, and return what a user is told. Raise ValueError where no
    layout fits."""
    if preset and preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    paths = files_of(pattern)
    rows = list(islice(_rows(paths), _LOOKED_AT))
    if not rows:
        raise ValueError(f"{pattern} has no rows; name another file")
    objects = [row for _, row in rows if isinstance(row, Mapping)]
    keys = {"preset": preset} if preset else guess_layout(objects[:_GUESSED_BY])
    if not keys:
        columns = ", ".join(objects[0]) if objects else "none"
        raise ValueError(
            f"no layout fits {pattern}, whose columns are {columns}; name a preset with --preset "
            f"({', '.join(PRESETS)}), or write a file for tools/prepare_data.py yourself (docs/data.md): output = "
            f'"FOLDER", and below [[source]] path = "{pattern}", prompt = "COLUMN", answer = "COLUMN", domain = "math"'
        )
    layout = layout_of(keys)
    text = _told(pattern, keys, preview(rows, layout, pattern), objects)
    path = output or Path(f"{paths[0].name.partition('.')[0]}.curation.toml")
    return f"{text}\n\n{_written(path, pattern, keys)}"


def preview(rows: Sequence[Numbered], layout: Layout, source: str) -> Preview:
    """Read rows by a layout, and look for the defects that curation drops rows for."""
    found = Preview(num_rows=len(rows))
    for where, row in rows:
        reason, detail = "", ""
        try:
            record = record_from(row, layout, source)
            defect = defect_of(record, layout, RULES)
            if defect:
                reason, detail = defect
        except Unusable as unusable:
            reason, detail = unusable.reason, unusable.detail
        if reason:
            found.dropped[reason] += 1
            found.first.setdefault(reason, f"{where}: {detail}")
        else:
            found.kept.append((where, record))
    return found


def _examples(kept: Sequence[tuple[str, Prompt]]) -> list[tuple[str, Prompt]]:
    """Return the first rows: one of every domain before any has a second."""
    first = list({record.domain: (where, record) for where, record in reversed(kept)}.values())[::-1]
    return sorted((first + [one for one in kept if one not in first])[:_SHOWN], key=kept.index)


def _rows(paths: Sequence[Path]) -> Iterator[Numbered]:
    for path in paths:
        for piece in pieces_of(path):
            for line, raw in zip(piece.lines, piece.rows, strict=True):
                try:
                    row = parsed(raw)
                except ValueError as error:
                    row = f"not valid UTF-8 JSON: {error}"
                yield f"{piece.file}:{line}", row


def _told(pattern: str, keys: Mapping[str, Any], found: Preview, objects: Sequence[Mapping[str, Any]]) -> str:
    what = f"the layout {keys['preset']}" if "preset" in keys else "columns that are named as usual"
    lines = [f"{pattern}: {what}", f"columns: {', '.join(objects[0]) if objects else 'none'}"]
    if others := left_out(dict.fromkeys(name for row in objects for name in row), layout_of(keys)):
        lines.append(f"left out: {', '.join(others)} (`meta` keeps columns for a reward of your own)")
    for where, record in _examples(found.kept):
        lines += ["", where, *(f"  {name}: {_shown(value)}" for name, value in as_row(record).items())]
    records = [record for _, record in found.kept]
    domains = Counter(record.domain for record in records if record.domain != CHAT)
    of_each = f": {', '.join(f'{count:,} of {name}' for name, count in domains.items())}" if domains else ""
    kept = f"{len(records):,} would be kept, before duplicates{of_each}"
    lines += ["", f"of the first {found.num_rows:,} rows {kept}"]
    for reason, count in found.dropped.most_common():
        lines.append(f"  {count:>7,}  {reason}, the first: {_shown(found.first[reason])}")
    lines += (f"note: {doubt}" for doubt in doubts([record for record in records if record.domain in BY_FORMULAS]))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    # On one line, and nothing that a terminal would obey.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: _TEXT_CHARACTERS + 1])
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]}..."


def _written(path: Path, pattern: str, keys: Mapping[str, Any]) -> str:
    folder = tomli_w.dumps({"output": f"data/{path.name.partition('.')[0]}"})
    text = f"{folder}\n[[source]]\n{tomli_w.dumps({'path': pattern, **keys})}"
    command = f"python tools/prepare_data.py {shlex.quote(str(path))}"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} exists and says something else; remove it, or name another with --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return f"{path}:\n{text}\nCorrect it where it is wrong (docs/data.md has the keys), then: {command}"
