"""Equality of two expressions: math-verify parses, their values decide where they can be computed.

Only for pool workers: sympy may hang, exhaust memory or crash. math-verify's own comparison says 1/2004! = 1/2005!,
because it subtracts, and 3.14159265 = pi, because it rounds; hence values are compared relative to their size, and
decimals become exact fractions before they are parsed.
"""

import functools
import re
from typing import Any

from megatron_rl.reward.number import read_number, significant_digits

_DIGITS = 40
_BITS = 140
_CLOSE = 1e-30
# Where expressions in letters are compared: first all positive, then with one letter negative. No special values.
_POINTS = ("1.3717", "0.6291", "2.1843", "0.8159", "1.7321", "3.0417", "0.4373", "1.1907", "2.6071", "0.9283")
_DECIMAL = re.compile(r"(?<![\w.])(\d+(?:,\d{3})*)?\.(\d+)(?![\d.]|\s*\\[lc]?dots)")
# Words outside of an index; the parser would leave them out, and "12 (not 13)" be 12.
_PROSE = re.compile(r"(?<![_{])(?<!_\{)\\text\s*\{[^{}]*[A-Za-z]{2}")
# A single expression that is longer than this and than two gold answers is not read: parsing takes a second for 2,000.
MAX_EXPRESSION_CHARACTERS = 500
# Digits from which a decimal reference answer counts as rounded; fewer may be exact.
_ROUNDED_FROM_DIGITS = 4


def real_value(latex: str) -> float | None:
    """Of an expression without letters (cleaned by `latex.clean`), or None when it has no real value."""
    parsed = _parse(latex)
    value = None if parsed is None else _value(parsed, {})
    return None if value is None or abs(value.imag) > _CLOSE else float(value.real)


def equal_expressions(gold: str, answer: str) -> bool:
    """Whether two single expressions (cleaned by `latex.clean`) have the same value for all values of their letters.

    Also True where the gold answer is a decimal of four or more significant digits and the exact answer rounds to it.
    """
    if len(answer) > max(MAX_EXPRESSION_CHARACTERS, 2 * len(gold)):
        return False
    parsed = _parse(gold), _parse(answer)
    if parsed[0] is None or parsed[1] is None:
        return False
    equal = _equal_values(parsed[0], parsed[1])
    if equal is None:
        equal = _verified(parsed[0], parsed[1])
    return equal or _rounds_to(parsed[1], gold, answer)


def _rounds_to(answer: Any, gold_text: str, answer_text: str) -> bool:
    """gold 0.9659, answer (sqrt(6)+sqrt(2))/4. A decimal answer has to be the same decimal."""
    digits = significant_digits(gold_text)
    if digits < _ROUNDED_FROM_DIGITS or re.search(r"\d\.\d|\.\d", answer_text):
        return False
    value, number = _value(answer, {}), read_number(gold_text)
    if value is None or number is None or abs(value.imag) > _CLOSE:
        return False
    places = len(gold_text.rpartition(".")[2])
    return bool(abs(value.real - float(number.value)) <= 0.5 * 10.0**-places * (1 + 1e-9))


@functools.lru_cache(maxsize=256)
def _parse(latex: str) -> Any:
    """A sympy object, or None when math-verify makes nothing of it."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, MatrixBase

    if _PROSE.search(latex):
        return None
    exact = _DECIMAL.sub(_as_fraction, latex)
    # As it stands or not at all: left to itself, math-verify takes some part of what it cannot read.
    found = parse(
        f"\\boxed{{{exact}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return found[0] if found and isinstance(found[0], (Basic, MatrixBase)) else None


def _as_fraction(match: re.Match[str]) -> str:
    whole, places = (match[1] or "0").replace(",", ""), match[2]
    return f"\\frac{{{int(whole + places)}}}{{{10 ** len(places)}}}"


def _equal_values(gold: Any, answer: Any) -> bool | None:
    """By value at several points; None where that says nothing: equations, sets, matrices, unknown functions."""
    from sympy import Expr, I, Symbol

    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return None
    gold, answer = (
        side.subs({letter: I for letter in side.free_symbols if letter.name == "i"}).doit(integrals=False)
        for side in (gold, answer)
    )
    letters = sorted(gold.free_symbols | answer.free_symbols, key=lambda letter: str(letter.name))
    if len(letters) > len(_POINTS) - 2 or not all(isinstance(letter, Symbol) for letter in letters):
        return None
    if not letters and gold.is_Rational and answer.is_Rational:
        return bool(gold == answer)
    decided = False
    for shift in range(3):
        point = {letter: _POINTS[(n + shift) % len(_POINTS)] for n, letter in enumerate(letters)}
        outcome = _close(_value(gold, point), _value(answer, point))
        if outcome is False:
            return False
        decided = decided or outcome is True
        if not letters:
            return outcome
    return decided and _equal_where_negative(gold, answer, letters) if decided else None


def _equal_where_negative(gold: Any, answer: Any, letters: list[Any]) -> bool:
    """sqrt(x^2) is |x| and not x. Complex values say nothing: letters under a root are meant to be positive."""
    for negative in letters:
        point = {
            letter: f"-{value}" if letter is negative else value
            for letter, value in zip(letters, _POINTS, strict=False)
        }
        values = _value(gold, point), _value(answer, point)
        both_real = all(value is not None and abs(value.imag) <= _CLOSE * abs(value) for value in values)
        if both_real and _close(*values) is False:
            return False
    return True


def _value(expression: Any, point: dict[Any, str]) -> Any:
    """A complex mpmath number, or None when the expression has no finite value there."""
    import mpmath
    from sympy import Float

    try:
        value = expression.subs({letter: Float(text, _DIGITS) for letter, text in point.items()}).evalf(_DIGITS)
        real, imaginary = value.as_real_imag()
        with mpmath.workdps(_DIGITS):
            number = mpmath.mpc(mpmath.mpf(real._to_mpmath(_BITS)), mpmath.mpf(imaginary._to_mpmath(_BITS)))
    except Exception:  # sympy raises anything at all, and here it only means that there is no value
        return None
    return number if mpmath.isfinite(number) else None


def _close(first: Any, second: Any) -> bool | None:
    if first is None or second is None:
        return None
    largest = max(abs(first), abs(second))
    # Below this both are roundings of zero, unless they are written as such small numbers and then differ in size.
    return bool(abs(first - second) <= _CLOSE * largest) or (largest < 1e-38 and min(abs(first), abs(second)) == 0)


def _verified(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    return bool(verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True))
