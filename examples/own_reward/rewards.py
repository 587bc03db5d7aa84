"""This module holds the rewards of this example: how well a response is formed, and how near its answer is.

The functions get their parameters by name; docs/own_rewards.md lists them.
"""

from megatron_rl.reward import Score
from megatron_rl.reward.answers import boxed_answer


def form(response, finish_reason, response_tokens):
    """Return half a point each for one box and for an end, less a little for length."""
    points = 0.5 * (response.count("\\boxed") == 1) + 0.5 * (finish_reason == "stop")
    return points - 0.001 * response_tokens


def near(response, answer):
    """Return 1 for the answer itself, else the share of its characters that stand in their places."""
    found = boxed_answer(response)
    if found is None:
        return Score(-0.5, reason="no_answer", details="no closed box")
    if found.strip() == answer.strip():
        return 1.0
    right = sum(a == b for a, b in zip(found.strip(), answer.strip(), strict=False))
    return Score(0.5 * right / max(len(found), len(answer)), details=f"{right} characters in their places")
