"""This module is the off-policy correction: it gives constant weights to tokens whose sampler and trainer disagree
about them.

With k = pi_train(y; theta_old) / pi_infer(y) the policy term of a token is multiplied by M(k). All tensors [T];
`old` are the trainer's log-probabilities, `rollout` the sampler's, for the token's own policy version. Everything is
decided in log space, before exponentiating: inf * 0 is not a number.
"""

import math

import torch
from torch import Tensor


def icepop(old: Tensor, rollout: Tensor, low: float, high: float) -> Tensor:
    """Return k where low <= k <= high, else 0 (Ring-1T report, arXiv 2510.18855)."""
    log_k = old - rollout
    keep = (log_k >= math.log(low)) & (log_k <= math.log(high))
    return torch.where(keep, torch.where(keep, log_k, 0.0).exp(), 0.0)


def truncated(old: Tensor, rollout: Tensor, cap: float) -> Tensor:
    """Return min(k, cap): truncated importance sampling."""
    return (old - rollout).clamp(max=math.log(cap)).exp()


def sequence_truncated(mean_log_ratio: Tensor, response_tokens: Tensor, cap: float) -> Tensor:
    """Return min(prod_t k_t, cap) for every token of a response: truncated importance sampling of sequences. The weight
    is that of the response as one action, prod_t pi_train(y_t) / pi_infer(y_t).

    mean_log_ratio: [T], the mean of log k over the token's response. response_tokens: [T], how many those are.
    """
    return (mean_log_ratio * response_tokens).clamp(max=math.log(cap)).exp()


def kpop(old: Tensor, rollout: Tensor, limit: float) -> Tensor:
    """Return 1 where the binary KL of the token's probability is at most `limit` in both directions, else 0 (Ring-2.6
    report, arXiv 2606.15079). D(p || q) = p log(p/q) + (1-p) log((1-p)/(1-q))."""
    p, q = old.exp(), rollout.exp()
    tiny = torch.finfo(old.dtype).tiny
    log_not_p, log_not_q = ((-torch.expm1(x)).clamp_min(tiny).log() for x in (old, rollout))
    forward = p * (old - rollout) + (1 - p) * (log_not_p - log_not_q)
    backward = q * (rollout - old) + (1 - q) * (log_not_q - log_not_p)
    return ((forward <= limit) & (backward <= limit)).to(old.dtype)
