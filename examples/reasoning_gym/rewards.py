"""This module gives the graded scores that reasoning-gym's tasks bring, for the answer in the box or behind
"Answer:"."""

import functools

import reasoning_gym

from megatron_rl.reward import Score
from megatron_rl.reward.answers import stated_answer


@functools.cache
def _scorer(task):
    return reasoning_gym.get_score_answer_fn(task)


def score(response, domain, meta):
    """Return the task's own score, from 0 to 1."""
    if not response.strip():
        return Score(0.0, reason="no_answer")
    answer = stated_answer(response).strip()
    return Score(_scorer(domain)(answer, meta["entry"]), details=f"answer {answer!r:.80}")
