"""This module is an algorithm in three functions: which responses are praised, what is maximised for it, and how much
stale tokens count."""

import numpy as np
import torch


def above_median(rewards):
    """Return A_i = R_i - median(R), divided by the largest distance: one lucky response does not lower all others."""
    centred = rewards - np.median(rewards)
    largest = np.abs(centred).max()
    return centred / largest if largest else centred


def soft_clip(logprobs, old, advantages, low):
    """Return A tanh((r - 1) / eps) eps: its slope is that of r A near r = 1, and it is flat far from it, without the
    edge of a clip."""
    ratio = torch.exp(logprobs - old)
    return advantages * low * torch.tanh((ratio - 1.0) / low)


def of_whole_responses(mean_log_ratio):
    """Return the geometric mean of a response's probability ratios, at most 2: one weight for all of its tokens."""
    return mean_log_ratio.clamp(max=0.6931).exp()
