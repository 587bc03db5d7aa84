"""The objective as pure functions of tensors; every sum is divided by the constant denominator elsewhere, once.

Legend: T tokens of a micro-batch that carry loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Sums over tokens. `total` is what is minimised (times the denominator); the rest is detached, for metrics, and
    unweighted except for `policy`."""

    total: Tensor
    policy: Tensor
    entropy: Tensor
    kl: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    entropy_coefficient: float,
    kl_coefficient: float = 0.0,
    ref_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """The numerator of Eq. 2 and the entropy term of Eq. 6, all arguments [T].

        sum_t w_t * ( -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + beta KL_t - a_ent H_t ),
        r_t = exp(logprob_t - old_logprob_t),   KL_t = exp(d) - d - 1 with d = ref_logprob_t - logprob_t (k3)

    The paper prints `+ a_ent H` to be minimised, against its text; the bonus is subtracted here.

    old_logprobs: of the behaviour policy; NaN marks a token that was sampled by the current weights, whose ratio is
        exactly 1 with the gradient of the log-probability.
    weights: 1 for C3PO; `Selected.loss_scale` of the token's sample in general.
    """
    fresh = torch.isnan(old_logprobs)
    ratio = torch.exp(logprobs - torch.where(fresh, logprobs.detach(), old_logprobs))
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    unclipped, clipped = ratio * advantages, clipped_ratio * advantages
    policy = -(weights * torch.minimum(unclipped, clipped)).sum()
    bonus = (weights * entropy).sum()
    total = policy - entropy_coefficient * bonus
    kl = torch.zeros_like(policy)
    if ref_logprobs is not None:
        difference = ref_logprobs - logprobs
        per_token = difference.exp() - difference - 1.0
        total = total + kl_coefficient * (weights * per_token).sum()
        kl = per_token.sum()
    return PolicyLoss(
        total=total,
        policy=policy.detach(),
        entropy=entropy.detach().sum(),
        kl=kl.detach(),
        clipped=(clipped < unclipped).detach().sum().to(logprobs.dtype),
    )
