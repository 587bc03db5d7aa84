"""Tells whether two expressions are equal: math-verify parses, their values decide where they can be computed.

Only for pool workers: sympy may hang, exhaust memory or crash. math-verify's own comparison says 1/2004! = 1/2005!,
because it subtracts, and 3.14159265 = pi, because it rounds; hence values are compared relative to their size, and
decimals become exact fractions before they are parsed.
"""

import functools
import re
from fractions import Fraction
from typing import Any

from megatron_rl.reward.number import is_rounded, read_number

_DIGITS = 40
_BITS = 140
_CLOSE = 1e-30
# Expressions in letters are compared at these values: first all positive, then one negative. None is special.
_POINTS = ("1.3717", "0.6291", "2.1843", "0.8159", "1.7321", "3.0417", "0.4373", "1.1907", "2.6071", "0.9283")
_DECIMAL = re.compile(r"(?<![\w.])(\d+(?:,\d{3})*)?\.(\d+)(?![\d.]|\s*\\[lc]?dots)")
# Words outside of an index: the parser would leave them out, and read "12 (not 13)" as 12.
_PROSE = re.compile(r"(?<![_{])(?<!_\{)\\text\s*\{[^{}]*[A-Za-z]{2}")
# A single expression that is longer than this and than two gold answers is not read: parsing takes a second for 2,000.
MAX_EXPRESSION_CHARACTERS = 500
# Digits from which a decimal counts as rounded; fewer may be exact, and those of a response a guess.
ROUNDED_GOLD_DIGITS, ROUNDED_ANSWER_DIGITS = 4, 12
_FUNCTION = r"arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp"
# The parser leaves out what these stand for.
_DOTS = re.compile(r"\\[lc]?dots|\.\.\.")
# Replaces what people type instead of a LaTeX command, and what the parser does not know.
_TYPED = (
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"([a-zA-Z])'"), r"\1_{p}"),  # x' is no x
    (re.compile(r"(?<=_\{)(p+)\}'"), r"\1p}"),
    (re.compile(r"\^\s*(?:\{\s*T\s*\}|T)"), "^{(T)}"),  # only matrices are transposed, and those are compared before
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])"), "*"),  # the parser takes d\cdot for a differential
    (re.compile(r"\\bmod(?![a-zA-Z])"), r"\\mod"),
    (re.compile(r"(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(rf"(?<![a-zA-Z\\])(pi|infty|{_FUNCTION})(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"\\hbar(?![a-zA-Z])"), r"(\\frac{h}{2 \\pi})"),
    (re.compile(r"\\lg(?![a-zA-Z])"), r"\\log_{10}"),
    (re.compile(r"\\log_\s*(?:e|\{\s*e\s*\})"), r"\\ln "),
    (re.compile(r"\\exp\s*\(([^()]*)\)"), r"e^{\1}"),
    (re.compile(r"\^\s*([-+]\d+|\d{2,})"), r"^{\1}"),
    (re.compile(r"\^\s*\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ\s*"), r"{\\frac{\1 \\pi}{180}}"),
    (re.compile(r"(?<![a-zA-Z\\])C_\{?(\d+)\}?\^\{?(\d+)\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?:\{\}\s*)?\^\{?(\d+)\}?\s*C_\{?(\d+)\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<![a-zA-Z\\])C\((\d+),\s*(\d+)\)"), r"\\binom{\1}{\2}"),
    # a number before a bracket is no function
    (re.compile(r"(?<![_^\d.a-zA-Z}])(\d+)\s*\((?=[^()]*\))"), r"\1 * ("),
)
# Outside of an integral d is a factor like others.
_DIFFERENTIAL = re.compile(r"(\\[a-zA-Z]+)|d(?=\s*[a-zA-Z])")
_EQUALS = re.compile(r"(?<![<>!\\:])=(?!=)")
_INDEXED = re.compile(r"_\s*\{[^{}]*\}")
_CONSTANT = re.compile(r"([+] ?)[cC]$")


def real_value(latex: str) -> float | None:
    """Return the value of an expression without letters (cleaned by `latex.clean`), or None when it has no real
    value."""
    parsed = _parse(latex)
    value = None if parsed is None else _value(parsed, {})
    return None if value is None or abs(value.imag) > _CLOSE else float(value.real)


def equal_expressions(gold: str, answer: str) -> bool:
    """Tell whether two single expressions or equations (cleaned by `latex.clean`) are the same for all values of
    letters.

    Also True where one is a decimal to which the other rounds: of four or more significant digits in the gold answer,
    of twelve or more in the other one. Those are no guesses.
    """
    if len(answer) > max(MAX_EXPRESSION_CHARACTERS, 2 * len(gold)):
        return False
    both_end_in_constant = bool(_CONSTANT.search(gold) and _CONSTANT.search(answer))
    if both_end_in_constant:
        gold, answer = _one_constant(gold), _one_constant(answer)
    sides = gold, answer
    equations = ["=" in _INDEXED.sub("", side) for side in sides]
    if any(equations):
        return all(equations) and _same_equation(gold, answer)
    parsed = _parse(gold), _parse(answer)
    if parsed[0] is None or parsed[1] is None:
        return False
    if both_end_in_constant and _differ_by_constant(parsed[0], parsed[1]):
        return True
    equal = _equal_values(parsed[0], parsed[1])
    if equal is None:
        equal = _verified(parsed[0], parsed[1])
    return (
        equal
        or _rounds_to(parsed[1], gold, answer, ROUNDED_GOLD_DIGITS)
        or _rounds_to(parsed[0], answer, gold, ROUNDED_ANSWER_DIGITS)
    )


