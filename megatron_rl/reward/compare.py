"""Tells whether two answers say the same, by what each of them can mean (`meaning.py`), pair of types by pair of types.

The rules are those of somebody who grades, docs/rewards.md lists them. Numbers and formulas are compared by what the
caller brings, so that mathematics and science differ in that alone.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from megatron_rl.reward import latex
from megatron_rl.reward.meaning import (
    EQUALS,
    Choice,
    Clock,
    Equation,
    Expression,
    Items,
    Meaning,
    Quantity,
    Ratio,
    Reaction,
    Words,
    bare,
    is_name,
    meanings,
    read_quantity,
)
from megatron_rl.reward.number import Number, read_number
from megatron_rl.reward.region import Region, same_region
from megatron_rl.reward.statement import (
    Congruence,
    Family,
    Relation,
    constants_renamed,
    same_domain,
    with_letter,
)
from megatron_rl.reward.units import DEGREES, RADIANS, same_dimension

Kind = TypeVar("Kind", Choice, Quantity, Number)

_MAX_DEPTH = 8
# Finds what stands for something unknown: a letter, \theta, \text{Area}; but not \pi, \sin or \frac.
_LETTER = re.compile(
    r"(?<![a-zA-Z\\])[a-zA-Z]|\\(?:theta|alpha|beta|gamma|delta|phi|varphi|lambda|mu|omega|text)(?![a-zA-Z])"
)
# 2,74 for 2.74, where the gold answer leaves no doubt that it is one number.
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,(?!\d{3}$)\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Says how numbers and formulas are compared.

    numbers: (gold, answer, whether the answer was converted to the gold one's unit) -> are they the same?
    formulas: (gold, answer) -> the same of two formulas, equations or numbers in LaTeX. May not return, see `limits`.
    letters_are_units: a letter behind a number is a unit, as in science, and not a factor.
    truth: yes, true and correct are one word.
    """

    numbers: Callable[[Number, Number, bool], bool]
    formulas: Callable[[str, str], bool]
    letters_are_units: bool = False
    truth: bool = False


def same_answer(gold: str, answer: str, rules: Rules, depth: int = 0) -> bool:
    """Tell whether two answers, cleaned by `latex.clean`, say the same. This is not symmetric: what is missing in the
    answer may be said only in the gold one."""
    gold, answer = bare(gold), bare(answer)
    if latex.squeeze(gold) == latex.squeeze(answer):
        return bool(answer)
    if not gold or not answer or depth > _MAX_DEPTH:
        return False
    pair = _Pair(gold=gold, answer=answer, rules=rules, depth=depth)
    choices = _first(gold, Choice), _first(answer, Choice)
    if choices[0] and choices[1]:
        return pair.same(choices[0], choices[1])  # (C) 12 is no (B) 12
    quantities = _first(gold, Quantity), _first(answer, Quantity)
    if quantities[0] and quantities[1] and (rules.letters_are_units or quantities[0].is_sure or quantities[1].is_sure):
        return pair.same(quantities[0], quantities[1])  # 5 m is no product beside 5 cm
    return any(pair.same(one, other) for one in meanings(gold) for other in meanings(answer)) or pair.same_formula()


def _first(text: str, kind: type[Kind]) -> Kind | None:
    return next((meaning for meaning in meanings(text) if isinstance(meaning, kind)), None)


def same_at_once(gold: str, answer: str, rules: Rules) -> bool | None:
    """Return what `same_answer` does for plain numbers, words and letters of choices; None where a formula has to be
    computed."""
    letters = _first(gold, Choice), _first(answer, Choice)
    if letters[0] and letters[1] and not (letters[0].text and letters[1].text):
        return letters[0].letter == letters[1].letter
    readings = meanings(gold), meanings(answer)
    if all(readings) and all(map(_is_plain, readings[0] + readings[1])):
        return same_answer(gold, answer, rules)
    numbers = _first(gold, Number), _first(answer, Number)
    if numbers[0] and numbers[1] and min(map(len, readings)) == 1:  # 1,234 could be a list, 1234 could not
        return rules.numbers(numbers[0], numbers[1], False)
    return None


