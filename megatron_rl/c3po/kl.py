"""This module holds estimators of KL(pi || pi_ref) at sampled tokens (J. Schulman, "Approximating KL divergence",
2020)."""

from collections.abc import Callable

from torch import Tensor

# Estimators as functions of d = ref_logprob - logprob. All have the same mean under pi but k2, which is biased to
# second order. As a loss, the gradient of k1 is zero on average, that of k2 is the gradient of KL(pi || pi_ref), that
# of k3 the one of KL(pi_ref || pi). The paper does not name its estimator; GRPO, which it builds on, uses k3.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: d.exp() - d - 1,
}
