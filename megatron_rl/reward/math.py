"""Reward by mathematical equivalence of the last box and the gold answer.

Structure and plain numbers are compared by our own rules (`compare.py`), expressions by math-verify's parser and their
values (`symbolic.py`). Hostile answers such as `9^{9^{9^{9}}}` run for minutes or take gigabytes inside sympy, and
math-verify's own timeouts are SIGALRM. `judge_boxed` therefore runs only in a worker that can be killed, see `pool.py`;
the worst is turned away before by the text alone (`limits.py`).
"""

import logging
import time

from megatron_rl.reward.answers import boxed_answer, stated_answer
from megatron_rl.reward.compare import same_answer
from megatron_rl.reward.latex import clean
from megatron_rl.reward.limits import MAX_ANSWER_CHARACTERS, excess
from megatron_rl.reward.number import equal_numbers, read_number
from megatron_rl.reward.symbolic import equal_expressions
from megatron_rl.reward.verdict import Verdict, make_verdict

# One pair for each part of sympy that is set up on first use, which takes up to 0.3 s.
_WARM_UP_PAIRS = (
    ("\\sqrt{\\frac{1}{4}}", "2^{-1}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x^2=1", "x^2-1=0"),
    ("e^{i\\pi}", "-1"),
)


def settle_math(response_text: str, answer: str) -> Verdict | str:
    """The verdict where text and plain numbers already give it, otherwise the box that a worker has to judge.

    An answer that is not the gold string and goes beyond `limits.excess` is "wrong", a gold answer that does is an
    "error" of the data.
    """
    started = time.perf_counter()
    boxed = boxed_answer(response_text)
    if boxed is None:
        return make_verdict("no_answer")
    boxed, answer = boxed.strip(), _reference(answer)
    if boxed == answer and boxed:
        return make_verdict("correct")
    if not boxed:
        return make_verdict("wrong", details="the box is empty")
    if len(boxed) > MAX_ANSWER_CHARACTERS:
        return make_verdict("wrong", details=f"the answer has {excess(boxed)}")
    too_much = excess(answer)
    if too_much:
        return make_verdict("error", details=f"the reference answer has {too_much}")
    too_much = excess(boxed)
    if too_much:
        return make_verdict("wrong", details=f"the answer has {too_much}")
    numbers = read_number(clean(answer)), read_number(clean(boxed))
    if numbers[0] and numbers[1]:
        equal = equal_numbers(numbers[0], numbers[1])
        return make_verdict("correct" if equal else "wrong", time.perf_counter() - started)
    return boxed


def judge_boxed(boxed: str, answer: str) -> Verdict:
    """Are `boxed` and `answer` the same? Only for pool workers: may hang, exhaust memory or crash."""
    started = time.perf_counter()
    equal = same_answer(clean(_reference(answer)), clean(boxed), equal_expressions)
    return make_verdict("correct" if equal else "wrong", time.perf_counter() - started)


def warm_up() -> None:
    """Import math-verify and sympy and take their common paths once, so that no item pays for it."""
    # math-verify warns once per process that its timeouts are off; the pool's are on.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for boxed, answer in _WARM_UP_PAIRS:
        judge_boxed(boxed, answer)


def _reference(answer: str) -> str:
    """Some data give whole solutions as the answer; a bare answer is taken as it is."""
    return (stated_answer(answer) if "\\boxed" in answer or "answer is" in answer else answer).strip()