def _is_plain(meaning: Meaning) -> bool:
    if isinstance(meaning, Quantity):
        return meaning.is_sure and read_number(meaning.value) is not None
    return isinstance(meaning, (Number, Words)) or (isinstance(meaning, Choice) and not meaning.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    gold: str
    answer: str
    rules: Rules
    depth: int

    def inner(self, gold: str, answer: str) -> bool:
        return same_answer(gold, answer, self.rules, self.depth + 1)

    def same(self, gold: Meaning, answer: Meaning) -> bool:
        match gold, answer:
            case Number(), Number():
                return self.rules.numbers(gold, answer, False)
            case Words(), Words():
                return self._same_words(gold, answer)
            case Choice(), Choice():
                both_say_more = bool(gold.text and answer.text)
                return gold.letter == answer.letter and (not both_say_more or self.inner(gold.text, answer.text))
            case Choice(), _:
                return bool(gold.text) and self.inner(gold.text, self.answer)
            case _, Choice():
                return bool(answer.text) and self.inner(self.gold, answer.text)
            case Quantity(), Quantity():
                return self._same_quantity(gold, answer)
            case Quantity(), Number() | Expression():
                return (
                    self._may_lack(gold, answer)
                    and not gold.unit.noun.startswith("mod")
                    and self._same_value(gold, None)
                )
            case Number() | Expression(), Quantity():
                return self._may_lack(answer, gold) and self._same_value(None, answer)
            case (Clock(), Clock()) | (Reaction(), Reaction()):
                return gold == answer
            case Family(), Family():
                return self._same_family(gold, answer)
            case Family(), _:
                return self.inner(gold.value, self.answer)
            case _, Family():
                return self.inner(self.gold, answer.value)
            case Congruence(), Congruence():
                same_modulus = gold.modulus == answer.modulus and (gold.right - answer.right) % gold.modulus == 0
                return same_modulus and self.inner(gold.left, answer.left)
            case Relation(), Relation():
                both_ways = answer.sides, answer.sides[::-1]
                return gold.name == answer.name and any(self._all_same(gold.sides, sides) for sides in both_ways)
            case Region(), Region():
                return same_region(gold, answer, self.inner)
            case Equation(), Equation():
                return self._same_equation(gold, answer)
            case Equation(), _:
                said = _named(gold) or (None if any(map(_has_letters, gold.sides)) else ("", gold.sides[-1]))
                return said is not None and self.inner(said[1], self.answer)
            case _, Equation():
                return self._ends_in(answer)
            case (Items() | Ratio(), _) | (_, Items() | Ratio()):
                return self._same_parts(gold, answer)
        return False

    def _same_parts(self, gold: Meaning, answer: Meaning) -> bool:
        """Compare lists, sets, tuples, matrices and ratios, with each other and with a single value."""
        match gold, answer:
            case Items(), Items():
                return self._same_items(gold, answer)
            case Number(), Items(kind="list") if _DECIMAL_COMMA.fullmatch(self.answer):
                return "." in self.gold and self.inner(self.gold, self.answer.replace(",", "."))
            case Items(), _:
                # one value in a set, or one that is written twice
                alike = gold.kind == "list" and not isinstance(answer, Words)
                return (alike or _is_single(gold)) and all(self.inner(item, self.answer) for item in gold.items)
            case _, Items():
                alike = answer.kind == "list" and not isinstance(gold, Words)
                return (alike or _is_single(answer)) and all(self.inner(self.gold, item) for item in answer.items)
            case Ratio(), Ratio():
                return self._all_same(gold.parts, answer.parts)
            case Ratio(parts=(one, other)), Number() | Expression():
                return self.inner(f"\\frac{{{one}}}{{{other}}}", self.answer)
        return False

    def same_formula(self) -> bool:
        """Compare by formula, where each side can be a number or formula, and at least one is a formula."""
        if "\\infty" in (self.gold.lstrip("-"), self.answer.lstrip("-")):
            return False  # one more infinity is infinity to sympy, but no answer
        kinds = [{type(meaning) for meaning in meanings(text)} for text in (self.gold, self.answer)]
        if ({Expression} & kinds[0] and {Expression, Number} & kinds[1]) or (
            {Number} & kinds[0] and {Expression} & kinds[1]
        ):
            return self._formulas(_ungrouped(self.gold), _ungrouped(self.answer))
        sets = re.compile(r"\\(?:setminus|cup|cap|mathbb|mid)(?![a-zA-Z])|[<>]|\\(?:le|ge|ne)(?![a-zA-Z])")
        return bool(sets.search(self.gold) and sets.search(self.answer)) and self._formulas(self.gold, self.answer)

    def _formulas(self, gold: str, answer: str) -> bool:
        if _points(gold) != _points(answer):
            return False
        return self.rules.formulas(gold, answer) or any(
            self.rules.formulas(gold, renamed) for renamed in constants_renamed(gold, answer)
        )

    def _same_words(self, gold: Words, answer: Words) -> bool:
        names = (gold.text, *gold.also)
        if self.rules.truth and _TRUTH.get(gold.text) is not None:
            return _TRUTH[gold.text] is _TRUTH.get(answer.text)
        return answer.text in names or answer.text.replace(" ", "") in (name.replace(" ", "") for name in names)

    def _may_lack(self, quantity: Quantity, other: Number | Expression) -> bool:
        """Tell whether the other side may leave the unit out."""
        if isinstance(other, Number) and other.is_percent:
            return False
        return quantity.is_sure or self.rules.letters_are_units

    def _same_family(self, gold: Family, answer: Family) -> bool:
        """Tell whether it is the same formula in another letter. Over all integers it may start elsewhere, or count
        down."""
        if not same_domain(gold.domain, answer.domain):
            return False
        starts = ("{}", "({}+1)", "({}-1)", "(-{})", "(1-{})", "(-1-{})") if gold.domain == "Z" else ("{}",)
        return any(
            self.inner(gold.value, with_letter(answer.value, answer.letter, start.format(gold.letter)))
            for start in starts
        )

    def _same_angle(self, degrees: Quantity, other: str) -> bool:
        return "\\pi" in other and self.inner(f"\\frac{{({degrees.value}) \\pi}}{{180}}", other)

    def _same_quantity(self, gold: Quantity, answer: Quantity) -> bool:
        powers = gold.unit.powers, answer.unit.powers
        if powers == (DEGREES, RADIANS):
            return self._same_angle(gold, answer.value)
        if powers == (RADIANS, DEGREES):
            return self._same_angle(answer, gold.value)
        if not same_dimension(gold.unit, answer.unit) and _counts(gold) and _counts(answer):
            return False
        if gold.unit.noun.startswith("base") and answer.unit.noun.startswith("base") and gold.unit != answer.unit:
            return False
        return self._same_value(gold, answer)

    def _same_value(self, gold: Quantity | None, answer: Quantity | None) -> bool:
        """Compare values in units that can be converted, or of one that has none."""
        values = [side.value if side else text for side, text in ((gold, self.gold), (answer, self.answer))]
        counts = [side.unit.count if side else Fraction(1) for side in (gold, answer)]
        by, shift = counts[1] / counts[0], Fraction(0)
        if gold and answer and gold.unit.is_known and answer.unit.is_known:
            by *= answer.unit.scale / gold.unit.scale
            shift = (answer.unit.offset - gold.unit.offset) / gold.unit.scale
        numbers = read_number(values[0]), read_number(values[1])
        converted = (by, shift) != (counts[1] / counts[0], 0)
        if numbers[0] and numbers[1] and not (numbers[0].is_percent or numbers[1].is_percent):
            if converted and numbers[0].value == numbers[1].value != 0:
                return False  # 5 bar for 5 atm: near, but not converted
            moved = numbers[1] if (by, shift) == (1, 0) else Number(value=numbers[1].value * by + shift)
            return self.rules.numbers(numbers[0], moved, converted)
        if shift:
            return False
        factor = f"\\frac{{{by.numerator}}}{{{by.denominator}}}"
        return self.inner(values[0], values[1] if by == 1 else f"({values[1]}) \\cdot {factor}")

    def _same_items(self, gold: Items, answer: Items) -> bool:
        unordered = {"set", "list"}
        kinds = {gold.kind, answer.kind}
        if kinds <= unordered:
            if _are_named(gold.items) != _are_named(answer.items):
                plain = _without_indices(gold.items), _without_indices(answer.items)
                values_of_one = (*gold.items, *answer.items) != (*plain[0], *plain[1])
                return self._all_same(gold.items, answer.items) or (values_of_one and self._same_elements(*plain))
            return self._same_elements(_with_signs(gold.items), _with_signs(answer.items))
        if "set" in kinds or ("matrix" in kinds and len(kinds) > 1) or kinds == {"row", "column"}:
            return False
        # A bracket tells a closed end of an interval from an open one; three numbers are no interval.
        brackets = {side.brackets or "()" for side in (gold, answer)}
        if len(gold.items) == 2 and len(brackets) > 1 and not kinds & {"row", "column"} and not self.rules.truth:
            return False
        return self._all_same(gold.items, answer.items)

    def _all_same(self, gold: Sequence[str], answer: Sequence[str]) -> bool:
        return len(gold) == len(answer) and all(map(self.inner, gold, answer))

    def _same_elements(self, gold: Sequence[str], answer: Sequence[str]) -> bool:
        """Tell whether these are the same elements in any order. Repeats count only where the gold answer has some: a
        double root."""
        matches = [[self.inner(one, other) for other in answer] for one in gold]
        if any(not any(row) for row in matches) or not all(map(any, zip(*matches, strict=True))):
            return False
        repeats = any(sum(column) > 1 for column in zip(*matches, strict=True))
        return len(gold) == len(answer) if repeats else True

    def _same_equation(self, gold: Equation, answer: Equation) -> bool:
        names = _named(gold), _named(answer)
        if names[0] and names[1]:
            renamed = _same_name(names[0][0], names[1][0])
            if renamed is not None:
                return self.inner(names[0][1], re.sub(*renamed, names[1][1]) if renamed[0] else names[1][1])
        ends = [(side.sides[0], side.sides[-1]) for side in (gold, answer)]
        return self._formulas(*(f"{left}={right}" for left, right in ends))

    def _ends_in(self, answer: Equation) -> bool:
        """Tell whether an equation ends in what is asked: m+n = 73 and 2^10 = 1024 do; 4 = 5 is no 5."""
        *others, last = answer.sides
        named = _named(answer)
        if named is not None and named[1] != last:
            return self.inner(self.gold, named[1])
        if not self.inner(self.gold, last):
            return False
        return all(_has_letters(other) or self.inner(last, other) for other in others)


_TRUTH = {"true": True, "yes": True, "correct": True, "false": False, "no": False, "incorrect": False}


def _points(text: str) -> list[str]:
    """Return names of angles and polygons, which are no products: ABC is CBA, but no ACB."""
    runs = re.findall(r"(?<![a-zA-Z\\])[A-Z]{3,}(?![a-zA-Z])", text)
    return sorted(min(run, run[::-1]) for run in runs)


def _ungrouped(text: str) -> str:
    """Return 282 475 249 without what separates its thousands, which no parser reads."""
    return re.sub(r"(?<=\d)[ ,](?=\d{3})", "", text) if read_number(text) is not None else text


def _counts(side: Quantity) -> bool:
    """Tell whether more than a scale word stands behind the value; 5 million has no more."""
    return side.unit.is_known or bool(side.unit.noun)


def _is_single(items: Items) -> bool:
    return items.kind == "set" and len(items.items) == 1 and items.items[0] != "\\emptyset"


def _with_signs(items: Sequence[str]) -> list[str]:
    return [sign for item in items for sign in _signs(item)]


def _signs(item: str) -> tuple[str, ...]:
    both = next((meaning for meaning in meanings(item) if isinstance(meaning, Items)), None) if "\\pm" in item else None
    return both.items if both is not None and both.kind == "list" else (item,)


def _are_named(items: Sequence[str]) -> bool:
    """Tell whether the items are named, as in AB=4, CD=5: values whose order their names give. x=1, x=2 are two values
    of one."""
    names = [_named(Equation(sides=tuple(latex.split_top(item, EQUALS)))) for item in items]
    return all(names) and len({latex.squeeze(name[0]) for name in names if name}) > 1


def _without_indices(items: Sequence[str]) -> list[str]:
    """Remove the indices of names: x_1=1, x_2=-3 are two values of x."""
    return [re.sub(r"^([a-zA-Z])_\s*\{?\d\}?(?=\s*=)", r"\1", item) for item in items]


def _named(equation: Equation) -> tuple[str, str] | None:
    """Return (name, value) of `k = 5` and `5 = k`, of `(x, y) = (1, 2)`, and of a chain `x = 5 + 6 = 11`."""
    first, *_, last = equation.sides if len(equation.sides) > 1 else ("", "")
    if is_name(first):
        return first, last
    return (last, first) if len(equation.sides) == 2 and is_name(last) else None


def _same_name(gold: str, answer: str) -> tuple[str, str] | None:
    """Return how the answer's letter is renamed to be the gold one's; None where the names differ.

    y and f(x) name one function, and f(x) and f(t) too.
    """
    gold, answer = latex.squeeze(gold), latex.squeeze(answer)
    if gold == answer:
        return "", ""
    functions = [re.fullmatch(r"([a-zA-Z](?:\^\{?-1\}?)?'*)\(([a-zA-Z])\)", name) for name in (gold, answer)]
    if functions[0] and functions[1]:
        if functions[0][1] != functions[1][1]:
            return None
        return rf"(?<![a-zA-Z\\]){functions[1][2]}(?![a-zA-Z])", functions[0][2]
    return ("", "") if "y" in (gold, answer) and (functions[0] or functions[1]) else None


def _has_letters(text: str) -> bool:
    """Tell whether there are letters that stand for something that is not known: no unit, and not the e, i and d of
    mathematics."""
    quantity = read_quantity(text)
    value = quantity.value if quantity is not None and quantity.is_sure else text
    return bool(_LETTER.search(value))
