"""This module reads JSON and TOML that somebody else wrote, within limits that no real file reaches."""

import codecs
import difflib
import io
import json
import os
import re
import stat
import tomllib
from collections.abc import Collection, Iterator
from itertools import count
from pathlib import Path
from typing import Any

MAX_NESTING = 100  # objects, lists and tables in one another; Python itself gives up at a few hundred
MAX_LINE_BYTES = 64 * 2**20
MAX_DOCUMENT_BYTES = 256 * 2**20  # the index of a large model's tensors has a few tens

# A dotted key of many parts: what tomllib takes for one grows with the square of their number.
_LONG_KEY = re.compile(rf"(?<![\w\"'-])(?:[\w\"'-]++[ \t]*+\.[ \t]*+){{{MAX_NESTING}}}")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Read JSON. options: of json.loads. ValueError for what is no JSON or is nested too deeply."""
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise _too_deep() from None
    # Most texts have too few brackets for it, and need not be walked through.
    num_open = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if num_open > MAX_NESTING:
        _refuse_depth(value)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Read TOML. ValueError for what is no TOML (tomllib.TOMLDecodeError) or is nested too deeply."""
    if _LONG_KEY.search(text):
        raise _too_deep()
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise _too_deep() from None
    _refuse_depth(values)
    return values


def read_json(path: Path) -> Any:
    """Read a file of JSON. ValueError, without the path, as of `parse_json` and `read_text`."""
    return parse_json(read_text(path))


def read_text(path: Path) -> str:
    """Read a whole file of text in UTF-8. ValueError, without the path, for another encoding, for more than
    MAX_DOCUMENT_BYTES, and for a FIFO or device, which may never end."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"it has more than {MAX_DOCUMENT_BYTES:,} bytes")
    return content.decode()


def bounded_lines(file: io.BufferedIOBase, name: object) -> Iterator[bytes]:
    """Yield all lines with their ends, as iterating does. ValueError for a line of more than MAX_LINE_BYTES, which is
    not read to its end, and for a file in UTF-16, whose lines end elsewhere. name: of the file, for the message."""
    for number in count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{name} is in UTF-16; write it in UTF-8 (iconv -f UTF-16 -t UTF-8)")
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"{name}:{number}: the line has more than {MAX_LINE_BYTES:,} bytes; write one JSON object per line, "
                "and drop a row that is longer"
            )
        if not line:
            return
        yield line


def meant(word: str, known: Collection[str]) -> str:
    """Say at the end of a message which known word an unknown one may mean; "" where none is like it."""
    near = difflib.get_close_matches(word.casefold(), [name.casefold() for name in known], n=1)
    found = [name for name in sorted(known) if name.casefold() in near]
    return f". Did you mean {found[0]!r}?" if found else ""


def shown(value: object) -> str:
    """Write a value as a message quotes it, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_depth(value: Any) -> None:
    """Raise ValueError for what is nested too deeply. It goes level by level, since recursion cannot go that deep."""
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [one for one in level if type(one) in (dict, list)]
        if not level:
            return
        parts = (one.values() if type(one) is dict else one for one in level)
        # A list of nothing but numbers, as of tokens, is passed over at once.
        level = [child for part in parts if not {dict, list}.isdisjoint(map(type, part)) for child in part]
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MAX_NESTING} deep")
