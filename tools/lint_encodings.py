"""Find text files that are opened without an encoding, whose bytes would then depend on the user's locale.

    python tools/lint_encodings.py [FOLDER ...]

Ruff's PLW1514 knows the type of few receivers; this goes by the names of calls. `make check` runs it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("megatron_rl", "tools", "examples")

_MODE = re.compile(r"[rwxabt+]+")
# The position of the mode among a call's arguments, and the mode when it is left out.
_OPENERS = {
    **dict.fromkeys(("open", "io.open", "os.fdopen", "codecs.open"), (1, "r")),
    **dict.fromkeys(("gzip.open", "bz2.open", "lzma.open"), (1, "rb")),
    **{f"tempfile.{name}": (0, "w+b") for name in ("NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile")},
}
_NO_FILES = {"os.open", "tarfile.open", "zipfile.open"}
# Calls that are always of text, and which argument is the encoding.
_TEXT = {"read_text": 0, "write_text": 1, "TextIOWrapper": 1, "FileHandler": 2}


def unspecified(source: str) -> Iterator[tuple[int, str]]:
    """Return (line, call) of every call that opens text, or text of a subprocess, without `encoding`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _is_text(node) and "encoding" not in _keywords(node):
            yield node.lineno, ast.unparse(node.func)


def _is_text(call: ast.Call) -> bool:
    """Tell whether the locale would choose its encoding."""
    name, keywords = ast.unparse(call.func), _keywords(call)
    last = name.rpartition(".")[2]
    if any(_is_true(keywords.get(key)) for key in ("text", "universal_newlines")):
        return True
    if last in _TEXT and isinstance(call.func, ast.Attribute):
        return len(call.args) <= _TEXT[last]
    if name in _OPENERS:
        place, default = _OPENERS[name]
        return "b" not in _mode(call, place, default)
    if last == "open" and isinstance(call.func, ast.Attribute) and name not in _NO_FILES:
        mode = _mode(call, 0, "r")  # of a Path; what opens other things has no mode
        return len(call.args) <= 1 and _MODE.fullmatch(mode) is not None and "b" not in mode
    return False


def _mode(call: ast.Call, place: int, default: str) -> str:
    """Return the mode where it is written down, and "?" where it is worked out."""
    given = _keywords(call).get("mode", call.args[place] if len(call.args) > place else None)
    if given is None:
        return default
    return str(given.value) if isinstance(given, ast.Constant) else "?"


def _keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}


def _is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def main(folders: list[str]) -> int:
    """Print every such call of the folders. Return the exit code."""
    found = [
        f'{path}:{line}: {call} without encoding=; write encoding="utf-8"'
        for folder in folders or [str(ROOT / name) for name in FOLDERS]
        for path in sorted(Path(folder).rglob("*.py"))
        for line, call in unspecified(path.read_text(encoding="utf-8"))
    ]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
