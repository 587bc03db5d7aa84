"""Tells which responses vote for the same answer, for maj@k.

Responses that were judged correct gave one answer, however they wrote it. The others are told apart by what stands in
their boxes: numbers by their value, letters of choices by the letter, anything else by its LaTeX in one spelling. Two
wrong expressions of one value are so two answers, which can only help the correct one.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from megatron_rl.evaluation.responses import Judged
from megatron_rl.reward.latex import clean, squeeze
from megatron_rl.reward.limits import MAX_ANSWER_CHARACTERS
from megatron_rl.reward.number import read_number
from megatron_rl.reward.stem import choice_letter


@dataclass(frozen=True, slots=True, kw_only=True)
class Votes:
    """Counts one prompt's samples: those for the correct answer, for each other answer, and those that gave none."""

    num_correct: int
    others: tuple[int, ...]
    num_silent: int


def count_votes(rows: Sequence[Judged]) -> Votes:
    wrong = [row for row in rows if row.reason != "correct"]
    answers = Counter(vote(row.answer, row.judged_as) for row in wrong if row.answer is not None)
    return Votes(
        num_correct=len(rows) - len(wrong),
        others=tuple(sorted(answers.values())),
        num_silent=sum(row.answer is None for row in wrong),
    )


def vote(answer: str, judged_as: str) -> Hashable:
    """Return a value that is the same for two answers that count as one."""
    if judged_as == "choice":
        letter = choice_letter(answer)
        if letter is not None:
            return letter
    if judged_as == "exact" or len(answer) > MAX_ANSWER_CHARACTERS:
        return answer.strip()
    cleaned = clean(answer)
    number = read_number(cleaned)
    return (number.value, number.is_percent) if number else squeeze(cleaned)
