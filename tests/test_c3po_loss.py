"""Advantages and Eq. 2 against numbers worked out by hand or written down again in numpy."""

import math

import numpy as np
import pytest
import torch

from megatron_rl.c3po.advantage import group_advantages
from megatron_rl.c3po.loss import policy_loss


def test_advantages_are_centred_and_divided_by_the_population_deviation() -> None:
    # rewards 1, 0, 0, 0: mean 1/4, population variance 3/16
    expected = np.array([0.75, -0.25, -0.25, -0.25]) / math.sqrt(3 / 16)
    np.testing.assert_allclose(group_advantages(np.array([1, 0, 0, 0])), expected, rtol=1e-12)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_has_no_advantage(reward: float) -> None:
    assert group_advantages(np.full(16, reward)).tolist() == [0.0] * 16


def loss(logprobs: list[float], old: list[float], advantages: list[float], **options: float) -> torch.Tensor:
    x = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    terms = policy_loss(
        x,
        torch.zeros_like(x),
        torch.tensor(old, dtype=torch.float64),
        torch.tensor(advantages, dtype=torch.float64),
        torch.ones_like(x),
        **{"clip_low": 0.2, "clip_high": 0.2, "entropy_coefficient": 0.0} | options,
    )
    terms.total.backward()
    return torch.stack([terms.total.detach().expand(x.shape), x.grad])


def test_clipping_stops_the_gradient_only_where_the_ratio_has_gone_too_far_in_the_good_direction() -> None:
    log = math.log
    # ratio 1.5: clipped for a positive advantage, not for a negative one; ratio 0.5: the other way round
    cases = [(1.5, 1.0, 1.2, 0.0), (1.5, -1.0, -1.5, 1.5), (0.5, 1.0, 0.5, -0.5), (0.5, -1.0, -0.8, 0.0)]
    for ratio, advantage, surrogate, gradient in cases:
        total, grad = loss([log(ratio)], [0.0], [advantage])
        assert float(total) == pytest.approx(-surrogate)
        assert float(grad) == pytest.approx(gradient)


def test_a_fresh_token_has_ratio_one_and_the_gradient_of_its_advantage() -> None:
    total, grad = loss([-3.0, -0.1], [math.nan, math.nan], [2.0, -1.0])
    assert float(total[0]) == -1.0  # -(2 - 1)
    assert grad.tolist() == [-2.0, 1.0]


def test_weights_entropy_and_kl_enter_with_their_signs() -> None:
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    entropy = torch.tensor([0.7, 0.3], dtype=torch.float64)
    reference = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    terms = policy_loss(
        logprobs,
        entropy,
        torch.full((2,), math.nan).double(),
        torch.tensor([1.0, 3.0]).double(),
        weights,
        clip_low=0.2,
        clip_high=0.2,
        entropy_coefficient=0.1,
        kl_coefficient=0.01,
        ref_logprobs=reference,
    )
    k3 = [math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1]
    expected = -(0.5 * 1 + 2 * 3) - 0.1 * (0.5 * 0.7 + 2 * 0.3) + 0.01 * (0.5 * k3[0] + 2 * k3[1])
    assert float(terms.total) == pytest.approx(expected)
