"""Reads what an answer can mean. One reader serves reference answers and what a model says.

A text may mean more than one thing: `1,234` a number and a list, `(1,2)` a point and an interval, `A` a choice and a
letter. `meanings` gives all of them; `compare.py` says which pairs are the same. Nothing is computed here: reading
takes linear time, and runs on the sampler's event loop.
"""

import functools
import itertools
import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_rl.reward import latex
from megatron_rl.reward.number import Number, read_number
from megatron_rl.reward.region import Region, read_region
from megatron_rl.reward.statement import (
    Congruence,
    Family,
    Relation,
    read_congruence,
    read_family,
    read_relation,
)
from megatron_rl.reward.units import DEGREES, Unit, read_unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Holds words. text: in lower case, without articles and punctuation. also: other names, in brackets after it."""

    text: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Holds a choice. letter: A to J. text: what it stands for, where the answer says that too."""

    letter: str
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """Holds a single formula, without structure of its own."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """Holds a value and its unit of measurement. value: of a Number or an Expression. is_sure: the unit can be no
    factor, as `m` in `5 m` can."""

    value: str
    unit: Unit
    is_sure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Equation:
    """Holds an equation. sides: two of an equation, more of a chain."""

    sides: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaction:
    """Holds a chemical reaction. sides: before and after the arrow, each in alphabetical order and one spelling."""

    sides: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Holds a time of day. minutes: since midnight."""

    minutes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Holds several items. kind: "set" and "list" have no order; "tuple", "row", "column", "matrix" (of rows) do.

    brackets: those of a tuple, which tell open ends from closed ones where it is an interval.
    """

    kind: str
    items: tuple[str, ...]
    brackets: str = ""


Meaning = (
    Number | Words | Choice | Expression | Quantity | Equation | Ratio | Reaction | Clock | Items | Region
    | Family | Congruence | Relation
)  # fmt: skip

_MAX_WORDS_CHARACTERS = 400
_AND = (
    r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])"
    r"|\\(?:vee|lor|wedge|land)(?![a-zA-Z])|[和且]"
)
_LIST = re.compile(rf"\s*(?:[,;]\s*(?:{_AND})|[,;]|{_AND})\s*")
_GROUPED = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_COLUMNS = re.compile(r"\s*&\s*")
_ROWS = re.compile(r"\s*\\\\\s*")
EQUALS = re.compile(r"\s*(?<![<>!\\:])=(?!=)\s*")
_RATIO = re.compile(r"\s*:\s*")
_ARROW = re.compile(r"\s*\\to(?![a-zA-Z])\s*")
_PLUS = re.compile(r"\s+\+\s+|(?<=[\w)])\+(?=\d*[A-Z])")
_TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))?\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|doteq)(?![a-zA-Z])")
_MATRIX = re.compile(r"\\begin\s*\{([pbvVB]?matrix|array)\}(?:\s*\{[^{}]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_CASES = re.compile(
    r"(?:\\\{\s*\\begin\s*\{array\}(?:\s*\{[^{}]*\})?(.*)\\end\s*\{array\}|\\begin\s*\{d?cases\}(.*)\\end\s*\{d?cases\})",
    re.DOTALL,
)
_IF = re.compile(r"(?<![a-zA-Z])(?:if|when|for|is)(?![a-zA-Z])")
_IN = re.compile(r"^[a-zA-Z](?:_\w)?\s*\\in(?![a-zA-Z])\s*")
_TEXT = re.compile(r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# "The answer is" and the like, in front of an answer.
_LEAD = re.compile(
    r"(?:\\text\s*\{)?\s*(?:"
    r"(?:so |thus |hence )?(?:the |my )?(?:(?:final |correct |right )?answer|solution|option|choice|result)"
    r"(?:\s+is|\s*:|\s*=)?(?:\s*:)?"
    r"|there (?:is|are)|(?:the|its|their)(?:\s+[a-z]+){1,3}\s+(?:is|are|equals)|about|approximately"
    r"|it(?:'s| is| was| will be| equals)(?: an?| the)?|it(?= [a-z]+s\W*$)|(?:in|on|at|by|(?:in )?the year)(?= \d)"
    r"|the [a-z]+(?= (?:converges|diverges|increases|decreases|exists)\W*$)"
    r"(?![a-zA-Z])|答案[是为]?\s*:?|选项?)"
    r"\s*(?P<brace>\}\s*:?)?\s*(?P<rest>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_LABEL = re.compile(r"(?:\(\s*([A-Ja-j])\s*\)\s*|([A-J])(?:[.:)](?=\s|\}|$)|$)\s*|([a-j])[.)]?$)(.*)", re.DOTALL)
# (A)(B), A + 1, (A) or (B)
_NO_LABEL = re.compile(rf"[-+*/^=(,;]|\\(?:cup|cap|cdot|times)(?![a-zA-Z])|{_AND}")
_LETTERS = re.compile(r"[A-J]{2,8}")
_NUMBER_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20,
}  # fmt: skip
_PROSE = re.compile(r"[\w\s'\".,:;()/%&?!+-]*(?:[^\W\d_]{2}|[\u4e00-\u9fff])[\w\s'\".,:;()/%&?!+-]*")
_FORMULA = re.compile(r"(?:[A-Z][a-z]?|[\d().])+[+-]?")
# No product: IV is no VI, and a sequence such as ATG is no GTA.
_ORDERED = re.compile(r"[IVX]{2,}|[A-Z]{3,}|\d'\s*-?\s*[A-Z]+\s*-?\s*\d'")
_SPELLED_GREEK = re.compile(r"\\(alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|omega|Delta)(?![a-zA-Z])")
_MONTH = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_DAY_FIRST = re.compile(rf"^(\d{{1,2}})(?:st|nd|rd|th)?(?: of)? ((?:{_MONTH})[a-z]*)", re.IGNORECASE)
_ORDINALS = {
    "first": "1", "second": "2", "third": "3", "fourth": "4", "fifth": "5", "sixth": "6", "seventh": "7", "eighth": "8",
    "ninth": "9", "tenth": "10",
}  # fmt: skip
# Addresses and versions.
_DOTTED = re.compile(r"\d+(?:\.\d+){2,}")
_SAME_WORDS = {
    "no solutions": "no solution", "none": "no solution", "no real solution": "no solution",
    "\\emptyset": "no solution", "all reals": "all real numbers", "\\mathbb{R}": "all real numbers",
    "dne": "does not exist", "doe not exist": "does not exist", "doesn t exist": "does not exist",
    "\\infty": "infinity", "positive infinity": "infinity", "-\\infty": "negative infinity",
    "minus infinity": "negative infinity",
}  # fmt: skip
# Words that are no product of letters: a product that stands alone has no letter twice, as odd has.
_REPEATED = re.compile(r"(?=.*([a-zA-Z]).*\1)[a-zA-Z]{2,3}")
_LONG_WORD = re.compile(r"(?<![\\a-zA-Z])(?!(?:sqrt|arc[a-z]{3}|sinh|cosh|tanh)(?![a-zA-Z]))[a-zA-Z]{4,}")
# [1,2[ and ]1,2]: an open end faces away.
_FRENCH = re.compile(r"(?=\]|.*\[$)[\[\]]([^\[\]()]*,[^\[\]()]*)[\[\]]")
_MEMBERS = re.compile(
    r"(?:\\\{|\{(?=[^:]*\|))\s*[a-zA-Z](?:\s*\\in\s*\\mathbb\{R\})?\s*(?:\\mid|\||:)\s*(.*?)\s*\\?\}", re.DOTALL
)
_CURRENCY = re.compile(r"([-+]?)\s*(\\\$|[€£¥])\s*(\d.*)", re.DOTALL)
_UNIT_START = re.compile(
    r"\\text|\\frac\s*\{\s*\\text|\^\s*\\circ|\\mu|\\Omega|\\\$|\\pmod|[a-zA-ZµÅΩ$€£¥'\u4e00-\u9fff(]"
)
_VALUE_END = re.compile(r"(?:[\d})!]|\\pi|\\infty)\s*$")
_LETTER = re.compile(r"(?<![\\a-zA-Z])(?:[a-zA-Z])")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
# Behind a value, in brackets: x+3 (x \\ne 2)
_CONDITION = re.compile(r"(?<=[\w})])\s*\(([^()]*(?:[<>]|\\(?:ne|le|ge)(?![a-zA-Z]))[^()]*)\)$")
# 2\\pi hr: an hour, or two letters.
_MAY_BE_LETTERS = re.compile(r"\\pi\s*[a-zA-Z]{2}$")
_BASE = re.compile(r"(?P<value>[-+]?\d+)_\s*\{?\s*(?:\\text\s*\{)?(?P<base>\d{1,2}|[a-z]+)\}?\}?")
_VALUE, _NAME = r"\d{1,6}(?:\.\d{1,6})?", r"[a-zA-Z'\u4e00-\u9fff]+"
_PARTS = re.compile(rf"({_VALUE})\s*({_NAME})")
_PART_OF = re.compile(rf"{_VALUE}\s*{_NAME}(?:\s*{_VALUE}\s*{_NAME}){{1,2}}")
_MAX_UNIT_CHARACTERS = 60
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")


@functools.lru_cache(maxsize=4096)
def meanings(text: str) -> tuple[Meaning, ...]:
    """Return everything that `text`, cleaned by `latex.clean`, can mean. Empty for an empty text."""
    text = bare(text)
    if not text:
        return ()
    number = read_number(text)
    if number is None and text.lower() in _NUMBER_WORDS:
        number = Number(value=Fraction(_NUMBER_WORDS[text.lower()]), places=0)
    if number is not None:
        may_be_list = "," in text and not re.search(r",0", text)
        return (number, *([Items(kind="list", items=tuple(text.split(",")))] if may_be_list else []))
    return tuple(_structured(text))


def bare(text: str) -> str:
    """Return the text without what says nothing: braces and brackets around a single answer, `\\text`, "the answer is",
    `x \\in`, an approximation after an exact value."""
    for _ in range(8):
        before = text
        text = text.strip()
        if (latex.is_one_bracket(text, "{", "}") and not _MEMBERS.fullmatch(text)) or _is_one_group(text):
            text = text[1:-1].strip()
        whole = _TEXT.fullmatch(text)
        text = whole[1].strip() if whole else text
        text = text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == '"' else text
        lead = _LEAD.fullmatch(text) if len(text) <= _MAX_WORDS_CHARACTERS else None
        if (lead and lead["brace"] is not None and text.lstrip().startswith("\\text")) or (
            lead and lead["brace"] is None and not text.lstrip().startswith("\\text")
        ):
            text = lead["rest"]
        french = _FRENCH.fullmatch(text)
        text = ("(" if text[0] == "]" else "[") + french[1] + ("]" if text[-1] == "]" else ")") if french else text
        member = _IN.match(text)
        text = text[member.end() :] if member else text
        text = _exact_part(text)
        if text == before:
            break
    return text


def _is_one_group(text: str) -> bool:
    """Tell whether one value is in brackets: (5) and [5], but no list and no choice."""
    if not latex.is_one_bracket(text, "([", ")]") or (text[0] == "(") != (text[-1] == ")"):
        return False
    inside = text[1:-1].strip()
    return bool(inside) and not _LIST.search(inside) and not re.fullmatch(r"[A-Ja-j]", inside)


def _exact_part(text: str) -> str:
    first, *rest = _APPROXIMATELY.split(text, maxsplit=1)
    if not rest:
        return text
    exact = first.strip()
    return rest[0].strip() if not exact or is_name(exact) else exact


def _structured(text: str) -> list[Meaning]:
    statement = _reaction(text) or read_family(text) or read_congruence(text) or read_relation(text)
    if statement is not None:
        return [statement]
    text = _CONDITION.sub(r", \1", text)
    found: list[Meaning] = [*_words(text), *_choices(text), *_clock(text)]
    region = read_region(members[1] if (members := _MEMBERS.fullmatch(text)) else text)
    if region is not None:
        found.append(region)
    plain = latex.without_text_marks(text) if not re.search(r"[\\^_{}]", latex.without_text_marks(text)) else text
    if _MATRIX.search(text) is None:
        items = _separated(text)
        if len(items) > 1:
            return [*found, Items(kind="list", items=tuple(items))]
    sides = latex.split_top(text, EQUALS)
    if len(sides) > 1 and all(sides):
        return [*found, Equation(sides=tuple(sides))]
    parts = latex.split_top(text, _RATIO)
    if len(parts) > 1 and all(parts) and not members:
        found.append(Ratio(parts=tuple(parts)))
        return found
    items_of = _bracketed(text) or _matrix(text)
    if items_of is not None:
        return [*found, items_of, *([Expression(text=text)] if items_of.kind not in ("tuple",) else [])]
    if "\\pm" in text or "\\mp" in text:
        return [*found, Items(kind="list", items=_both_signs(text))]
    quantity = read_quantity(text)
    if quantity is not None:
        found.append(quantity)
        if quantity.is_sure and not _MAY_BE_LETTERS.search(text):
            return found
    has_words = any(isinstance(meaning, Words) for meaning in found)
    if not (
        has_words
        and (
            _DOTTED.fullmatch(text)
            or _ORDERED.fullmatch(plain)
            or _LONG_WORD.search(plain)
            or _REPEATED.fullmatch(plain)
            or not text.isascii()
        )
    ):
        found.append(Expression(text=text))
    return found


def _separated(text: str) -> list[str]:
    """Return the items of a list. Commas that group the digits of a number stay: 621,200 mg."""
    grouped = _GROUPED.sub(lambda match: match[0].replace(",", "\0"), text)
    return [part.replace("\0", ",") for part in latex.split_top(grouped, _LIST) if part]


def _bracketed(text: str) -> Items | None:
    is_set = text.startswith("\\{") and text.endswith("\\}")
    if is_set and len(latex.split_top(text[2:-2], re.compile(r"\\\}"))) == 1:
        return Items(kind="set", items=tuple(_elements(text[2:-2])))
    if latex.is_one_bracket(text, "([{", ")]}"):
        items = tuple(_elements(text[1:-1]))
        if len(items) > 1:
            return Items(kind="tuple", items=items, brackets=text[0] + text[-1])
    return None


def _elements(inside: str) -> list[str]:
    """Return the elements of a bracket. There a comma separates; only before 0, as in (1,000, 2), it groups the digits
    of a number."""
    grouped = re.sub(r"(?<=\d),(?=0\d\d(?!\d))", "\0", inside)
    grouped = re.sub(r"(?<![\d\0])0\0", "0,", grouped)
    return [part.replace("\0", ",") for part in latex.split_top(grouped, _LIST) if part]


def _reaction(text: str) -> Reaction | None:
    """Read a chemical reaction: 2H_2 + O_2 \\to 2H_2O; no function, as f: A \\to B."""
    sides = _ARROW.split(re.sub(r"[_{}^]|(?<=\d)\s+(?=[A-Z])", "", latex.without_text_marks(text)))
    if len(sides) != 2 or not all(re.match(r"[\d.]*\s*[A-Z(]", side) for side in sides):
        return None
    return Reaction(sides=tuple(tuple(sorted(re.sub(r"\s", "", one) for one in _PLUS.split(side))) for side in sides))


def _clock(text: str) -> list[Clock]:
    """Read a time of day: 3:00 PM, 3 p.m. and 15:00."""
    time = _TIME.fullmatch(latex.without_text_marks(text))
    if time is None or not (time[2] or time[3]):
        return []
    hours = int(time[1])
    if hours > (12 if time[3] else 23):
        return []
    hours = hours % 12 + 12 * (time[3].lower() == "p") if time[3] else hours
    return [Clock(minutes=60 * hours + int(time[2] or 0))]


def _matrix(text: str) -> Items | None:
    cases = _CASES.fullmatch(text)
    if cases:
        return _cases(cases[1] or cases[2])
    matrix = _MATRIX.fullmatch(text.strip("[]() ") if text.startswith(("[\\begin", "(\\begin")) else text)
    if not matrix or "\\begin" in matrix[2]:
        return None
    rows = [row for row in latex.split_top(matrix[2].strip(), _ROWS) if row and row != "\\hline"]
    cells = [latex.split_top(row, _COLUMNS) for row in rows]
    if len(cells) == 1 or all(len(row) == 1 for row in cells):
        return Items(kind="column" if len(cells) > 1 else "row", items=tuple(cell for row in cells for cell in row))
    return Items(kind="matrix", items=tuple(f"({','.join(row)})" for row in cells))


def _cases(inside: str) -> Items:
    """Return the rows of a piecewise function, (value, condition) each, or the equations of a system, in any order."""
    rows = [re.sub(r"\s*,?\s*&\s*", ", ", row).strip(" ,.;") for row in latex.split_top(inside.strip(), _ROWS)]
    pieces = [
        latex.split_top(_IF.sub("", latex.without_text_marks(row)), re.compile(r"\s*,\s*")) for row in rows if row
    ]
    items = (f"({', '.join(parts)})" if len(parts) == 2 else ", ".join(parts) for parts in pieces)
    return Items(kind="list", items=tuple(items))


def _both_signs(text: str) -> tuple[str, ...]:
    upper = text.replace("\\pm", "+").replace("\\mp", "-")
    lower = text.replace("\\pm", "-").replace("\\mp", "+")
    return tuple(sign.strip().removeprefix("+").strip() for sign in (upper, lower))


def is_name(text: str) -> bool:
    """Tell whether this names something that is computed and is no expression: x, f(2), a_{37}, A:B, (p,q,r),
    \\frac{NO}{BO}, P(A), |S|."""
    text = re.sub(r"\^\s*\{?\s*-1\s*\}?\s*(?=\()", "", text)  # f^{-1}(x)
    unmarked = re.sub(r"_\s*(?:\{[^{}]*\}|\w)|(?<=[a-zA-Z])\([^()]*\)", "", latex.without_text_marks(text))
    return bool(re.search(r"[a-zA-Z]", unmarked)) and not re.search(
        r"[-+*^\d!]|\\(?:cdot|times|sqrt|int|sum|prod|lim|infty|pi|sin|cos|tan|log|ln|binom)", unmarked
    )


def _words(text: str) -> list[Words]:
    plain = latex.without_text_marks(text).strip()
    same = _SAME_WORDS.get(text) or _SAME_WORDS.get(plain.lower())
    if same:
        return [Words(text=same)]
    if len(plain) > _MAX_WORDS_CHARACTERS:
        return []
    formula = re.sub(r"[_{}^ ]|\\text", "", plain.replace("\\cdot", "."))
    found = []
    if _FORMULA.fullmatch(formula) and re.search(r"[a-z\d+]|[A-Z]{2}", formula) and re.search(r"[A-Z]", formula):
        found.append(Words(text=formula))  # as it stands: Co is no CO
    if _DOTTED.fullmatch(plain):
        return [Words(text=plain)]
    if _ORDERED.fullmatch(plain):
        return [Words(text=_plain_words(plain))]
    if re.search(r"[a-zA-Z]{4}", _COMMAND.sub("", plain)):
        plain = _SPELLED_GREEK.sub(r"\1", plain)
    if not _PROSE.fullmatch(plain):
        return found
    if re.fullmatch(r"[^\W\d_]{2}", plain) and plain.lower() not in ("no", "ok"):
        return [Words(text=plain)]
    named = re.fullmatch(r"(.+?)\s*\(([^()]+)\)", plain)
    return [*found, Words(text=_plain_words(plain), also=tuple(map(_plain_words, named.groups())) if named else ())]


def _plain_words(text: str) -> str:
    """Return words in lower case, without quotes, commas, brackets, articles, the end of a sentence or of a plural."""
    text = _DAY_FIRST.sub(r"\2 \1", re.sub(r"(?<=[\u4e00-\u9fff])[为是](?=\s*[-+\d])", "", text))
    words = re.sub(r"[\s\"',;()?!~]+|(?<=[a-z])-(?=[a-z])|-(?= )|\.(?=\s|$)", " ", text.lower()).split()
    # (D)(A) has no article
    articles = ("a", "an", "the") if any(len(word) > 2 for word in words) else ()
    ordinals = (re.sub(r"^(\d+)(?:st|nd|rd|th)$", r"\1", _ORDINALS.get(word, word)) for word in words)
    kept = [_singular(word) for word in ordinals if word not in articles]
    plain = " ".join(kept or words)
    return _SAME_WORDS.get(plain, plain)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _choices(text: str) -> list[Meaning]:
    plain = text
    lettered = re.match(r"\\text\s*\{\s*(\(?[A-Ja-j]\)?[.:)]?)\s*\}\s*(.*)", text, re.DOTALL)
    if lettered:
        plain = f"{lettered[1]} {lettered[2]}".strip()
    match = _LABEL.fullmatch(plain)
    if match and not _NO_LABEL.match(match[4].strip()):
        letter = match[1] or match[2] or match[3]
        return [Choice(letter=letter.upper(), text=match[4].strip())] if letter.isupper() or not match[4] else []
    if _LETTERS.fullmatch(plain) and list(plain) == sorted(set(plain)):
        return [Items(kind="list", items=tuple(plain))]
    return []


def read_quantity(text: str) -> Quantity | None:
    """Return `text` as a value with a unit, or None. The base of a numeral (204_5) counts as its unit."""
    base = _BASE.fullmatch(text)
    if base:
        return Quantity(value=base["value"], unit=Unit(noun="base " + base["base"]), is_sure=True)
    priced = _CURRENCY.fullmatch(text)
    if priced:
        rest = read_quantity(priced[3])
        unit = read_unit(priced[2])
        count_only = rest is not None and not rest.unit.noun and not rest.unit.powers
        if unit is not None and rest is not None and (count_only or rest.unit.powers == unit.powers):
            unit = rest.unit if rest.unit.powers else Unit(powers=unit.powers, count=rest.unit.count)
        if unit is not None and (rest is None or rest.unit.is_known or count_only or rest.unit.noun):
            return Quantity(value=priced[1] + (rest.value if rest else priced[3]), unit=unit, is_sure=True)
    several = _several(text)
    if several is not None:
        return several
    for match in _UNIT_START.finditer(text, max(0, len(text) - _MAX_UNIT_CHARACTERS)):
        value, suffix = text[: match.start()], text[match.start() :]
        is_marked = suffix.startswith(("\\text", "\\frac", "^", "\\$", "\\p", "(")) or not suffix[0].isascii()
        ends = _VALUE_END.search(value) or (suffix.startswith("\\text") and re.search(r"[a-zA-Z]\s*$", value))
        if not ends or not _is_closed(value):
            continue
        unit = read_unit(suffix)
        if unit is None or (unit.powers == DEGREES and _FUNCTION.search(value)):
            continue
        if suffix[0] == "(" and not unit.noun.startswith("mod"):  # (A)(B)
            continue
        has_letters = read_number(value.strip()) is None and bool(_LETTER.search(_COMMAND.sub("", value)))
        if has_letters and not (is_marked and unit.is_known):
            return None
        spaced = value != value.rstrip()
        if unit.noun and not is_marked and len(unit.noun) < 4 and suffix.lower() not in ("am", "pm"):
            continue  # 2abc
        is_sure = is_marked or (not unit.is_letter and not _may_be_product(suffix, spaced))
        if unit.powers == DEGREES:
            value = value.replace("^\\circ", "")  # 180° - 150°
        return Quantity(value=value.strip(), unit=unit, is_sure=is_sure)
    return None


def _several(text: str) -> Quantity | None:
    """Read several parts, 2 hours 30 minutes or 5 ft 3 in, as one value in the last unit; None where the units do not
    become smaller."""
    plain = latex.without_text_marks(text)
    parts = [(Fraction(value), read_unit(unit)) for value, unit in _PARTS.findall(plain)]
    units = [unit for _, unit in parts if unit is not None and unit.is_known]
    if not _PART_OF.fullmatch(plain) or len(units) != len(parts) or len({unit.powers for unit in units}) != 1:
        return None
    if any(one.scale <= other.scale for one, other in itertools.pairwise(units)) or units[0].offset:
        return None
    total = sum(value * unit.scale for value, unit in parts if unit is not None) / units[-1].scale
    return Quantity(value=f"\\frac{{{total.numerator}}}{{{total.denominator}}}", unit=units[-1], is_sure=True)


def _may_be_product(suffix: str, spaced: bool) -> bool:
    """Tell whether the suffix may be a factor, as in m^2 and 3 ab: single letters with a power. m/s, N m behind a
    space, and cm may not."""
    return not re.search(r"[a-zA-Z]{2}", suffix) and not (spaced and re.search(r"[/ ]|\\cdot|\^\{?-", suffix.strip()))


def _is_closed(value: str) -> bool:
    return all(value.count(opening) == value.count(closing) for opening, closing in ("()", "[]", "{}"))
