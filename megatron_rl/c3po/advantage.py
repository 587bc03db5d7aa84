"""Group-normalised advantages."""

import numpy as np


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """A_i = (R_i - mean(R)) / std(R) with the population standard deviation, float64 [K] from rewards [K].

    A group whose rewards are all equal has advantage 0. No length enters: the same value holds for every token of a
    response.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if np.ptp(rewards) == 0.0:
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std()
