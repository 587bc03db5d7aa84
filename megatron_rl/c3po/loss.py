"""This module is the objective as a pure function of tensors. The sum over tokens is divided by the denominator
elsewhere, once.

Legend: T tokens of a micro-batch that carry loss.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_rl.c3po.kl import KL_ESTIMATORS
from megatron_rl.c3po.surrogate import Surrogate


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Holds the loss. total: scalar, differentiable, to be minimised (times the denominator). policy, kl: detached [T],
    unweighted."""

    total: Tensor
    policy: Tensor
    kl: Tensor


def policy_loss(
    surrogate: Surrogate,
    logprobs: Tensor,
    entropy: Tensor,
    weights: Tensor,
    *,
    entropy_coefficient: float,
    correction: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    ref_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """Compute the numerator of Eq. 2 with the entropy term of Eq. 6, from tensors [T]:

        sum_t w_t * ( -M_t * surrogate_t + beta * KL_t - a_ent * H_t )

    The paper prints `+ a_ent H` to be minimised, against its text; the bonus is subtracted here.

    weights: of the token's sample, see `algorithms.normalise`; 1 for C3PO.
    correction: M_t of `correction.py`, constant; None is 1.
    ref_logprobs: of the reference policy; None leaves the KL term out.
    """
    policy = surrogate.values if correction is None else correction * surrogate.values
    per_token = -policy
    if entropy_coefficient:  # or else the head would work out a gradient of zeros
        per_token = per_token - entropy_coefficient * entropy
    kl = logprobs.new_zeros(len(logprobs))
    if ref_logprobs is not None:
        kl = KL_ESTIMATORS[kl_estimator](ref_logprobs - logprobs)
        per_token = per_token + kl_coefficient * kl
    return PolicyLoss(total=(weights * per_token).sum(), policy=policy.detach(), kl=kl.detach())
