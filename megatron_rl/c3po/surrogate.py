"""This module computes what is maximised for each token, from the probability ratio and the advantage. All tensors are
[T].

`old` are the log-probabilities that the ratio r = exp(logprob - old) refers to. Where the present weights are the old
ones, old = logprob.detach(): r is exactly 1 and its gradient that of the log-probability.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """Holds the surrogate of each token. values: differentiable, to be maximised. ratio: detached. clipped_low,
    clipped_high: bool, tokens whose gradient the clip range took away (cispo: whose weight it changed) at its lower or
    upper end."""

    values: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def at_sequence_level(logprobs: Tensor, mean_log_ratio: Tensor) -> Tensor:
    """Return the `old` with which a token's ratio is that of its whole response, as in GSPO: s_i = exp(mean_t log
    r_it).

    mean_log_ratio: detached, of the token's response. exp(logprob - old) is then s_i * logprob_t / its detached self in
    log space, whose gradient, summed over the response with weights 1/|y_i|, is that of s_i (Eq. 14 of GSPO's paper).
    """
    return logprobs.detach() - mean_log_ratio


def clip(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Surrogate:
    """Return min(r A, clip(r, 1 - low, 1 + high) A): the clipped term of Eq. 2."""
    return _pessimistic(torch.exp(logprobs - old), advantages, low, high)


def cispo(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Surrogate:
    """Compute CISPO's surrogate. The clipped ratio is a constant weight of log-likelihood times advantage; no token
    loses its gradient."""
    ratio = torch.exp(logprobs.detach() - old)
    weight = ratio.clamp(1.0 - low, 1.0 + high)
    return Surrogate(
        values=weight * advantages * logprobs,
        ratio=ratio,
        clipped_low=ratio < 1.0 - low,
        clipped_high=ratio > 1.0 + high,
    )


def plain(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Surrogate:
    """Return r A without a clip range: the policy gradient with importance weights."""
    del low, high
    value = torch.exp(logprobs - old)
    nothing = torch.zeros_like(value, dtype=torch.bool)
    return Surrogate(values=value * advantages, ratio=value.detach(), clipped_low=nothing, clipped_high=nothing)


def _pessimistic(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Surrogate:
    held = ratio.detach()
    return Surrogate(
        values=torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages),
        ratio=held,
        clipped_low=(held < 1.0 - low) & (advantages < 0),
        clipped_high=(held > 1.0 + high) & (advantages > 0),
    )


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, float, float], Surrogate]] = {
    "clip": clip,
    "cispo": cispo,
    "plain": plain,
}
