"""Reads plain numbers as exact fractions: every way in which an answer writes one, without sympy."""

import re
from dataclasses import dataclass
from fractions import Fraction

# Above this a power of ten is not written out: 10^10^10 must not become a number.
_MAX_EXPONENT = 400
_MAX_CONTINUED = 60
# Programs print floating-point numbers with so many digits or more.
_FLOAT_DIGITS = 15
_DIGITS = (
    r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|[1-9]\d{0,2}(?:\\?_\d{3})+|[1-9]\d{0,2}(?:\.\d{3}){2,}|\d+)"
)
_DECIMAL = re.compile(rf"({_DIGITS})?(?:\.(\d*))?")
_WRITTEN = re.compile(
    rf"\(?[-+]? ?(?P<whole>{_DIGITS})?(?:\.(?P<places>\d*))?"
    r"(?: ?(?:\\times|\\cdot|×|\*|x) ?10 ?\^ ?\{? ?(?P<exponent>[-+]?\d+) ?\}?)?\)?"
)
_RECURRING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{?(\d+)\}?|\((\d+)\))")
_CONTINUED = re.compile(r"(\d*)\.(\d*?)(\d+?)\3{2,}\s*(?:\\[lc]?dots|\.\.\.|…)")
_FRACTION = re.compile(r"\\frac ?(?:\{ ?([-+]? ?\d+) ?\}|(\d)) ?(?:\{ ?([-+]? ?\d+) ?\}|(\d))")
_SLASH = re.compile(r"(\d+) ?/ ?(\d+)")
_MIXED = re.compile(r"(\d+) ?(?:(\\frac.+)|(?<= )(\d+ ?/ ?\d+))")
_SCIENTIFIC = re.compile(r"(.+?) ?(?:(?:\\times|\\cdot|×|\*|x) ?10 ?\^ ?\{? ?([-+]?\d+) ?\}?|[eE]([-+]?\d+))")
_POWER_OF_TEN = re.compile(r"10 ?\^ ?\{? ?([-+]?\d+) ?\}?")
_PERCENT = re.compile(r"(.+?) ?(?:\\?%|\\text ?\{ ?\\?(?:per ?cent|%|pct)(?:age)? ?\}|(?:per ?cent|pct)(?:age)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """Holds a number. value: exact, with the percent sign left out. is_percent: whether there was one.

    places: decimals as they are written, 0 for a plain integer; None for fractions, which are exact.
    digits: significant ones of a number with decimals, otherwise 0.
    """

    value: Fraction
    is_percent: bool = False
    places: int | None = None
    digits: int = 0


def read_number(text: str) -> Number | None:
    """Return the number that `text` (cleaned by `latex.clean`) is, or None when it is anything else.

    Integers, thousands separated by commas or spaces, decimals, recurring decimals, fractions, mixed numbers,
    scientific notation, percentages. A sum or product is not a number but an expression.
    """
    percent = _PERCENT.fullmatch(text)
    plain = (percent[1] if percent else text).strip()
    value = _signed(plain)
    if value is None:
        return None
    written = _WRITTEN.fullmatch(plain)
    if written is None:
        return Number(value=value, is_percent=bool(percent))
    places = len(written["places"] or "")
    digits = (re.sub(r"\D", "", written["whole"] or "") + (written["places"] or "")).lstrip("0")
    return Number(
        value=value,
        is_percent=bool(percent),
        places=places - int(written["exponent"] or 0),
        digits=len(digits) if places else 0,
    )


def equal_numbers(gold: Number, answer: Number) -> bool:
    """Tell whether two numbers are equal: 50 = 50% (the question says what is asked) and 0.5 = 50%, as graders have it;
    decimals count at face value."""
    if gold.value == answer.value:
        return True
    if gold.is_percent == answer.is_percent:
        return False
    percent, plain = (gold, answer) if gold.is_percent else (answer, gold)
    return percent.value == 100 * plain.value


def is_rounded(decimal: Number, exact: Fraction | float, from_digits: int) -> bool:
    """Tell whether `decimal`, of `from_digits` significant digits or more, is `exact` rounded or cut off where it ends.

    From 15 digits on as many count as floating-point arithmetic gets right, twelve.
    """
    if decimal.digits < from_digits or decimal.places is None:
        return False
    apart, size = abs(decimal.value - Fraction(exact)), abs(Fraction(exact))
    return apart < Fraction(10) ** -decimal.places or (decimal.digits >= _FLOAT_DIGITS and apart * 10**12 <= size)


def _signed(text: str) -> Fraction | None:
    text = text.strip()
    sign = 1
    while text[:1] in ("-", "+", "−"):
        sign, text = (sign if text[0] == "+" else -sign), text[1:].strip()
        if text[:1] in ("-", "+", "−"):  # --2 is a slip, not an answer
            return None
    value = _unsigned(_without_group(text))
    return None if value is None else sign * value


def _without_group(text: str) -> str:
    """Remove one pair of brackets around everything, as in (1/3) and {5}: it says nothing."""
    if text[:1] + text[-1:] in ("()", "{}") and not any(character in text[1:-1] for character in "(){},"):
        return text[1:-1].strip()
    return text


def _unsigned(text: str) -> Fraction | None:
    for read in (_decimal, _fraction, _mixed, _recurring, _scientific):
        value = read(text)
        if value is not None:
            return value
    return None


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if not match or not (match[1] or match[2]):
        return None
    whole = re.sub(r"\D", "", match[1] or "0")
    return Fraction(f"{whole}.{match[2]}") if match[2] else Fraction(whole)


def _fraction(text: str) -> Fraction | None:
    match = _FRACTION.fullmatch(text)
    if match:
        above, below = (re.sub(" ", "", part) for part in (match[1] or match[2], match[3] or match[4]))
    else:
        match = _SLASH.fullmatch(text)
        if not match:
            return None
        above, below = match[1], match[2]
    return Fraction(int(above), int(below)) if int(below) else None


def _mixed(text: str) -> Fraction | None:
    match = _MIXED.fullmatch(text)
    part = _fraction(match[2] or match[3]) if match else None
    # 2\frac{5}{3} is a product that somebody forgot to write, not two and five thirds.
    return None if match is None or part is None or not 0 < part < 1 else int(match[1]) + part


def _recurring(text: str) -> Fraction | None:
    match = _RECURRING.fullmatch(text)
    if match:
        whole, fixed, period = match[1], match[2], match[3] or match[4]
    else:
        # Only of few digits: the search for a period takes time in the cube of their number.
        match = _CONTINUED.fullmatch(text) if len(text) <= _MAX_CONTINUED else None
        if not match:
            return None
        whole, fixed, period = match[1], match[2], match[3]
    scale = 10 ** len(fixed)
    return Fraction(int(whole + fixed or "0"), scale) + Fraction(int(period), scale * (10 ** len(period) - 1))


def _scientific(text: str) -> Fraction | None:
    match = _SCIENTIFIC.fullmatch(text)
    if match:
        mantissa, exponent = _decimal(_without_group(match[1])), int(match[2] or match[3])
    else:
        match = _POWER_OF_TEN.fullmatch(text)
        if not match:
            return None
        mantissa, exponent = Fraction(1), int(match[1])
    if mantissa is None or abs(exponent) > _MAX_EXPONENT:
        return None
    return mantissa * Fraction(10) ** exponent
