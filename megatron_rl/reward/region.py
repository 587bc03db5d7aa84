"""Reads sets of real numbers as intervals, inequalities, or unions of them: `x<-1 or x>1` is (-oo,-1) u (1,oo)."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rl.reward import latex
from megatron_rl.reward.number import read_number

_UNION = re.compile(r"\s*(?:\\cup|\\text\s*\{\s*or\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|\\(?:vee|lor)(?![a-zA-Z]))\s*")
# "and", and a comma before what is left out: x > -1, x \\ne 0
_ALSO = re.compile(
    r"\s*(?:\\text\s*\{\s*and\s*\}|(?<![a-zA-Z\\])and(?![a-zA-Z])|\\(?:wedge|land)(?![a-zA-Z])|且"
    r"|,(?=\s*\\?[a-zA-Z]+\s*\\ne(?![a-zA-Z])))\s*"
)
_COMMA = re.compile(r"\s*,\s*")
_RELATION = re.compile(r"\s*(<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z]))\s*")
_VARIABLE = re.compile(r"[a-zA-Z](?:_\{?\w\}?)?|[a-z]\([a-z]\)|\\(?:theta|alpha|lambda)")
_MEMBER = re.compile(r"^[a-zA-Z]\s*\\in(?![a-zA-Z])\s*")
_REALS = ("\\mathbb{R}", "all real numbers", "all reals", "\\text{all real numbers}")
_LOW, _HIGH = "-\\infty", "\\infty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Holds the numbers from `low` to `high`, both LaTeX. The closed ends belong to it; a point has equal, closed
    ends."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Holds a union of intervals. variable: of inequalities, which says more than an interval does; None without."""

    intervals: tuple[Interval, ...]
    variable: str | None


def read_region(text: str) -> Region | None:
    """Return the set of numbers that `text` (cleaned by `latex.clean`) describes, or None when it is something else."""
    text = _MEMBER.sub("", text)
    if text in _REALS:
        return Region(intervals=(_interval(_LOW, _HIGH, False, False),), variable=None)
    intervals: list[Interval] = []
    variables: set[str] = set()
    for part in latex.split_top(text, _UNION):
        piece: list[Interval] | None = None
        for condition in latex.split_top(part, _ALSO):
            found = _bracketed(condition) or _points(condition) or _inequality(condition, variables)
            if found is None or (piece is not None and not _are_known([*piece, *found])):
                return None
            piece = found if piece is None else _intersection(piece, found)
        intervals += piece or []
    if len(variables) > 1:
        return None
    return Region(intervals=tuple(intervals), variable=next(iter(variables), None))


def same_region(gold: Region, answer: Region, same: Callable[[str, str], bool]) -> bool:
    """Compare interval by interval, in any order. same: tells whether two end points are equal."""
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return False
    golds, left = merged(gold.intervals), list(merged(answer.intervals))
    if len(golds) != len(left):
        return False
    for interval in golds:
        match = next((other for other in left if _same_interval(interval, other, same)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _intersection(some: list[Interval], others: list[Interval]) -> list[Interval]:
    """Intersect two unions of intervals between plain numbers."""
    common = []
    for one, other in itertools.product(some, others):
        # An open end lies further in than a closed one.
        low = max(one, other, key=lambda i: (_known(i.low), not i.low_closed))
        high = min(one, other, key=lambda i: (_known(i.high), i.high_closed))
        ends = _known(low.low), _known(high.high)
        if ends[0] < ends[1] or (ends[0] == ends[1] and low.low_closed and high.high_closed):
            common.append(_interval(low.low, high.high, low.low_closed, high.high_closed))
    return common


def _are_known(intervals: list[Interval]) -> bool:
    return all(_position(end) is not None for i in intervals for end in (i.low, i.high))


def merged(intervals: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """Return the same set without intervals that touch or overlap, where all ends are plain numbers."""
    if not _are_known(list(intervals)):
        return intervals
    done: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: (_known(i.low), not i.low_closed)):
        last = done[-1] if done else None
        if last is None or not _touch(last, interval):
            done.append(interval)
            continue
        low, high = _known(last.high), _known(interval.high)
        further = interval if high > low else last
        closed = further.high_closed if high != low else last.high_closed or interval.high_closed
        done[-1] = _interval(last.low, further.high, last.low_closed, closed)
    return tuple(done)


def _touch(first: Interval, second: Interval) -> bool:
    end, start = _known(first.high), _known(second.low)
    return start < end or (start == end and (first.high_closed or second.low_closed))


def _position(end: str) -> float | None:
    if end in (_LOW, _HIGH):
        return float("-inf" if end == _LOW else "inf")
    number = read_number(end)
    # Beyond a float's range nothing is merged, and ends are compared one by one.
    return float(number.value) if number and abs(number.value) < 10**15 else None


def _known(end: str) -> float:
    position = _position(end)
    assert position is not None, f"{end} is no number"
    return position


def _same_interval(gold: Interval, answer: Interval, same: Callable[[str, str], bool]) -> bool:
    closed = (gold.low_closed, gold.high_closed) == (answer.low_closed, answer.high_closed)
    return closed and same(gold.low, answer.low) and same(gold.high, answer.high)


def _interval(low: str, high: str, low_closed: bool, high_closed: bool) -> Interval:
    return Interval(low=low, high=high, low_closed=low_closed, high_closed=high_closed)


def _bracketed(part: str) -> list[Interval] | None:
    if not latex.is_one_bracket(part, "([", ")]"):
        return None
    ends = latex.split_top(part[1:-1], _COMMA)
    if len(ends) != 2:
        return None
    return [_interval(ends[0], ends[1], part[0] == "[", part[-1] == "]")]


def _points(part: str) -> list[Interval] | None:
    if not (part.startswith("\\{") and part.endswith("\\}")):
        return None
    return [_interval(point, point, True, True) for point in latex.split_top(part[2:-2], _COMMA) if point]


def _inequality(part: str, variables: set[str]) -> list[Interval] | None:
    """Read `a < x \\le b`, `x > a`, `x \\ne a`, either way around. Only with the variable alone on its side."""
    signs = _RELATION.findall(part)
    terms = latex.split_top(part, _RELATION)
    if not 1 <= len(signs) <= 2 or len(terms) != len(signs) + 1:
        return None
    if len(signs) == 2:
        return _chain(terms, signs, variables)
    (left, right), sign = terms, signs[0]
    if not _VARIABLE.fullmatch(left):
        left, right, sign = right, left, _FLIPPED[sign]
    if not _VARIABLE.fullmatch(left) or not right:
        return None
    variables.add(left)
    if sign == "\\ne":
        return [_interval(_LOW, right, False, False), _interval(right, _HIGH, False, False)]
    if sign in ("<", "\\le"):
        return [_interval(_LOW, right, False, sign == "\\le")]
    return [_interval(right, _HIGH, sign == "\\ge", False)]


_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}


def _chain(terms: list[str], signs: list[str], variables: set[str]) -> list[Interval] | None:
    low, variable, high = terms
    if signs[0] in (">", "\\ge") and signs[1] in (">", "\\ge"):
        low, high, signs = high, low, [_FLIPPED[sign] for sign in reversed(signs)]
    if not _VARIABLE.fullmatch(variable) or not all(sign in ("<", "\\le") for sign in signs):
        return None
    variables.add(variable)
    # Bounds at infinity are open however they are written.
    return [_interval(low, high, signs[0] == "\\le" and low != _LOW, signs[1] == "\\le" and high != _HIGH)]
