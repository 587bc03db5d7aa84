"""Holds a reference answer with other ways to write it and with mutations that are another answer, and makes both.

Everything is made from a tree, a list of numbers or a table, so what is equal follows from how it was made. A mutation
of a tree is kept only where its value differs at a random point; one of a list, unit or word differs by construction.
Ways are those that any grader takes. What graders dispute is left out: units that stand on one side only, 50 for 50 %,
a few digits of a fraction, an unreduced fraction, a ratio as a fraction.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import mpmath
from metamorphic.trees import Tree, changed, differ, spellings, value

Texts = list[tuple[str, str]]  # (rule, text)

# A value that another one may be rounded to is no sure mutation.
APART = 1e-3
WIDE = str.maketrans("0123456789+=<>:;%()[],", "０１２３４５６７８９＋＝＜＞：；％（）［］，")
VULGAR = {"1/2": "½", "1/3": "⅓", "2/3": "⅔", "1/4": "¼", "3/4": "¾", "1/5": "⅕", "1/8": "⅛", "3/8": "⅜", "5/8": "⅝"}
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """Holds a reference answer.

    ways, mutations: (rule, what stands in the box). other: another answer of this kind, for responses with two guesses.

    name: what may stand before "= text". in_words: no mathematics, so `\\displaystyle` would be strange.
    """

    kind: str
    text: str
    ways: Texts
    mutations: Texts
    other: str
    name: str = ""
    in_words: bool = False
    reward: str = "math"


def wide(text: str) -> Texts:
    """Return the text in full-width characters, if it has no LaTeX, and with each other minus sign."""
    found = [("full width", text.translate(WIDE))] if "\\" not in text and "{" not in text else []
    signs = (("−", "minus sign"), ("–", "en dash"), ("－", "full-width minus")) if "-" in text else ()
    return found + [(rule, text.replace("-", sign)) for sign, rule in signs]


def other_trees(tree: Tree, rng: random.Random, apart: float = APART) -> Texts:
    """Return those mutations that have another value, each in one spelling."""
    found = [(rule, other) for rule, other in changed(tree, rng) if differ(tree, other, rng, apart)]
    return [(rule, rng.choice(spellings(other))[1]) for rule, other in found]


def equal_trees(trees: Sequence[tuple[str, Tree]]) -> Texts:
    """Return every spelling of these trees. Check at random points that they are equal."""
    first = trees[0][1]
    assert not any(differ(first, tree, random.Random(0)) for _, tree in trees), trees
    return [(f"{rule}; {style}".strip("; "), text) for rule, tree in trees for style, text in spellings(tree)]


def sixteen_digits(tree: Tree) -> Texts:
    number = value(tree, {})
    text = mpmath.nstr(number.real, 16, min_fixed=-5, max_fixed=16)
    return [("16 digits", text)] if len(text.lstrip("-0.")) > 14 else []


def other_digit(text: str, rng: random.Random) -> str:
    place = rng.choice([n for n, character in enumerate(text) if character.isdigit()])
    digit = rng.choice([d for d in "123456789" if d != text[place]])
    return text[:place] + digit + text[place + 1 :]


def written_out(number: Fraction) -> str:
    places = next(places for places in range(40) if (number * 10**places).denominator == 1)
    digits = str(int(number * 10**places)).rjust(places + 1, "0")
    return digits if not places else f"{digits[:-places]}.{digits[-places:]}"


def shown_plainly(number: Fraction) -> str:
    return str(number.numerator) if number.denominator == 1 else written_out(number)


def grouped(whole: int) -> Texts:
    if abs(whole) < 1000:
        return []
    text = f"{whole:,}"
    return [("commas", text), ("LaTeX commas", text.replace(",", "{,}")), ("thin spaces", text.replace(",", "\\,"))]
