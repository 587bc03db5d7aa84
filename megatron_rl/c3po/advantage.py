"""This module computes the advantages of a group's responses, and what a reward loses for length. One value holds for
every token of a response; no length enters an advantage."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_rl.c3po.own_objective import own_advantage, own_advantages

_ROUNDING = 1e-12  # of sums of a few terms, relative to the largest


def _centred(rewards: np.ndarray) -> np.ndarray:
    """Return A_i = R_i - mean(R): Dr.GRPO (arXiv 2503.20783)."""
    return rewards - rewards.mean()


def _standardised(rewards: np.ndarray) -> np.ndarray:
    """Return A_i = (R_i - mean(R)) / std(R) with the population standard deviation, as C3PO and GRPO do."""
    return (rewards - rewards.mean()) / rewards.std()


def _leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Return A_i = R_i - mean of the other rewards: RLOO (arXiv 2402.14740)."""
    return (rewards - rewards.mean()) * (len(rewards) / (len(rewards) - 1))


def _batch_standardised(rewards: np.ndarray) -> np.ndarray:
    """Return A_i = (R_i - mean(R)) / std(R) over all N responses of a phase: REINFORCE++ (arXiv 2501.03262, Section 3),
    which has no baseline for each group."""
    return np.zeros_like(rewards) if all_equal(rewards) else _standardised(rewards)


ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "standardised": _standardised,
    "centred": _centred,
    "leave_one_out": _leave_one_out,
}


# These take all responses of a phase at once.
BATCH_ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"batch_standardised": _batch_standardised}


def takes_batch(kind: str) -> bool:
    """Tell whether an advantage is taken over all responses of a phase, and not over a group. ValueError for a function
    of the user's own that cannot be loaded."""
    return kind in BATCH_ADVANTAGES or (kind not in ADVANTAGES and "groups" in own_advantage(kind).parameters)


def advantages_by(kind: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute advantages, float64 [K] or [N], by a built-in name or a function of the user's own. values: those that
    `own_objective.OF_ADVANTAGE` names."""
    rewards = np.asarray(values["rewards"], dtype=np.float64)
    if kind in BATCH_ADVANTAGES:
        return BATCH_ADVANTAGES[kind](rewards)
    return group_advantages(rewards, kind) if kind in ADVANTAGES else own_advantages(kind, values)


def all_equal(rewards: Sequence[float] | np.ndarray) -> bool:
    """Tell whether nothing can be learned from the rewards of a group. They are then equal up to the rounding of sums
    such as 0.1 + 0.2 and 0.3. Dividing by their standard deviation would blow that rounding up."""
    values = np.asarray(rewards, dtype=np.float64)
    return bool(np.ptp(values) <= _ROUNDING * np.abs(values).max())


def group_advantages(rewards: np.ndarray, kind: str = "standardised") -> np.ndarray:
    """Compute advantages, float64 [K], from rewards [K], K at least 2, by a name of `ADVANTAGES`.

    A group whose rewards are all equal has advantage exactly 0, whatever rounding does to its mean.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if all_equal(rewards):
        return np.zeros_like(rewards)
    return ADVANTAGES[kind](rewards)


def overlong_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int, most: float = 1.0) -> float:
    """Return what DAPO's soft over-long punishment (arXiv 2503.14476, Eq. 13) adds to a reward. It is 0 up to
    max - buffer tokens, and from there falls linearly to -most at max_tokens; the paper has 1. Without a buffer it
    is 0."""
    if buffer_tokens == 0:
        return 0.0
    return most * min(0.0, max(-1.0, (max_tokens - buffer_tokens - num_tokens) / buffer_tokens))
