"""Tests the judges of answers on made cases (tests/metamorphic), and tests that the cases are right.

`make test` judges a sample, `make test-answers` all 25,000. What the judges cannot do yet is in metamorphic/known.json.
"""

import math
import os
import random
import re
from collections import Counter
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metamorphic.cases import (
    CASES_EACH,
    GOLDS,
    KINDS,
    KNOWN,
    failures,
    judge,
    known_failures,
    make_cases,
    report,
    sample,
)
from metamorphic.gold import equal_trees
from metamorphic.trees import (
    PLAIN,
    TYPED,
    Call,
    Name,
    Power,
    Product,
    Quotient,
    Root,
    Sum,
    changed,
    differ,
    letters,
    negative,
    num,
    spellings,
    value,
    write,
)

# `make test` takes so many cases of each kind to accept and so many to refuse.
SAMPLE_EACH = 9
WHOLE = os.environ.get("ANSWERS") == "whole"
X, Y = Name("x"), Name("y")


@pytest.fixture(scope="module")
def cases():
    return make_cases()


def test_the_judges_fail_only_where_it_is_known(cases):
    """Check that no kind, side and rule has more failures than KNOWN says, and with all cases not fewer either."""
    judged = cases if WHOLE else sample(cases, SAMPLE_EACH)
    verdicts = judge(judged)
    text = report(judged, verdicts)
    if WHOLE:
        print(text)
    found, known = failures(judged, verdicts), known_failures()
    assert found - known == Counter(), text
    if WHOLE:
        assert known - found == Counter(), f"better than {KNOWN}: python -m metamorphic.cases --write-known"


def test_every_gold_has_25_ways_and_25_mutations_and_all_differ(cases):
    assert len({(case.kind, case.gold) for case in cases}) == GOLDS == 500
    assert set(Counter((case.kind, case.gold, case.expected) for case in cases).values()) == {CASES_EACH} == {25}
    assert len({(case.kind, case.gold, case.pred) for case in cases}) == len(cases) == 25_000
    assert len({case.kind for case in cases}) == len(KINDS)


def test_the_same_seed_makes_the_same_cases_and_another_seed_others(cases):
    few = make_cases(golds=40)
    assert few == cases[: len(few)]
    assert {case.gold for case in make_cases(golds=40, seed=2)} != {case.gold for case in few}


POINT = {"x": Fraction(3, 4), "y": Fraction(3, 2)}


def trees(leaves, more):
    """Draw trees. more: what else a tree may be built of, besides sums, products and quotients."""

    def branches(inner):
        parts = st.lists(inner, min_size=2, max_size=3).map(tuple)
        pairs = st.tuples(inner, inner)
        return st.one_of(parts.map(Sum), parts.map(Product), pairs.map(lambda pair: Quotient(*pair)), *more(inner))

    return st.recursive(leaves, branches, max_leaves=6)


def powers(inner):
    return st.tuples(inner, st.integers(-2, 3)).map(lambda pair: Power(pair[0], num(pair[1])))


RATIONAL = trees(
    st.one_of(st.integers(-9, 9).map(num), st.sampled_from([X, Y])), lambda inner: [powers(inner), inner.map(negative)]
)
POSITIVE = trees(
    st.one_of(st.integers(1, 9).map(num), st.sampled_from([X, Y, Name("\\pi")])),
    lambda inner: [powers(inner), inner.map(Root), inner.map(lambda inside: Root(inside, 3))],
)


def value_at_point(tree):
    return value(tree, {name: str(float(number)) for name, number in POINT.items()})


@given(RATIONAL)
def test_what_is_written_has_the_value_of_the_tree_with_every_sign(tree):
    """Check the brackets, which all styles share: Python reads them and computes exactly."""
    text = re.sub(r"\d+", r"F(\g<0>)", write(tree, TYPED))
    try:
        expected = value_at_point(tree)
        found = eval(text, {"__builtins__": {}}, {"F": Fraction, **POINT})  # a text that `write` made
    except ZeroDivisionError:
        return
    difference = abs(mpmath.mpf(found.numerator) / found.denominator - expected)
    assert difference <= 1e-12 * max(1, abs(expected))


@given(POSITIVE)
def test_what_is_written_has_the_value_of_the_tree_with_roots(tree):
    names = {"sqrt": math.sqrt, "pi": math.pi, **{name: float(number) for name, number in POINT.items()}}
    try:
        found = eval(write(tree, TYPED), {"__builtins__": {}}, names)  # a text that `write` made
    except OverflowError:
        return
    assert math.isclose(found, value_at_point(tree).real, rel_tol=1e-9)


def test_values_are_those_of_hand():
    point = {"x": "2", "y": "3"}
    assert value(Quotient(Sum((Power(X, num(3)), negative(Y))), num(2)), point) == 2.5
    assert value(Root(num(-4)), {}) == 2j
    assert abs(value(Call("ln", Power(Name("e"), num(3))), {}) - 3) < 1e-30
    assert letters(Product((X, Name("\\pi"), Call("sin", Y)))) == {"x", "y"}


def test_a_tree_is_written_in_each_style():
    tree = Product((num(3), Name("\\pi"), Power(X, num(2)), Root(Quotient(num(1), num(2)))))
    found = dict(spellings(tree))
    assert found["as it stands"] == "3\\pi x^2\\sqrt{\\frac{1}{2}}"
    assert found["short frac"] == "3\\pi x^2\\sqrt{\\frac12}"
    assert found["unicode and slash"] == "3πx²√(1/2)"
    assert found["commuted"] == "\\sqrt{\\frac{1}{2}}x^2\\pi\\cdot 3"
    assert found["typed"] == "3*pi*x^2*sqrt(1/2)"
    assert write(Quotient(Sum((X, num(-1))), Product((num(2), Y))), TYPED) == "(x-1)/(2*y)"
    assert write(Sum((X, negative(Sum((Y, num(1)))))), PLAIN) == "x-(y+1)"


def test_a_change_is_a_mutation_only_where_the_value_differs():
    rng = random.Random(0)
    square = Power(Sum((X, num(1))), num(2))
    expanded = Sum((Power(X, num(2)), Product((num(2), X)), num(1)))
    assert not differ(square, expanded, rng)
    assert differ(square, Sum((Power(X, num(2)), Product((num(3), X)), num(1))), rng)
    assert differ(Root(Power(X, num(2))), negative(X), rng)
    rules = {rule for rule, other in changed(expanded, rng) if differ(expanded, other, rng)}
    assert {"a number", "a sign", "an exponent", "a letter", "a dropped term", "a letter behind the last term"} <= rules
    # Nothing is gained where a factor is one, or a sign is that of zero.
    assert not differ(Product((num(1), X)), X, rng)
    assert not differ(num(0), negative(num(0)), rng)


def test_trees_that_are_not_equal_make_no_ways():
    with pytest.raises(AssertionError):
        equal_trees([("", X), ("doubled", Product((num(2), X)))])
