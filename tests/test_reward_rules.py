"""Tests each row of the rules in docs/rewards.md, and properties that hold for every answer."""

import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.reward.compare import Rules, same_answer
from megatron_rl.reward.latex import clean
from megatron_rl.reward.math import same_numbers, settle_math
from megatron_rl.reward.meaning import (
    Choice,
    Clock,
    Equation,
    Expression,
    Items,
    Quantity,
    Ratio,
    Reaction,
    Words,
    meanings,
)
from megatron_rl.reward.number import Number
from megatron_rl.reward.pool import RewardPool
from megatron_rl.reward.region import Region
from megatron_rl.reward.statement import Congruence, Family, Relation
from megatron_rl.reward.stem import SCIENCE, settle_stem
from megatron_rl.reward.units import read_unit

PAGE = Path(__file__).resolve().parents[1] / "docs" / "rewards.md"
STRUCTURE = Rules(numbers=same_numbers, formulas=lambda gold, answer: False)


def rules_of_the_page() -> list[tuple[str, str, str, bool]]:
    """Return (kind of reward, reference, response, accepted) of every example in the page's tables."""
    found, kind = [], "math"
    for line in PAGE.read_text().splitlines():
        if line.startswith("| reference"):
            kind = "stem" if "science" in line else "math"
        elif line.startswith("| `"):
            reference, *columns = (re.findall(r"`([^`]+)`", column) for column in line.strip("| ").split(" | "))
            assert len(columns) == 2, line
            for texts, accepted in zip(columns, (True, False), strict=True):
                found += [(kind, reference[0], text, accepted) for text in texts]
    return found


def response(text: str) -> str:
    return text if re.search(r"\\(?:boxed|fbox)", text) else f"\\boxed{{{text}}}"


@pytest.mark.parametrize("kind", ["math", "stem"])
def test_every_example_of_the_page_is_judged_as_it_says(kind):
    rules = [rule for rule in rules_of_the_page() if rule[0] == kind]
    assert len(rules) > {"math": 200, "stem": 30}[kind]
    with RewardPool(kind, workers=1, timeout_seconds=240.0) as pool:
        verdicts = pool.score([(response(text), reference) for _, reference, text, _ in rules])
    assert [rule for rule, v in zip(rules, verdicts, strict=True) if (v.reason == "correct") != rule[3]] == []


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("7", [Number]),
        ("1,234", [Number, Items]),
        ("(1,2)", [Region, Items]),
        ("(2,1,3)", [Items]),
        ("\\{1,2\\}", [Region, Items, Expression]),
        ("A", [Choice, Expression]),
        ("B. Paris", [Words, Choice]),
        ("ellipse", [Words]),
        ("5\\text{ cm}", [Words, Quantity]),
        ("5 m", [Quantity, Expression]),
        ("3:4", [Ratio]),
        ("x=5", [Equation]),
        ("x>5", [Region, Expression]),
        ("x^2+1", [Expression]),
        ("\\pm 2", [Items]),
        ("k\\pi, k\\in\\mathbb{Z}", [Family]),
        ("n\\equiv 3 \\pmod 7", [Congruence]),
        ("AB \\perp CD", [Relation]),
        ("2H_2+O_2 \\to 2H_2O", [Reaction]),
        ("3:00 PM", [Words, Clock, Ratio]),
        ("", []),
    ],
)
def test_a_text_means_what_it_can_and_nothing_else(text, kinds):
    assert [type(meaning) for meaning in meanings(clean(text))] == kinds


@pytest.mark.parametrize(
    ("one", "other", "factor"),
    [("km", "m", 1000), ("h", "s", 3600), ("m/s", "km/h", "18/5"), ("g/cm^3", "kg/m^3", 1000), ("L", "m^3", "1/1000"),
     ("N\\cdot m", "J", 1), ("kW h", "J", 3600000), ("mile", "m", "1609344/1000"), ("\\mu m", "nm", 1000),
     ("kΩ", "Ω", 1000), ("J/(mol K)", "J mol^{-1} K^{-1}", 1), ("square feet", "ft^2", 1), ("dollars", "cents", 100),
     ("千克", "g", 1000), ("米", "cm", 100)],
)  # fmt: skip
def test_units_are_converted_by_their_definitions(one, other, factor):
    units = [read_unit(clean(text)) for text in (one, other)]
    assert units[0] is not None and units[1] is not None
    assert units[0].powers == units[1].powers
    assert units[0].scale / units[1].scale == Fraction(factor)


@pytest.mark.parametrize("text", ["or more", "not 13", "x", "", "m/", "/", "and 4 feet", "m^99", "(m", "m)", "5"])
def test_what_is_no_unit_is_none(text):
    unit = read_unit(text)
    assert unit is None or not unit.is_known


