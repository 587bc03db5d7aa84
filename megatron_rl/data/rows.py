"""Reads rows of JSONL files, and tells everything that is wrong with them in one message."""

import difflib
import glob
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.parsing import bounded_lines, parse_json, shown

LOOKED_AT = 1000  # rows behind the first that is wrong: enough to see what else is
_TOLD = 10

# Column names of other data sets for each field of a prompt row, the likeliest first. Capitals and underscores do
# not count.
NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": (
        "prompt", "question", "problem", "query", "instruction", "question_content", "problem_description", "statement",
        "problem_statement", "user_prompt", "task", "text", "input", "messages", "conversations",
    ),
    "answer": (
        "answer", "final_answer", "correct_answer", "reference_answer", "ground_truth", "groundtruth", "gold", "label",
        "target", "expected_answer", "expected_output", "answers", "tests", "test_cases", "solution", "output",
        "response", "test", "test_list", "reward_model",
    ),
    "messages": ("messages", "conversations", "conversation", "chat", "dialogue", "dialog"),
}  # fmt: skip


def likely_column(field: str, columns: Sequence[str]) -> str | None:
    """Name the column that is probably meant by a field: a usual name of it, or a misspelt one."""
    by_name = {_plain(str(column)): column for column in reversed(columns)}
    for name in NAMES.get(field, (field,)):
        if _plain(name) in by_name:
            return by_name[_plain(name)]
    near = difflib.get_close_matches(_plain(field), by_name, n=1, cutoff=0.8)
    return by_name[near[0]] if near else None


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


class Problems:
    """Gathers what is wrong with rows, so that it can be told at once. The same fault in many rows is told once."""

    def __init__(self) -> None:
        # Maps (file, fault) to the first message, the number of such rows, and the line of the first.
        self._found: dict[tuple[str, str], tuple[str, int, int]] = {}
        self._unmapped: list[str] = []

    def add(self, path: str | Path, line: int, fault: str, text: str, unmapped: bool = False) -> None:
        """Note a fault of a row. text: the message. unmapped: the file may have another layout than ours."""
        first, count, first_line = self._found.get((str(path), fault), (text, 0, line))
        self._found[str(path), fault] = first, count + 1, first_line
        if unmapped and str(path) not in self._unmapped:
            self._unmapped.append(str(path))

    def are_enough(self, path: str | Path, line: int) -> bool:
        """Tell whether so many rows have been read since the first wrong one that nobody learns more from reading
        on."""
        lines = [first for (file, _), (_, _, first) in self._found.items() if file == str(path)]
        return bool(lines) and line > min(lines) + LOOKED_AT

    def tell(self) -> None:
        """Raise ValueError with all of it, where there is any."""
        if not self._found:
            return
        texts = [
            text + (f" ({count - 1:,} more such rows)" if count > 1 else "") for text, count, _ in self._found.values()
        ]
        if len(texts) > _TOLD:
            texts[_TOLD:] = [f"and {len(texts) - _TOLD} other faults"]
        lines = texts if len(texts) == 1 else [f"the rows cannot be used, for {len(texts)} reasons:", *texts]
        lines += [
            f"megatron-rl inspect {shlex.quote(path)} shows how its rows can be read, and writes the mapping that "
            "tools/prepare_data.py makes our rows by"
            for path in self._unmapped
        ]
        raise ValueError("\n  ".join(lines))


def rows_of(path: str | Path, problems: Problems, most: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of every line that is not blank. most: rows to read; default: all."""
    if not Path(path).is_file():
        problems.add(path, 0, "file", why_no_file(Path(path)))
        return
    if Path(path).suffix in (".parquet", ".csv", ".gz"):
        problems.add(path, 0, "file", f"{path} is no JSONL, one JSON object per line", unmapped=True)
        return
    count = 0
    with Path(path).open("rb") as file:
        for line, raw in enumerate(bounded_lines(file, path), start=1):
            if problems.are_enough(path, line) or (most is not None and count >= most):
                return
            if not raw.strip():
                continue
            count += 1
            row, wrong = _parsed(raw)
            if wrong is None:
                yield line, row
            else:
                problems.add(
                    path, line, "json", f"{path}:{line}: {wrong}; write one object per line", unmapped=count == 1
                )
    if not count:
        problems.add(path, 0, "file", f"{path} holds no rows; write one JSON object per line")


def why_no_file(path: Path) -> str:
    """Say why there is no file of rows at a path: nothing is there, or something else."""
    if path.is_dir():
        inside = sorted(path.glob("*.jsonl"))
        example = f", as {inside[0]}" if inside else ""
        return f"data file {path} is a directory; name a file in it{example}"
    if path.exists():
        return f"data file {path} is not a regular file; write its rows into one"
    if glob.has_magic(str(path)):
        return f"data file {path} does not exist; patterns are not read here: name one file"
    return f"data file {path} does not exist"


def _parsed(raw: bytes) -> tuple[Any, str | None]:
    """Return the object in a line, or why there is none."""
    try:
        row = parse_json(raw)
    except ValueError as error:
        return None, f"not valid UTF-8 JSON ({error})"
    return (row, None) if isinstance(row, dict) else (None, f"must be a JSON object, got {shown(row)}")
