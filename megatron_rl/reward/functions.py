"""Gives the built-in kinds as reward functions, to be called from functions of the user's own.

They give the verdicts that `reward.kind` gives. `math`, `stem` and `code` may take long for hostile answers, so they
belong into the workers that reward functions run in.
"""

from megatron_rl.reward.code import judge_code
from megatron_rl.reward.exact import exact_verdict
from megatron_rl.reward.pool import REWARD_KINDS
from megatron_rl.reward.score import Score
from megatron_rl.reward.stem import choice_verdict
from megatron_rl.reward.verdict import Verdict


def exact(response: str, answer: str) -> Score:
    """Judge whether the box has the very text of the answer."""
    return _score(exact_verdict(response, answer))


def choice(response: str, answer: str) -> Score:
    """Judge whether the box has the letter of the answer."""
    return _score(choice_verdict(response, answer))


def math(response: str, answer: str) -> Score:
    """Judge whether the box has what is the answer in mathematics: docs/rewards.md."""
    return _judged("math", response, answer)


def stem(response: str, answer: str) -> Score:
    """Judge whether the box has what is the answer in science, with a tolerance and units."""
    return _judged("stem", response, answer)


def code(response: str, answer: str) -> Score:
    """Judge whether the last program passes the tests, which are JSON, in a sandbox with its default limits."""
    return _score(judge_code(response, answer))


def _judged(kind: str, response: str, answer: str) -> Score:
    rules = REWARD_KINDS[kind]
    settled = rules.settle(response, answer)
    if isinstance(settled, Verdict):
        return _score(settled)
    assert rules.judge is not None
    return _score(rules.judge(settled, answer))


def _score(verdict: Verdict) -> Score:
    return Score(verdict.score, reason=verdict.reason, details=verdict.details)
