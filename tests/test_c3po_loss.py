"""Tests advantages, surrogates, KL and corrections against numbers computed by hand or by a second implementation."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from megatron_rl.c3po.advantage import ADVANTAGES, BATCH_ADVANTAGES, group_advantages, overlong_penalty
from megatron_rl.c3po.algorithms import ALGORITHMS, chosen_algorithm, normalise
from megatron_rl.c3po.correction import icepop, kpop, truncated
from megatron_rl.c3po.kl import KL_ESTIMATORS
from megatron_rl.c3po.loss import policy_loss
from megatron_rl.c3po.surrogate import SURROGATES, Surrogate, at_sequence_level, cispo, clip, plain
from megatron_rl.config.algorithm import ADVANTAGE_NAMES, SURROGATE_NAMES, AlgorithmSection

log = math.log


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_standardised_advantages_are_centred_and_divided_by_the_population_deviation() -> None:
    # rewards 1, 0, 0, 0: mean 1/4, population variance 3/16
    expected = np.array([0.75, -0.25, -0.25, -0.25]) / math.sqrt(3 / 16)
    np.testing.assert_allclose(group_advantages(np.array([1, 0, 0, 0])), expected, rtol=1e-12)


def test_other_advantages_of_the_same_group() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 0.5])
    np.testing.assert_allclose(group_advantages(rewards, "centred"), [0.625, -0.375, -0.375, 0.125])
    # each reward less the mean of the three others: 1 - 1/6, 0 - 1/2, 0 - 1/2, 1/2 - 1/3
    np.testing.assert_allclose(group_advantages(rewards, "leave_one_out"), [5 / 6, -1 / 2, -1 / 2, 1 / 6])


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_has_no_advantage(reward: float, kind: str) -> None:
    assert group_advantages(np.full(16, reward), kind).tolist() == [0.0] * 16


@pytest.mark.parametrize(("length", "penalty"), [(10, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (20, -1.0), (25, -1.0)])
def test_the_overlong_penalty_grows_over_the_buffer(length: int, penalty: float) -> None:
    assert overlong_penalty(length, max_tokens=20, buffer_tokens=4) == penalty
    assert overlong_penalty(length, max_tokens=20, buffer_tokens=0) == 0.0


def test_each_normalisation_divides_as_its_paper_does() -> None:
    lengths = [[10], [4, 26]]  # the second is a trajectory of two segments
    sizes = {"budget": 25, "max_response_tokens": 64}
    losses = {10: 1.0, 4: 2.0, 26: 5.0}  # of every token of the segment of that length

    def total(kind: str) -> float:
        weights, denominator = normalise(kind, lengths, **sizes)
        segments = [pair for of_sample in zip(weights, lengths, strict=True) for pair in zip(*of_sample, strict=True)]
        return sum(w * n * losses[n] for w, n in segments) / denominator

    whole = 10 * 1 + 4 * 2 + 26 * 5
    assert total("budget") == whole / sizes["budget"]
    assert total("sequence") == pytest.approx((1 + (2 + 5) / 2) / 2)  # mean of the responses' means of segments' means
    assert total("token") == whole / 40
    assert total("constant") == whole / (2 * sizes["max_response_tokens"])
    assert total("sample") == whole / 2
    assert normalise("sequence", [[10], [30]], **sizes) == ([[1 / 10], [1 / 30]], 2.0)
    assert normalise("token", [], budget=1, max_response_tokens=1) == ([], 1.0)


def gradient(values: torch.Tensor, logprobs: torch.Tensor) -> list[float]:
    return torch.autograd.grad(values.sum(), logprobs)[0].tolist()


def test_clipping_stops_the_gradient_only_where_the_ratio_has_gone_too_far_in_the_good_direction() -> None:
    # (ratio, advantage, value, gradient): 1.5 is clipped for a positive advantage only, 0.5 for a negative one only
    cases = [(1.5, 1.0, 1.2, 0.0), (1.5, -1.0, -1.5, -1.5), (0.5, 1.0, 0.5, 0.5), (0.5, -1.0, -0.8, 0.0)]
    logprobs = tensor(*[log(r) for r, *_ in cases]).requires_grad_()
    found = clip(logprobs, torch.zeros(4), tensor(*[a for _, a, *_ in cases]), 0.2, 0.2)
    assert found.values.tolist() == pytest.approx([v for *_, v, _ in cases])
    assert gradient(found.values, logprobs) == pytest.approx([g for *_, g in cases])
    assert found.clipped_high.tolist() == [True, False, False, False]
    assert found.clipped_low.tolist() == [False, False, False, True]
    assert found.ratio.tolist() == pytest.approx([1.5, 1.5, 0.5, 0.5])


@pytest.mark.parametrize("name", SURROGATES)
def test_under_the_weights_that_sampled_every_surrogate_has_the_plain_policy_gradient(name: str) -> None:
    logprobs = tensor(-3.0, -0.1).requires_grad_()
    found = SURROGATES[name](logprobs, logprobs.detach(), tensor(2.0, -1.0), 0.2, 0.2)
    assert gradient(found.values, logprobs) == [2.0, -1.0]
    assert found.ratio.tolist() == [1.0, 1.0]


def test_cispo_keeps_the_gradient_of_clipped_tokens_with_a_clipped_weight() -> None:
    logprobs = tensor(log(3.0), log(0.5)).requires_grad_()
    found = cispo(logprobs, torch.zeros(2), tensor(2.0, -1.0), 1.0, 0.5)
    assert gradient(found.values, logprobs) == pytest.approx([1.5 * 2.0, -0.5])
    assert found.clipped_high.tolist() == [True, False]


def test_the_plain_ratio_is_not_clipped() -> None:
    logprobs = tensor(log(3.0)).requires_grad_()
    assert gradient(plain(logprobs, torch.zeros(1), tensor(2.0), 0.2, 0.2).values, logprobs) == pytest.approx([6.0])


def test_gspo_has_the_gradient_of_the_sequence_ratio() -> None:
    # One response of three tokens; s = exp(mean log-ratio). Autograd through s itself is the reference.
    old, values = tensor(-1.0, -2.0, -0.5), tensor(-0.9, -2.3, -0.2)
    direct = values.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.exp((direct - old).mean()) * 1.5, direct)
    logprobs = values.clone().requires_grad_()
    spread = at_sequence_level(logprobs, (values - old).mean().expand(3))
    found = clip(logprobs, spread, tensor(1.5, 1.5, 1.5), 0.2, 0.2)
    assert [g / 3 for g in gradient(found.values, logprobs)] == pytest.approx(expected.tolist())  # weights 1/|y|
    assert found.ratio.tolist() == pytest.approx([math.exp(0.1 / 3)] * 3)
    clipped = clip(logprobs, spread, tensor(1.5, 1.5, 1.5), 0.01, 0.01)
    assert gradient(clipped.values, logprobs) == [0.0, 0.0, 0.0]


def test_kl_estimators_at_a_known_ratio() -> None:
    d = tensor(log(2.0))  # pi_ref / pi = 2
    assert float(KL_ESTIMATORS["k1"](d)) == pytest.approx(-log(2.0))
    assert float(KL_ESTIMATORS["k2"](d)) == pytest.approx(log(2.0) ** 2 / 2)
    assert float(KL_ESTIMATORS["k3"](d)) == pytest.approx(2.0 - log(2.0) - 1.0)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_unbiased_kl_estimators_have_the_divergence_as_mean(name: str) -> None:
    pi, ref = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    mean = (pi * KL_ESTIMATORS[name]((ref / pi).log())).sum()
    assert float(mean) == pytest.approx(float((pi * (pi / ref).log()).sum()))


def test_icepop_keeps_ratios_inside_its_range_and_masks_the_rest() -> None:
    log_k = tensor(log(0.49), log(0.51), 0.0, log(4.9), log(5.1), 900.0)
    found = icepop(log_k - 2.0, torch.full((6,), -2.0, dtype=torch.float64), 0.5, 5.0)
    assert found.tolist() == pytest.approx([0.0, 0.51, 1.0, 4.9, 0.0, 0.0])


def test_truncated_importance_weights_have_a_cap() -> None:
    assert truncated(tensor(log(0.5), log(3.0), 900.0), torch.zeros(3), 2.0).tolist() == pytest.approx([0.5, 2.0, 2.0])


def test_kpop_measures_the_binary_divergence_in_both_directions() -> None:
    def divergence(p: float, q: float) -> float:
        return p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))

    pairs = [(0.9, 0.89), (0.9, 0.6), (0.5, 0.28), (0.01, 0.2), (1e-6, 2e-6)]
    expected = [float(max(divergence(p, q), divergence(q, p)) <= 0.1) for p, q in pairs]
    assert expected == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert kpop(tensor(*[log(p) for p, _ in pairs]), tensor(*[log(q) for _, q in pairs]), 0.1).tolist() == expected
    assert kpop(tensor(0.0, 0.0), tensor(0.0, log(0.2)), 0.1).tolist() == [1.0, 0.0]  # certain tokens


def test_weights_entropy_correction_and_kl_enter_with_their_signs() -> None:
    logprobs, entropy, reference = tensor(-1.0, -2.0), tensor(0.7, 0.3), tensor(-1.5, -1.0)
    nothing = torch.zeros(2, dtype=torch.bool)
    terms = policy_loss(
        Surrogate(values=tensor(1.0, 3.0), ratio=tensor(1.0, 1.0), clipped_low=nothing, clipped_high=nothing),
        logprobs,
        entropy,
        tensor(0.5, 2.0),
        entropy_coefficient=0.1,
        correction=tensor(1.0, 0.25),
        kl_coefficient=0.01,
        ref_logprobs=reference,
    )
    k3 = [math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1]
    expected = -(0.5 * 1 + 2 * 0.25 * 3) - 0.1 * (0.5 * 0.7 + 2 * 0.3) + 0.01 * (0.5 * k3[0] + 2 * k3[1])
    assert float(terms.total) == pytest.approx(expected)
    assert terms.kl.tolist() == pytest.approx(k3)


def test_the_configuration_knows_exactly_the_names_that_exist() -> None:
    def names(field: str) -> set[str]:
        kinds = get_args(AlgorithmSection.model_fields[field].annotation)
        return {n for kind in kinds for n in ([kind] if isinstance(kind, str) else get_args(kind))}

    assert names("name") == set(ALGORITHMS)
    assert set(ADVANTAGE_NAMES) == {*ADVANTAGES, *BATCH_ADVANTAGES}
    assert set(SURROGATE_NAMES) == set(SURROGATES)
    assert names("kl_estimator") == set(KL_ESTIMATORS)


def test_parts_of_an_algorithm_can_be_replaced() -> None:
    dapo = chosen_algorithm(AlgorithmSection(name="dapo", dynamic_sampling=False, clip_high=0.3))
    assert (dapo.clip_low, dapo.clip_high, dapo.dynamic_sampling, dapo.normalisation) == (0.2, 0.3, False, "token")
    assert chosen_algorithm(AlgorithmSection()).uses_budget
    assert chosen_algorithm(AlgorithmSection(ratio="sequence")).ratio == "sequence"
