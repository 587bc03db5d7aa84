"""The boxes of a response: `\\boxed{...}`."""

import re
from collections.abc import Callable

_OPENING = re.compile(r"\\boxed\s*\{")


def last_boxed(text: str) -> str | None:
    """What stands inside the last `\\boxed{...}` of `text`, or None without one or when it is never closed.

    Braces are balanced and `\\{`, `\\}` do not count. An unclosed last box is a response that was cut off, so an
    earlier box is not taken for it. Linear in the length of `text`.
    """
    start = None
    for match in _OPENING.finditer(text):
        start = match.end()
    end = None if start is None else _closing(text, start, len(text))
    return None if end is None else text[start:end]


def last_boxes(text: str, belongs: Callable[[str], bool]) -> list[str]:
    """The last box and those before it, in their order, as long as `belongs` says of the text between one box and the
    next that they are one answer. Empty where `last_boxed` is None. Linear in the length of `text`."""
    openings = list(_OPENING.finditer(text))
    last = last_boxed(text)
    if last is None:
        return []
    found = [last]
    for opening, following in zip(openings[-2::-1], openings[:0:-1], strict=True):
        end = _closing(text, opening.end(), following.start())
        if end is None or not belongs(text[end + 1 : following.start()]):
            break
        found.insert(0, text[opening.end() : end])
    return found


def _closing(text: str, position: int, limit: int) -> int | None:
    """Where the brace closes that was opened just before `position`, or None when that is not before `limit`."""
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
