"""Reward by mathematical equivalence (math-verify) of the last box and the gold answer.

Hostile answers such as `9^{9^{9^{9}}}` run for minutes or take gigabytes inside sympy, and math-verify's own
timeouts are SIGALRM. `judge_boxed` therefore runs only in a worker that can be killed, see `pool.py`.
"""

import logging
import time

from megatron_rl.reward.boxed import last_boxed
from megatron_rl.reward.exact import exact_verdict
from megatron_rl.reward.verdict import Verdict, make_verdict

MAX_ANSWER_CHARACTERS = 2000
# One pair for each part of sympy that is set up on first use, which takes up to 0.3 s.
_WARM_UP_PAIRS = (("\\frac{1}{2}", "0.5"), ("(x+1)^2", "x^2+2x+1"), ("\\{2,1\\}", "\\{1,2\\}"), ("(1,2)", "(2,1)"))


def settle_math(response_text: str, answer: str) -> Verdict | str:
    """The verdict where string comparison already gives it, otherwise the box that a worker has to judge.

    An answer longer than MAX_ANSWER_CHARACTERS that is not the gold string is "wrong".
    """
    boxed = last_boxed(response_text)
    verdict = exact_verdict(response_text, answer)
    if boxed is None or verdict.reason == "correct":
        return verdict
    if not boxed.strip() or max(len(boxed), len(answer)) > MAX_ANSWER_CHARACTERS:
        return verdict
    return boxed.strip()


def judge_boxed(boxed: str, answer: str) -> Verdict:
    """Are `boxed` and `answer` the same value? Only for pool workers: may hang, exhaust memory or crash.

    Both are parsed from inside a `\\boxed{}`: math-verify misreads several bare forms, such as (B) and $100.
    """
    from math_verify import parse, verify

    start = time.perf_counter()
    gold = parse(_as_box(answer), parsing_timeout=None)
    prediction = parse(_as_box(boxed), parsing_timeout=None)
    equal = verify(gold, prediction, timeout_seconds=None)
    return make_verdict("correct" if equal else "wrong", time.perf_counter() - start)


def warm_up() -> None:
    """Import math-verify and sympy and take their common paths once, so that no item pays for it."""
    # math-verify warns once per process that its timeouts are off; the pool's are on.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for boxed, answer in _WARM_UP_PAIRS:
        judge_boxed(boxed, answer)


def _as_box(answer: str) -> str:
    return answer if last_boxed(answer) is not None else f"\\boxed{{{answer}}}"
