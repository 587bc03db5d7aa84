"""Finds the boxes of a response: `\\boxed{...}` or `\\fbox{...}`, or `\\boxed 5` without braces."""

import re
from dataclasses import dataclass

_OPENING = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:(\{)|([-+]?\d+(?:[.,/]\d+)*|[A-Za-z](?![A-Za-z])))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Describes a box. content: what stands in it. start, end: of the whole command in the text."""

    content: str
    start: int
    end: int


def boxes(text: str) -> list[Box]:
    """Return the boxes of `text` in their order, the inner one of two that are nested. Empty when the last one is not
    closed.

    Braces are balanced and `\\{`, `\\}` do not count. An unclosed last box is a response that was cut off, so an
    earlier box is not taken for it. Linear in the length of `text`.
    """
    openings = list(_OPENING.finditer(text))
    limits = [*(opening.start() for opening in openings), len(text)][1:]
    found = []
    for opening, limit in zip(openings, limits, strict=True):
        if opening[1] is None:
            found.append(Box(content=opening[2], start=opening.start(), end=opening.end()))
            continue
        end = _closing(text, opening.end(), limit)
        if end is not None:
            found.append(Box(content=text[opening.end() : end], start=opening.start(), end=end + 1))
        elif limit == len(text):
            return []
    return found


def _closing(text: str, position: int, limit: int) -> int | None:
    """Return where the brace closes that was opened just before `position`, or None when that is not before `limit`."""
    depth = 1
    while position < limit:
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None
