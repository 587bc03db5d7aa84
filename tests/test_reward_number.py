"""Tests that plain numbers in every dress are read as exact fractions, and nothing else is."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.reward.latex import clean
from megatron_rl.reward.number import equal_numbers, is_rounded, read_number


def value_of(text: str) -> Fraction | None:
    number = read_number(clean(text))
    return None if number is None else number.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-42", -42),
        ("+3", 3),
        ("007", 7),
        (".5", "1/2"),
        ("5.", 5),
        ("3.140", "157/50"),
        ("1,234,567", 1234567),
        ("1{,}000", 1000),
        ("12,\\!000,\\! 023", 12000023),
        ("1\\,000", 1000),
        ("1 000", 1000),
        ("1,000.99", "100099/100"),
        ("1.234.567", 1234567),
        ("1_000", 1000),
        ("５０％", 50),
        ("–3", -3),
        ("½", "1/2"),
        ("2½", "5/2"),
        ("50 per cent", 50),
        ("1/3", "1/3"),
        ("\\dfrac{-1}{3}", "-1/3"),
        ("-\\frac 43", "-4/3"),
        ("\\frac14", "1/4"),
        ("(1/3)", "1/3"),
        ("2 1/3", "7/3"),
        ("2\\frac{1}{3}", "7/3"),
        ("-2\\tfrac13", "-7/3"),
        ("1.5e3", 1500),
        ("1e-2", "1/100"),
        ("7.474 \\times 10^{3}", 7474),
        ("3 \\cdot 10^{-2}", "3/100"),
        ("10^6", 1000000),
        ("0.\\overline{3}", "1/3"),
        ("0.1\\overline{6}", "1/6"),
        ("0.(142857)", "1/7"),
        ("0.333\\ldots", "1/3"),
        ("0.\\dot{9}", 1),
        ("50\\%", 50),
        ("28 percent", 28),
    ],
)
def test_a_number_is_read_in_every_dress(text, value):
    assert value_of(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["", "x", "2+3", "1/0", "--2", "1,23", "12,34,567", "32, 349", "2\\cdot 3", "10^{10^{10}}", "1e999999999", "3!",
     "2\\frac{5}{3}", "1.2.3", "0.33", "\\sqrt{4}", "(1,2)", "AZYUK2A", "(12,100)", "0,100", "90^\\circ", "\\$5"],
)  # fmt: skip
def test_anything_else_is_no_number_or_not_another_one(text):
    assert value_of(text) == (Fraction(33, 100) if text == "0.33" else None)


@given(st.integers(-(10**30), 10**30), st.integers(0, 12))
def test_a_decimal_is_its_digits_over_a_power_of_ten(digits, places):
    padded = str(abs(digits)).rjust(places + 1, "0")
    text = padded[: len(padded) - places] + ("." + padded[-places:] if places else "")
    assert value_of(("-" if digits < 0 else "") + text) == Fraction(digits, 10**places)


@given(st.integers(-999, 999), st.integers(1, 999))
def test_a_fraction_equals_its_long_division(above, below):
    """Check that the recurring decimal of a long division by hand is read as the fraction."""
    whole, rest = divmod(abs(above), below)
    digits, seen = "", {}
    while rest and rest not in seen:
        seen[rest] = len(digits)
        digits += str(rest * 10 // below)
        rest = rest * 10 % below
    fixed, period = (digits[: seen[rest]], digits[seen[rest] :]) if rest else (digits, "")
    decimal = f"{'-' if above < 0 else ''}{whole}.{fixed}" + (f"\\overline{{{period}}}" if period else "0")
    assert value_of(decimal) == value_of(f"\\frac{{{above}}}{{{below}}}") == Fraction(above, below)


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_different_numbers_differ_and_commas_do_not_matter(first, second):
    one, other = read_number(clean(f"{first:,}")), read_number(clean(str(second)))
    assert one is not None and other is not None
    assert equal_numbers(one, other) == (first == second)


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [("50", "50\\%", True), ("50\\%", "0.5", True), ("50\\%", "50\\%", True), ("0.5", "50\\%", True),
     ("50", "0.5", False), ("50\\%", "5", False), ("50\\%", "5000", False), ("0.75", "75", False)],
)  # fmt: skip
def test_a_percent_sign_may_be_left_out_or_worked_out(gold, answer, equal):
    numbers = read_number(clean(gold)), read_number(clean(answer))
    assert numbers[0] and numbers[1]
    assert equal_numbers(*numbers) is equal


def test_significant_digits_start_at_the_first_that_is_not_zero():
    numbers = [read_number(text) for text in ("0.9659", "0.0043", "12.50", "12", "1.50 \\times 10^{3}", "1/2")]
    assert [number.digits for number in numbers if number] == [4, 2, 4, 0, 3, 0]
    assert [number.places for number in numbers if number] == [4, 4, 2, 0, -1, None]


@given(st.integers(1, 10**6), st.integers(2, 10**4), st.integers(4, 14))
def test_a_decimal_is_a_fraction_rounded_or_cut_off_and_not_its_neighbour(above, below, places):
    exact = Fraction(above, below)
    for whole in (exact * 10**places // 1, -(-exact * 10**places // 1)):
        text = f"{whole // 10**places}.{whole % 10**places:0{places}d}"
        number = read_number(text)
        assert number is not None
        assert is_rounded(number, exact, 4) is (number.digits >= 4)
        assert not is_rounded(number, exact + exact / 10**10 + Fraction(2, 10**places), 4)
