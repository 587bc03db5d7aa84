"""Reward by string equality of the last box; for tasks whose answers have one spelling."""

from megatron_rl.reward.boxed import last_boxed
from megatron_rl.reward.verdict import Verdict, make_verdict


def exact_verdict(response_text: str, answer: str) -> Verdict:
    """Compare the last box with `answer`, surrounding whitespace ignored."""
    boxed = last_boxed(response_text)
    if boxed is None:
        return make_verdict("no_answer")
    return make_verdict("correct" if boxed.strip() == answer.strip() else "wrong")
