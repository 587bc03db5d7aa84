"""Limits what an answer may ask of a computer algebra system, by cheap tests of its text, before anything is parsed."""

import re

MAX_ANSWER_CHARACTERS = 2000
MAX_DEPTH = 40
MAX_PARTS = 200
# Numbers of this size are still computed at once; 2004! is an answer in MATH.
_MAX_EXPONENT = 10_000
_MAX_FACTORIAL = 5_000
_MAX_DIGITS = 1_000
_MAX_TOWER = 2

_POWER = re.compile(r"(?:\^|\*\*)\s*\{?\s*\(?\s*-?\s*(\d+)")
_POWER_OF_POWER = re.compile(r"\^\s*\{?\s*[-(]*\s*(\d+)\s*(?:\^\s*\{?\s*\(?\s*(\d+)|(!))")
_EXPONENT = re.compile(r"\s*(?:([{(])|\d+|\\[a-zA-Z]+|.)", re.DOTALL)
# Finds a number to the power of a number anywhere inside an exponent.
_INNER_POWER = re.compile(r"(\d+)\s*[)}]*\s*\^\s*\{?\s*(\d+)")
_FACTORIAL = re.compile(r"(\d+)\s*!")
_FACTORIAL_OF_LARGE = re.compile(r"[!^][^()a-zA-Z]*[)\}\]]+\s*!|!\s*!")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*\{?\s*(\d+)|\{\s*(\d+)\s*\\choose")


def excess(answer: str) -> str | None:
    """Say why `answer` is not worth evaluating, or None.

    Nobody who grades would read on either. What slips through meets the worker's deadline and memory limit.
    """
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return f"{len(answer)} characters, more than {MAX_ANSWER_CHARACTERS}"
    if _depth(answer) > MAX_DEPTH:
        return f"brackets nested more than {MAX_DEPTH} deep"
    if answer.count(",") + answer.count("\\\\") > MAX_PARTS:
        return f"more than {MAX_PARTS} elements"
    if re.search(rf"\d{{{_MAX_DIGITS}}}", answer):
        return f"a number of more than {_MAX_DIGITS} digits"
    return _too_large_to_compute(answer)


def _too_large_to_compute(answer: str) -> str | None:
    if any(_exceeds(digits, _MAX_EXPONENT) for digits in _POWER.findall(answer)):
        return f"an exponent above {_MAX_EXPONENT}"
    if _tower_height(answer) > _MAX_TOWER or any(map(_is_large_power, _POWER_OF_POWER.findall(answer))):
        return "a tower of powers"
    if any(_exceeds(digits, _MAX_FACTORIAL) for digits in _FACTORIAL.findall(answer)):
        return f"a factorial above {_MAX_FACTORIAL}!"
    if _FACTORIAL_OF_LARGE.search(answer):
        return "a factorial of a factorial or power"
    if any(_exceeds(first or second, _MAX_FACTORIAL) for first, second in _BINOMIAL.findall(answer)):
        return f"a binomial coefficient of more than {_MAX_FACTORIAL}"
    return None


def _is_large_power(found: tuple[str, str, str]) -> bool:
    """Tell whether b^c or b! is too large as an exponent."""
    base, exponent, _factorial = found
    if _exceeds(base, _MAX_EXPONENT) or _exceeds(exponent or "0", _MAX_EXPONENT):
        return True
    # 7! and 9^4 are exponents that are still computed, 8! and 9^9 are not.
    return int(base) ** min(int(exponent), 99) > _MAX_EXPONENT if exponent else int(base) > 7


def _tower_height(answer: str) -> int:
    """Count how many powers stand on one another: 2 for e^{x^2} and for 2^3^4."""
    highest = level = chain = position = 0
    opened: list[int] = []  # the level outside of each open bracket
    while position < len(answer):
        character = answer[position]
        inner = _INNER_POWER.match(answer, position) if level and character.isdigit() else None
        if inner and _is_large_power((inner[1], inner[2], "")):
            return _MAX_TOWER + 1
        if character == "^" and (exponent := _EXPONENT.match(answer, position + 1)):
            chain += 1
            highest = max(highest, level + chain)
            position = exponent.end()
            if exponent[1]:
                opened.append(level)
                level, chain = level + chain, 0
            continue
        if character in "([{":
            opened.append(level)
        elif character in ")]}" and opened:
            level = opened.pop()
        if not character.isspace():
            chain = 0
        position += 1
    return highest


def _exceeds(digits: str, limit: int) -> bool:
    return len(digits) > 12 or int(digits) > limit


def _depth(answer: str) -> int:
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
