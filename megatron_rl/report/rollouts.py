"""Reads the responses that the page shows: a few groups of a few steps, read line by line from files of any size."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.parsing import bounded_lines, parse_json
from megatron_rl.report.runs import Run

_GROUPS = 4  # of a step
_RESPONSES = 16  # of a group
_PROMPT_CHARACTERS = 4000
_ANSWER_CHARACTERS = 300
_TOKEN = 6
_TAIL_SHARE = 0.4  # of what is shown of a long response: its answer is there
# train/orchestrator/phase_metrics.py and traces begin rows so. A row with another beginning is read whole.
_BEGINNING = re.compile(rb'^\{(?:"prompt_id": "[^"\\]*", )?"position": (\d+), "sample_index": (\d+)[,}]')
_KEPT = (
    *("sample_index", "reward", "reason", "details", "parts", "advantage", "outcome", "num_tokens", "num_loss_tokens"),
    *("finish_reason", "policy_versions", "expected", "extracted", "num_masked_tokens", "num_turns", "teacher_kl"),
)


def evenly(items: Sequence[int], count: int) -> list[int]:
    """Choose `count` of the items: the first, the last, and evenly spaced ones between them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def steps_with_rollouts(run: Run) -> list[int]:
    """Return the logged steps that have a file of rollouts; a later file is of a step under way."""
    numbers = (re.fullmatch(r"step_(\d+)\.jsonl", path.name) for path in (run.directory / "rollouts").glob("*.jsonl"))
    return sorted(step for found in numbers if found and (step := int(found[1])) < run.num_steps)


def read_step(run: Run, step: int, characters: int) -> dict[str, Any]:
    """Return groups of the step, each with its responses, of which each is cut to `characters` characters.

    Traced groups come first; the others are spread over the file, of which the start was carried from the step before
    and the end into the next.
    """
    path = run.directory / f"rollouts/step_{step:06d}.jsonl"
    traces_path = run.directory / f"tokens/step_{step:06d}.jsonl"
    sizes: dict[int, int] = {}
    for position, _, _, _ in _lines(path):
        sizes[position] = sizes.get(position, 0) + 1
    traced = list(dict.fromkeys(position for position, _, _, _ in _lines(traces_path) if position in sizes))[:_GROUPS]
    others = [position for position in sizes if position not in traced]
    chosen = traced + evenly(others, _GROUPS - len(traced))
    traces: dict[tuple[int, int], dict[str, Any]] = {}
    for position, index, _, line in _lines(traces_path):
        if position in traced and (row := _parsed(line)) and _is_trace(row):
            traces[position, index] = row
    rows: dict[int, list[tuple[int, dict[str, Any]]]] = {position: [] for position in chosen}
    for position, _, number, line in _lines(path):
        if position in rows and len(rows[position]) < _RESPONSES and (row := _parsed(line)):
            rows[position].append((number, row))
    return {
        "step": step,
        "groups": [
            {
                "prompt_id": _text(members[0][1].get("prompt_id")),
                "prompt": _cut(_text(members[0][1].get("prompt")), _PROMPT_CHARACTERS),
                "total": sizes[position],
                "responses": [
                    _response(row, number, traces.get((position, row.get("sample_index", -1))), characters)
                    for number, row in sorted(members, key=lambda member: str(member[1].get("sample_index")).zfill(9))
                ],
            }
            for position, members in rows.items()
            if members
        ],
        "num_groups": len(sizes),
        "file": f"rollouts/step_{step:06d}.jsonl",
    }


def _is_trace(row: dict[str, Any]) -> bool:
    columns = [row.get(name) for name in ("tokens", "rollout_logprobs", "train_logprobs")]
    columns += [row["teacher_logprobs"]] if "teacher_logprobs" in row else []
    versions = row.get("policy_versions")
    return (
        all(isinstance(column, list) and len(column) == len(columns[0] or ()) for column in columns)
        and all(isinstance(value, int | float | None) for column in columns[1:] for value in column or ())
        and isinstance(versions, list)
        and all(isinstance(run, list) and len(run) == 2 for run in versions)
    )


def _response(row: dict[str, Any], line: int, trace: dict[str, Any] | None, characters: int) -> dict[str, Any]:
    found = {key: row[key] for key in _KEPT if key in row and row[key] not in ("", None)}
    found["line"] = line
    if isinstance(details := found.get("details"), str):
        found["details"] = details[:_PROMPT_CHARACTERS]
    for name in ("expected", "extracted"):
        if name in found:
            found[name] = _text(found[name])[:_ANSWER_CHARACTERS]
    if trace is not None:
        return found | {"trace": _cut_trace(trace, characters)}
    if spans := _spans(row.get("segments")):
        return found | {"spans": _cut_spans(spans, characters)}
    return found | {"text": _cut(_text(row.get("response")), characters)}


