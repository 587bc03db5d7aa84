"""The final answer of a response: its last `\\boxed{...}`."""

import re

_OPENING = re.compile(r"\\boxed\s*\{")


def last_boxed(text: str) -> str | None:
    """What stands inside the last `\\boxed{...}` of `text`, or None without one or when it is never closed.

    Braces are balanced and `\\{`, `\\}` do not count. An unclosed last box is a response that was cut off, so an
    earlier box is not taken for it. Linear in the length of `text`.
    """
    start = None
    for match in _OPENING.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position]
        position += 1
    return None