def _differ_by_constant(gold: Any, answer: Any) -> bool:
    """Tell whether these are two integrals of one function, which end in +C."""
    from sympy import Expr

    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return False
    letters = sorted(gold.free_symbols | answer.free_symbols, key=lambda letter: str(letter.name))
    if [letter.name for letter in letters[:1]] != ["C"] or len(letters) != 2:
        return False
    values = [_value(gold - answer, {letters[0]: "1", letters[1]: point}) for point in _POINTS[:3]]
    return None not in values and all(abs(value - values[0]) < 1e-25 * (1 + abs(values[0])) for value in values)


def _rounds_to(exact: Any, decimal_text: str, exact_text: str, from_digits: int) -> bool:
    """Tell whether the exact value rounds to the decimal: gold 0.9659, answer (sqrt(6)+sqrt(2))/4. Of two decimals
    neither is rounded here."""
    decimal = read_number(decimal_text)
    if decimal is None or decimal.digits < from_digits or re.search(r"\d\.\d|\.\d", exact_text):
        return False
    value = _value(exact, {})
    return value is not None and abs(value.imag) <= _CLOSE and is_rounded(decimal, _fraction(value.real), from_digits)


def _fraction(value: Any) -> Fraction:
    from sympy import Float, Rational

    ratio = Rational(Float(value, _DIGITS))
    return Fraction(int(ratio.p), int(ratio.q))


def _same_equation(gold: str, answer: str) -> bool:
    """Tell whether equations have the same solutions, as far as a factor that is not 0 anywhere tells: 2x-y+1=0 and
    y=2x+1."""
    differences = []
    for side in (gold, answer):
        parts = [_parse(part) for part in _EQUALS.split(side)]
        if len(parts) != 2 or any(part is None for part in parts):
            return False
        differences.append(parts)
    from sympy import Expr

    if not all(isinstance(part, Expr) for parts in differences for part in parts):
        return bool(
            differences[0] and all(_verified(*pair) for pair in zip(differences[0], differences[1], strict=True))
        )
    one, other = (parts[0] - parts[1] for parts in differences)
    letters = sorted(one.free_symbols | other.free_symbols, key=lambda letter: str(letter.name))
    if one.free_symbols != other.free_symbols or not letters or len(letters) > len(_POINTS) - 2:
        return False
    factor = None
    for shift in range(4):
        point = {letter: _POINTS[(n + shift) % len(_POINTS)] for n, letter in enumerate(letters)}
        values = _value(one, point), _value(other, point)
        if values[0] is None or values[1] is None or values[0] == 0 or values[1] == 0:
            return False
        if factor is not None and not _close(factor, values[0] / values[1]):
            return False
        factor = values[0] / values[1]
    return True


@functools.lru_cache(maxsize=256)
def _parse(latex: str) -> Any:
    """Return a sympy object, or None when math-verify's parser makes nothing of the whole text."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify.parser import should_treat_as_complex
    from sympy import Basic, MatrixBase

    if _PROSE.search(latex) or _DOTS.search(latex):
        return None
    if "\\int" not in latex:
        latex = _DIFFERENTIAL.sub(lambda match: match[1] or "d*", latex)
    for pattern, replacement in _TYPED:
        latex = pattern.sub(replacement, latex)
    exact = _DECIMAL.sub(_as_fraction, latex)
    # Its rules for units would drop the last letter of a product, and those for operators guess.
    rules = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none", equations=False
    )
    try:
        found = latex2sympy(
            exact,
            is_real=not should_treat_as_complex(exact),
            normalization_config=rules,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # the parser raises Exception itself, and sympy anything at all
        return None
    return found if isinstance(found, (Basic, MatrixBase)) else None


def _one_constant(text: str) -> str:
    """Name the constant of an integral C, however it is called."""
    return _CONSTANT.sub(r"\1C", text)


def _as_fraction(match: re.Match[str]) -> str:
    whole, places = (match[1] or "0").replace(",", ""), match[2]
    return f"\\frac{{{int(whole + places)}}}{{{10 ** len(places)}}}"


def _equal_values(gold: Any, answer: Any) -> bool | None:
    """Compare by value at several points; None where that says nothing: equations, sets, matrices, unknown
    functions."""
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
    """Compare where letters are negative: sqrt(x^2) is |x| and not x. Complex values say nothing: letters under a root
    are meant to be positive."""
    for negative in letters:
        point = {
            letter: f"-{value}" if letter is negative else value
            for letter, value in zip(letters, _POINTS, strict=False)
        }
        if _has_root_of_negative(gold, point) or _has_root_of_negative(answer, point):
            continue
        values = _value(gold, point), _value(answer, point)
        both_real = all(value is not None and abs(value.imag) <= _CLOSE * abs(value) for value in values)
        if both_real and _close(*values) is False:
            return False
    return True


def _has_root_of_negative(expression: Any, point: dict[Any, str]) -> bool:
    from sympy import Pow

    roots = [power for power in expression.atoms(Pow) if power.exp.is_Rational and not power.exp.is_Integer]
    values = (_value(root.base, point) for root in roots)
    return any(value is None or value.imag != 0 or value.real < 0 for value in values)


def _value(expression: Any, point: dict[Any, str]) -> Any:
    """Return a complex mpmath number, or None when the expression has no finite value there."""
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
