"""Compares what a program printed or returned with what its tests expect (docs/code_rewards.md has the rules)."""

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?[0-9]+[eE][+-][0-9]+")
_WHOLE = re.compile(r"[+-]?[0-9]+")
# Allowed error of a printed number, as in the checkers of most contests; relative where the number is above 1.
_PRINTED_ERROR = 1e-6
# A number of at most so many decimals was rounded on purpose: it must agree to its last decimal.
_ROUNDED_DECIMALS = 4
# Allowed errors of a result: absolute, as LeetCode has it, whose expected results have five decimals; or relative.
_RESULT_ERROR, _RESULT_SHARE = 1e-5, 1e-9


def same_output(got: str, expected: str) -> bool:
    """Tell whether these are the same words in the same lines. Blank lines and more space do not count, as in most
    graders."""
    some, others = _words(got), _words(expected)
    if some == others:
        return True
    if list(map(len, some)) != list(map(len, others)):
        return False
    return all(all(map(_same_word, *lines)) for lines in zip(some, others, strict=True))


def _words(text: str) -> list[list[str]]:
    return [words for words in map(str.split, text.splitlines()) if words]


def _same_word(got: str, expected: str) -> bool:
    """Tell whether it is the same text; or, where a number with a point or exponent is expected, one near it; or 3.0
    for 3."""
    if got == expected:
        return True
    if _FLOAT.fullmatch(expected):
        return (_FLOAT.fullmatch(got) or _WHOLE.fullmatch(got)) is not None and _near(float(got), expected)
    if _WHOLE.fullmatch(expected) and _FLOAT.fullmatch(got):
        return Decimal(got) == Decimal(expected)
    return False


def _near(got: float, text: str) -> bool:
    expected = float(text)
    error = _PRINTED_ERROR * max(1.0, abs(expected))
    decimals = len(text.partition(".")[2])
    if decimals <= _ROUNDED_DECIMALS and "e" not in text.lower():
        error = min(error, 0.5000001 * 10.0**-decimals)
    return math.isfinite(expected) and abs(got - expected) <= error


def same_result(got: Any, expected: Any) -> bool:
    """Tell whether this result is what is expected, once both are written as JSON. A tuple is a list there, and keys
    are texts."""
    got = _as_json(got)
    # APPS wraps some results in a list of one.
    return _same(got, expected) or (type(expected) is list and len(expected) == 1 and _same(got, expected[0]))


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(v) for v in value]
    if isinstance(value, dict):
        written = {_json_key(key): _as_json(v) for key, v in value.items()}
        # Two keys of one spelling, 1 and "1": it is no object of JSON, and stays what it is.
        return written if len(written) == len(value) else value
    return value


def _json_key(key: Any) -> Any:
    """Write a key as JSON does; one that it has no place for stays as it is, and equals no text."""
    if key is None or type(key) is bool:
        return {None: "null", True: "true", False: "false"}[key]
    return str(key) if type(key) is int or type(key) is float else key


def _same(got: Any, expected: Any) -> bool:
    if type(got) is list and type(expected) is list:
        return len(got) == len(expected) and all(map(_same, got, expected))
    if type(got) is dict and type(expected) is dict:
        return got.keys() == expected.keys() and all(_same(got[key], expected[key]) for key in expected)
    if type(expected) is float and type(got) in (float, int, Decimal, Fraction):
        number = float(got)
        both_nan = math.isnan(number) and math.isnan(expected)
        return both_nan or math.isclose(number, expected, rel_tol=_RESULT_SHARE, abs_tol=_RESULT_ERROR)
    return bool(got == expected)


def short(value: Any) -> str:
    """Return a part of the text of a value. Integers of more digits than Python prints have none."""
    try:
        return repr(value)[:100]
    except ValueError:
        return f"a {type(value).__name__} of very many digits"
