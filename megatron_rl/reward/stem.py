"""Judges answers to questions of science: as in mathematics, but with tolerance, and a letter behind a number is its
unit.

Letters of choices (`choice_verdict`) are for evaluation: a guess is right too often to learn from.
"""

from fractions import Fraction

from megatron_rl.reward.answers import boxed_answer
from megatron_rl.reward.compare import Rules
from megatron_rl.reward.latex import clean
from megatron_rl.reward.math import judge, settle
from megatron_rl.reward.meaning import Choice, meanings
from megatron_rl.reward.number import Number, equal_numbers, read_number
from megatron_rl.reward.symbolic import equal_expressions, real_value
from megatron_rl.reward.verdict import Verdict, make_verdict

# SciBench's tolerance (Wang et al. 2023, section 4): its answers come from rounded intermediate results.
RELATIVE_TOLERANCE = Fraction(5, 100)


def choice_verdict(response_text: str, answer: str) -> Verdict:
    """Judge whether the letter in the box is the letter `answer`. For evaluation only."""
    boxed = boxed_answer(response_text)
    if boxed is None:
        return make_verdict("no_answer")
    right = choice_letter(answer)
    if right is None:
        return make_verdict("error", details=f"the reference answer {answer!r:.80} is no letter of a choice")
    return make_verdict("correct" if choice_letter(boxed) == right else "wrong")


def choice_letter(answer: str) -> str | None:
    """Return B of "(b)", "B. Paris" and "\\text{B}"; None where the answer is no letter of a choice."""
    return next((meaning.letter for meaning in meanings(clean(answer)) if isinstance(meaning, Choice)), None)


def close_numbers(gold: Number, answer: Number, converted: bool) -> bool:
    """Tell whether the numbers are within 5 %. A whole number counts something, unless units were converted: it is met
    by what rounds to it, and by no other whole number. A percentage may be worked out."""
    if equal_numbers(gold, answer):
        return True
    if gold.is_percent != answer.is_percent:
        by = Fraction(1, 100) if answer.is_percent else Fraction(100)
        moved = Number(value=answer.value * by, is_percent=gold.is_percent)
        return close_numbers(gold, moved, converted) or close_numbers(
            gold, Number(value=answer.value, is_percent=gold.is_percent, places=answer.places), converted
        )
    apart = abs(gold.value - answer.value)
    if gold.places == 0 and not converted and (answer.places == 0 or apart >= Fraction(1, 2)):
        return False
    return apart <= RELATIVE_TOLERANCE * abs(gold.value) or (gold.value == 0 and apart < Fraction(1, 10**9))


def close_formulas(gold: str, answer: str) -> bool:
    """Compare formulas by their values, where both have one, otherwise as in mathematics."""
    numbers = [_number(side) for side in (gold, answer)]
    if numbers[0] and numbers[1]:
        return close_numbers(numbers[0], numbers[1], False)
    return equal_expressions(gold, answer)


def _number(text: str) -> Number | None:
    plain = read_number(text)
    if plain is not None:
        return plain
    value = real_value(text)
    return None if value is None else Number(value=Fraction(value))


SCIENCE = Rules(numbers=close_numbers, formulas=close_formulas, letters_are_units=True, truth=True)


def settle_stem(response_text: str, answer: str) -> Verdict | str:
    """Return the verdict, or the box that a worker has to judge."""
    return settle(response_text, answer, SCIENCE)


def judge_value(boxed: str, answer: str) -> Verdict:
    """Judge whether `boxed` and `answer` are the same. Only for pool workers."""
    return judge(boxed, answer, SCIENCE)