def _spans(segments: object) -> list[list[Any]]:
    """Return [text, "policy" or "others"] of a trajectory in order, and [newline, "segment", n] where a segment begins
    whose prompt has its first n tokens in common with the one before."""
    found: list[list[Any]] = []
    for number, segment in enumerate(segments if isinstance(segments, list) else ()):
        if not isinstance(segment, dict):
            return []
        if number:
            shared = segment.get("shared_tokens")
            found.append(["\n", "segment", shared if isinstance(shared, int) else 0])
            found.append([_text(segment.get("prompt")), "others"])
        spans = segment.get("spans")
        for span in spans if isinstance(spans, list) else ():
            if isinstance(span, list) and len(span) == 2:
                found.append([_text(span[0]), "policy" if span[1] else "others"])
    return [span for span in found if span[0]]


def _cut_spans(spans: list[list[Any]], characters: int) -> list[list[Any]]:
    """Return the same spans, or their head, [number of characters left out, "gap"], and their tail."""
    total = sum(len(text) for text, *_ in spans)
    if total <= characters:
        return spans
    tail = int(characters * _TAIL_SHARE)
    first, last = characters - tail, total - tail
    found: list[list[Any]] = []
    start = 0
    for text, *kind in spans:
        if head := text[: max(0, first - start)]:
            found.append([head, *kind])
        if start <= first < start + len(text):
            found.append([last - first, "gap"])
        if rest := text[max(0, last - start) :]:
            found.append([rest, *kind])
        start += len(text)
    return found


def _cut(text: str, characters: int) -> list[Any]:
    """Return [text], or [head, number of characters left out, tail]."""
    if len(text) <= characters:
        return [text]
    tail = int(characters * _TAIL_SHARE)
    return [text[: characters - tail], len(text) - characters, text[len(text) - tail :]]


def _cut_trace(trace: dict[str, Any], characters: int) -> dict[str, Any]:
    """Return columns of equal length, one entry for each token that is shown.

    gap: [first, number] of the tokens left out, or None. versions: [version, number of tokens] in order, of all tokens;
    None is of tokens that the policy did not sample. segments: where those after the first one begin.
    """
    tokens = [_text(token) for token in trace["tokens"]]
    head, tail, gap = len(tokens), 0, None
    if _fitting(tokens, characters) < len(tokens):
        head = _fitting(tokens, characters * (1 - _TAIL_SHARE))
        tail = _fitting(tokens[:head:-1], characters * _TAIL_SHARE)
        gap = [head, len(tokens) - head - tail]
    keep = [*range(head), *range(len(tokens) - tail, len(tokens))]
    segments = trace.get("segments")
    return {
        "tokens": [tokens[i] for i in keep],
        "rollout": [trace["rollout_logprobs"][i] for i in keep],
        "train": [trace["train_logprobs"][i] for i in keep],
        **({"teacher": [trace["teacher_logprobs"][i] for i in keep]} if "teacher_logprobs" in trace else {}),
        "versions": trace["policy_versions"],
        "optimizer_step": trace.get("optimizer_step"),
        "gap": gap,
        **({"segments": segments[1:]} if isinstance(segments, list) else {}),
    }


def _fitting(tokens: Sequence[str], characters: float) -> int:
    """Count how many of the first tokens fit into `characters` characters. Each token with its numbers takes _TOKEN at
    least."""
    room = 0
    for number, token in enumerate(tokens):
        room += max(_TOKEN, len(token))
        if room > characters:
            return number
    return len(tokens)


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _lines(path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield (position, sample_index, line number from 1, line) of every row; a last one cut short is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file, path), start=1):
            if not line.endswith(b"\n"):
                return
            if found := _BEGINNING.match(line):
                yield int(found[1]), int(found[2]), number, line
            elif (row := _parsed(line)) and isinstance(row.get("position"), int):
                yield row["position"], row.get("sample_index", -1), number, line


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Parse a line; None where it is no object. Numbers that are not finite, which a page's JSON does not have, are
    None."""
    try:
        row = parse_json(line.decode(errors="replace"), parse_constant=lambda _: None, parse_float=_finite)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
