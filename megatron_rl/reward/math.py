"""Judges by equivalence whether the answer in the box is the reference answer, in mathematics; `stem.py` has science.

Structure, words and plain numbers are compared by our own rules (`compare.py`), formulas by math-verify's parser and
their values (`symbolic.py`). Hostile answers such as `9^{9^{9^{9}}}` run for minutes or take gigabytes inside sympy,
and math-verify's own timeouts are SIGALRM. `judge_boxed` therefore runs only in a worker that can be killed, see
`pool.py`; the worst is turned away before by the text alone (`limits.py`).
"""

import logging
import time

from megatron_rl.reward.answers import boxed_answer, reference_answers
from megatron_rl.reward.compare import Rules, same_answer, same_at_once
from megatron_rl.reward.latex import clean
from megatron_rl.reward.limits import MAX_ANSWER_CHARACTERS, excess
from megatron_rl.reward.number import Number, equal_numbers, is_rounded
from megatron_rl.reward.symbolic import ROUNDED_ANSWER_DIGITS, ROUNDED_GOLD_DIGITS, equal_expressions
from megatron_rl.reward.verdict import Verdict, make_verdict

# One pair for each part of sympy that is set up on first use, which takes up to 0.3 s.
_WARM_UP_PAIRS = (
    ("\\sqrt{\\frac{1}{4}}", "2^{-1}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x^2=1", "x^2-1=0"),
    ("e^{i\\pi}", "-1"),
)


def same_numbers(gold: Number, answer: Number, converted: bool = False) -> bool:
    """Tell whether the numbers are equal, or one is a fraction and the other a decimal that it rounds to: any
    response's twelve digits do."""
    if equal_numbers(gold, answer):
        return True
    if answer.places is None:
        return is_rounded(gold, answer.value, ROUNDED_GOLD_DIGITS)
    return gold.places is None and is_rounded(answer, gold.value, ROUNDED_ANSWER_DIGITS)


MATH = Rules(numbers=same_numbers, formulas=equal_expressions)


def settle_math(response_text: str, answer: str) -> Verdict | str:
    """Return the verdict where text and plain numbers already give it, otherwise the box that a worker has to judge."""
    return settle(response_text, answer, MATH)


def judge_boxed(boxed: str, answer: str) -> Verdict:
    """Judge whether `boxed` and `answer` are the same. Only for pool workers: may hang, exhaust memory or crash."""
    return judge(boxed, answer, MATH)


def settle(response_text: str, answer: str, rules: Rules) -> Verdict | str:
    """Return the verdict where it needs no worker, otherwise the box. An answer that is not the gold string and goes
    beyond `limits.excess` is "wrong", a gold answer that does is an "error" of the data."""
    started = time.perf_counter()
    boxed = boxed_answer(response_text)
    if boxed is None:
        return make_verdict("no_answer")
    boxed, golds = boxed.strip(), reference_answers(answer)
    if boxed and (boxed in golds or boxed == answer.strip()):
        return make_verdict("correct")
    if not boxed:
        return make_verdict("wrong", details="the box is empty")
    if len(boxed) > MAX_ANSWER_CHARACTERS:
        return make_verdict("wrong", details=f"the answer has {excess(boxed)}")
    cleaned, cleaned_golds = clean(boxed), [clean(gold) for gold in golds]
    too_much = next(filter(None, map(excess, cleaned_golds)), None)
    if too_much:
        return make_verdict("error", details=f"the reference answer has {too_much}")
    too_much = excess(cleaned)
    if too_much:
        return make_verdict("wrong", details=f"the answer has {too_much}")
    outcomes = [same_at_once(gold, cleaned, rules) for gold in cleaned_golds]
    if True not in outcomes and None in outcomes:
        return boxed
    return make_verdict("correct" if True in outcomes else "wrong", time.perf_counter() - started)


def judge(boxed: str, answer: str, rules: Rules) -> Verdict:
    started = time.perf_counter()
    cleaned = clean(boxed)
    equal = any(same_answer(clean(gold), cleaned, rules) for gold in reference_answers(answer))
    return make_verdict("correct" if equal else "wrong", time.perf_counter() - started)


def warm_up() -> None:
    """Import math-verify and sympy and take their common paths once, so that no item pays for it."""
    # math-verify warns once per process that its timeouts are off; the pool's are on.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for boxed, answer in _WARM_UP_PAIRS:
        judge_boxed(boxed, answer)