# Pieces that any reader could stumble over.
PIECES = st.lists(
    st.sampled_from(
        ["\\frac", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "\\text{", "1", "23", ".", ",", " ", " and ", "x", "=",
         "<", "\\le", "\\cup", "^", "_", "\\pm", "\\%", "\\$", "$", "\\infty", "-", "\\begin{pmatrix}",
         "\\end{pmatrix}", "&", "\\\\", "\\", "cm", " m", "\\approx", "\\in", ":", "!", "/", "e5", "\u2028", "或",
         "½",
         "²", "°", "**", "\\over", "A", "(B)", "not ", "\\mid", "|", "answer is ", "'", '"', "√",
         "\\mathrm{",
         "million",
         "CO_2", "f(x)", "，", "\\to ", "\\in\\mathbb{Z}", "k", " for any integer ", "\\equiv ", "\\pmod 7",
         "\\parallel ", "①", "3:00", "c_1", "\\begin{cases}", "\\end{cases}", "\\ne ", "且", "5 ft 3 in", "+C"]
    ),
    max_size=30,
).map("".join)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.fractions(-50, 50, max_denominator=50).map(str),
    st.decimals(-1000, 1000, places=3).map(str),
    st.integers(1, 500).map("\\sqrt{{{}}}".format),
)
ANSWERS = st.recursive(
    st.one_of(
        NUMBERS, st.sampled_from(["x", "2x+1", "\\pi", "A", "(B)", "ellipse", "5\\text{ cm}", "30^\\circ", "甲"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map(", ".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda items: f"({', '.join(items)})"),
        st.lists(inner, min_size=2, max_size=3).map(lambda items: f"\\{{{', '.join(items)}\\}}"),
        inner.map("x = {}".format),
    ),
    max_leaves=4,
)
WRAPPERS = ["{}", " {} ", "${}$", "{{{}}}", "\\displaystyle {}", "\\left.{}\\right.", "\\,{}", "**{}**", "{}.",
            "\\textcolor{{red}}{{{}}}", "\\large {}", "\\({}\\)"]  # fmt: skip


@settings(deadline=None)
@given(PIECES, PIECES)
def test_reading_is_total_and_quick(gold, answer):
    started = time.process_time()
    for settle in (settle_math, settle_stem):
        settle(f"\\boxed{{{answer}}}", gold)
    same_answer(clean(gold), clean(answer), STRUCTURE)
    assert time.process_time() - started < 1.0  # a few milliseconds on an idle machine


@settings(deadline=None)
@given(st.one_of(ANSWERS, PIECES))
def test_an_answer_is_the_same_as_itself(text):
    cleaned = clean(text)
    assert same_answer(cleaned, cleaned, STRUCTURE) is bool(meanings(cleaned))


@settings(deadline=None)
@given(ANSWERS, st.sampled_from(WRAPPERS))
def test_space_and_harmless_wrappers_change_nothing(text, wrapper):
    assert same_answer(clean(text), clean(wrapper.format(text)), STRUCTURE)
    assert clean(clean(text)) == clean(text)


@settings(deadline=None)
@given(NUMBERS, NUMBERS, st.sampled_from(["{}", "{}\\text{{ cm}}", "({}, 1)", "\\{{{}, 7\\}}", "[{}, 8)"]))
def test_what_has_no_side_is_the_same_both_ways(one, other, shape):
    texts = clean(shape.format(one)), clean(shape.format(other))
    assert same_answer(*texts, STRUCTURE) == same_answer(*texts[::-1], STRUCTURE)


@settings(deadline=None)
@given(
    st.integers(1, 10**5),
    st.sampled_from(["m", "g", "J", "W"]),
    st.sampled_from(["", "k", "m"]),
    st.sampled_from(["", "k", "m"]),
)
def test_a_prefix_moves_the_value_and_nothing_else(number, unit, first, second):
    power = {"": 0, "k": 3, "m": -3}
    moved = f"{number} \\times 10^{{{power[first] - power[second]}}}\\text{{ {second}{unit}}}"
    gold = clean(f"{number}\\text{{ {first}{unit}}}")
    assert same_answer(gold, clean(moved), STRUCTURE)
    assert same_answer(gold, clean(f"{number}\\text{{ {second}{unit}}}"), STRUCTURE) == (first == second)
    assert same_answer(gold, clean(moved), SCIENCE)


@pytest.mark.parametrize(
    "piece",
    ["{\\over", "{a}", "{a\\over b}", "A", "Aa1", "\\text{", "x or ", "('", "{x|", "\\hat{", "**", "5 m", "a b",
     "x=1,",
     "1:", "9⁹", "\\textcolor{", "^\\circ", "\\{x:", "\\approx", "The answer is ", "和", "[1,2[", "5'", "√",
     "(A)", "A. ",
     "mod 5 ", "k\\in\\mathbb{Z}", "k,", "(<", " (x<", "k for any ", "=0,1,2,", "A\\to ", "A+", "5 h ", "①",
     "\\parallel ",
     "|0\\rangle", "n\\equiv ", "\\text{ and ", "a & b \\\\ ", "{}", "x and ", "\\ne "],
)  # fmt: skip
def test_the_callers_part_takes_little_time_for_long_answers(piece):
    text = (piece * 2000)[:1990]
    started = time.process_time()
    settle_math(f"\\boxed{{{text}}}", "5 \\text{ cm}")
    settle_stem(f"\\boxed{{{text}}}", "5 \\text{ cm}")
    assert time.process_time() - started < 0.5  # a twentieth of that on an idle machine
