"""Judges by string equality of the answer in the box, for tasks whose answers have one spelling."""

from megatron_rl.reward.answers import boxed_answer, reference_answers
from megatron_rl.reward.verdict import Verdict, make_verdict


def exact_verdict(response_text: str, answer: str) -> Verdict:
    """Compare the box with `answer`, or with what stands in its own box; surrounding whitespace is ignored."""
    boxed = boxed_answer(response_text)
    if boxed is None:
        return make_verdict("no_answer")
    accepted = [answer.strip(), *reference_answers(answer)]
    return make_verdict("correct" if boxed.strip() in accepted else "wrong")
