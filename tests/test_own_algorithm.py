"""Tests the objective's parts: the user's own, REINFORCE++, sequence corrections, masked responses, several passes."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from samples import make_sample, make_schedule
from test_train_objective import PRESENT, gradient, make_batch

from megatron_rl.c3po.advantage import ADVANTAGES, BATCH_ADVANTAGES, takes_batch
from megatron_rl.c3po.algorithms import ALGORITHMS, chosen_algorithm
from megatron_rl.c3po.correction import sequence_truncated
from megatron_rl.c3po.own_objective import check_advantage, check_correction, check_surrogate
from megatron_rl.config.algorithm import ADVANTAGE_NAMES, SURROGATE_NAMES, AlgorithmSection
from megatron_rl.config.reward import RewardSection
from megatron_rl.records import Group
from megatron_rl.train.orchestrator.advantages import advantages_of, with_phase_advantages

OWN = """
import numpy as np
import torch
from megatron_rl.c3po.surrogate import Surrogate

def best_of(rewards):
    return np.where(rewards == rewards.max(), 1.0, -1.0 / (len(rewards) - 1)) if np.ptp(rewards) else 0 * rewards

def shorter(rewards, response_tokens, is_truncated):
    return rewards - rewards.mean() - 0.01 * response_tokens - is_truncated

def whole(rewards, groups):
    means = np.bincount(groups, rewards) / np.bincount(groups)
    return (rewards - means[groups]) / 2

def not_finite(rewards): return (rewards - rewards.mean()) / rewards.std()
def one_number(rewards): return 1.0
def words(rewards): return ["good"] * len(rewards)
def raises(rewards): return rewards[100]
def colours(rewards, colour): return rewards

def linear(logprobs, advantages): return logprobs * advantages
def ratio(logprobs, old, advantages, low, high):
    r = torch.exp(logprobs - old)
    values = r.clamp(max=1 + high) * advantages
    return Surrogate(values=values, ratio=r.detach(), clipped_low=r < 0, clipped_high=r > 1 + high)
def detached(logprobs, advantages): return logprobs.detach() * advantages
def mean(logprobs, advantages): return (logprobs * advantages).mean()
def endless(logprobs, old, advantages): return torch.exp(1000 * (logprobs - old)) * advantages

def halves(old, rollout): return torch.full_like(old, 0.5)
def of_sequence(mean_log_ratio, response_tokens): return (mean_log_ratio.abs() < 1) * response_tokens
def scalar(old): return 1.0
def overflow(old, rollout): return torch.exp(-10 * (old - rollout))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(OWN)
    return path


def run_config(algorithm: dict[str, Any], **reward: Any) -> Any:
    return SimpleNamespace(
        algorithm=AlgorithmSection(**algorithm),
        reward=RewardSection(**reward),
        rollout=SimpleNamespace(max_response_tokens=20),
        distillation=None,
    )


def group_of(prompt_id: int, *rewards: float, lengths: tuple[int, ...] = ()) -> Group:
    sizes = lengths or (4,) * len(rewards)
    samples = [make_sample(prompt_id, i, n, reward=r) for i, (r, n) in enumerate(zip(rewards, sizes, strict=True))]
    return Group(prompt_id=prompt_id, samples=tuple(samples))


def test_names_of_the_configuration_are_those_that_there_are() -> None:
    assert set(ADVANTAGE_NAMES) == ADVANTAGES.keys() | BATCH_ADVANTAGES.keys()
    assert set(SURROGATE_NAMES) >= {one.surrogate for one in ALGORITHMS.values()}
    with pytest.raises(
        ValueError, match=r"must be none, icepop, .* or a function of your own .*Did you mean 'icepop'\?"
    ):
        AlgorithmSection(correction="icepops")


def test_reinforce_plus_plus_standardises_over_the_whole_phase() -> None:
    # Six rewards, three of them 1: mean 1/2, standard deviation 1/2.
    groups = [group_of(0, 1.0, 0.0, 0.0), group_of(1, 1.0, 1.0, 0.0)]
    config = run_config({"name": "reinforce_pp"})
    assert chosen_algorithm(config.algorithm).normalisation == "token"
    first = advantages_of(config)([s.response for s in groups[0].samples], np.array([1.0, 0.0, 0.0]))
    assert first.tolist() == [0.0, 0.0, 0.0]  # nobody knows yet
    found, carried = with_phase_advantages(config, groups, [])
    assert [s.advantage for g in found for s in g.samples] == [1.0, -1.0, -1.0, 1.0, 1.0, -1.0]
    # A carried response takes part: rewards 3, 1, 1, 1, 0, 0 have mean 1 and variance 1.
    found, carried = with_phase_advantages(
        config, [group_of(2, 1.0, 1.0, 1.0, 0.0, 0.0)], [make_sample(9, 0, 4, reward=3.0)]
    )
    assert [s.advantage for s in carried] == [2.0]
    assert [s.advantage for s in found[0].samples] == [0.0, 0.0, 0.0, -1.0, -1.0]
    # Equal rewards teach nothing, also across groups.
    found, _ = with_phase_advantages(config, [group_of(0, 0.3, 0.1 + 0.2)], [])
    assert [s.advantage for s in found[0].samples] == [0.0, 0.0]
    # Algorithms of groups are left alone.
    same, _ = with_phase_advantages(run_config({}), groups, [])
    assert same == groups


@pytest.mark.parametrize("algorithm", ["reinforce_pp", "whole"])
def test_what_could_not_be_judged_has_no_advantage_over_a_whole_phase(algorithm: str, own: Path) -> None:
    # The prompt of the second group cannot be judged at all, and one response of the first, whose stand-in for a reward
    # is the mean of the others of its group, 3. What is left: rewards 5, 1, 1, 1 with mean 2 and variance 3.
    def failed(group: Group, *indices: int) -> Group:
        samples = (replace(s, reason="error") if i in indices else s for i, s in enumerate(group.samples))
        return replace(group, samples=tuple(samples))

    groups = [failed(group_of(0, 5.0, 1.0, 3.0), 2), failed(group_of(1, 0.0, 0.0), 0, 1), group_of(2, 1.0, 1.0)]
    config = run_config({"name": algorithm} if algorithm != "whole" else {"advantage": f"{own}:whole"})
    late = replace(make_sample(9, 0, 4, reward=7.0), reason="timeout")
    found, carried = with_phase_advantages(config, groups, [late])
    given = [[s.advantage for s in group.samples] for group in found]
    of_group = {"reinforce_pp": [3 / math.sqrt(3), -1 / math.sqrt(3)], "whole": [1.0, -1.0]}[algorithm]
    of_last = {"reinforce_pp": [-1 / math.sqrt(3)] * 2, "whole": [0.0, 0.0]}[algorithm]
    assert given[0] == pytest.approx([*of_group, 0.0])
    assert (given[1], given[2], carried[0].advantage) == ([0.0, 0.0], pytest.approx(of_last), 0.0)
    # Nothing of a phase may be judged; the run then ends or goes on by reward.max_error_share.
    nothing, _ = with_phase_advantages(config, [groups[1]], [])
    assert [s.advantage for s in nothing[0].samples] == [0.0, 0.0]


def test_own_advantages_get_what_they_name(own: Path) -> None:
    samples = group_of(0, 1.0, 0.0, lengths=(10, 20)).samples
    responses, rewards = [s.response for s in samples], np.array([1.0, 0.0])
    config = run_config({"advantage": f"{own}:best_of"})
    assert advantages_of(config)(responses, rewards).tolist() == [1.0, -1.0]
    config = run_config({"advantage": f"{own}:shorter"}, overlong_buffer_tokens=10, overlong_penalty=2.0)
    # the second response is at the limit of 20, so that 2 are taken from its reward: 1 and -2, mean -1/2
    assert advantages_of(config)(responses, rewards) == pytest.approx([1.5 - 0.1, -1.5 - 0.2])
    assert takes_batch(f"{own}:whole") and not takes_batch(f"{own}:best_of")
    found, _ = with_phase_advantages(
        run_config({"advantage": f"{own}:whole"}), [group_of(7, 1.0, 0.0), group_of(3, 5.0, 1.0)], []
    )
    assert [s.advantage for g in found for s in g.samples] == [0.25, -0.25, 1.0, -1.0]


@pytest.mark.parametrize(
    ("check", "name", "told"),
    [
        (check_advantage, "not_finite", r"for the rewards \[0.5, 0.5, 0.5, 0.5\]; they must be finite"),
        (check_advantage, "one_number", r"returned shape \[\] for 4 rewards; it must return one for each"),
        (check_advantage, "words", "it must return an array of 4 advantages"),
        (check_advantage, "raises", "raised IndexError: .* < mine.py line"),
        (check_advantage, "colours", "nothing is called 'colour'. Parameters may be\n  rewards: float64"),
        (check_surrogate, "detached", "has no gradient in logprobs, so nothing would be learned"),
        (check_surrogate, "mean", r"returned shape \[\] for \[3\] tokens"),
        (check_surrogate, "endless", "both must be finite"),
        (check_correction, "scalar", "returned float; it must return a tensor of weights"),
        (check_correction, "overflow", "they must be finite"),
        (check_correction, "nothing", r"has no function 'nothing'"),
    ],
)
def test_a_part_that_cannot_be_trained_with_is_refused_at_the_start(
    own: Path, check: Any, name: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        check(f"{own}:{name}")


@pytest.mark.parametrize("name", ["best_of", "shorter", "whole"])
def test_good_advantages_pass_and_those_that_move_with_the_rewards_are_told(own: Path, name: str, caplog: Any) -> None:
    caplog.set_level("INFO")
    check_advantage(f"{own}:{name}")
    assert not caplog.records


def test_an_own_surrogate_is_what_is_maximised(own: Path) -> None:
    check_surrogate(f"{own}:linear")
    check_surrogate(f"{own}:ratio")
    found, terms = gradient({"surrogate": f"{own}:linear"}, make_batch(fresh=True))
    assert found == pytest.approx([-1.0, -1.0, -1.0, 2.0])  # minus the advantages
    assert terms.sums["clip_high_share"] == 0
    # ratios to the sampler: 1, 2, 0.5, 0.25; the second is over 1.2
    found, terms = gradient({"surrogate": f"{own}:ratio"}, make_batch(fresh=False))
    assert found == pytest.approx([-1.0, 0.0, -0.5, 0.5])
    assert terms.sums["clip_high_share"] == 1


def test_a_sequence_has_one_weight_the_capped_product_of_its_ratios(own: Path) -> None:
    # k of the three tokens of the first response: 1, 2, 1/2, whose product is 1; of the second: 1/4.
    old = list(PRESENT)
    found, terms = gradient({"correction": "sequence_tis"}, make_batch(fresh=True, old=old))
    assert found == pytest.approx([-1.0, -1.0, -1.0, 0.25 * 2.0])
    assert float(terms.sums["correction_weight"]) == pytest.approx(3.25)
    # log k 0.5 and 0.7 over two tokens: exp(1.2) is over the cap of 2; a token by itself would not be
    weights = sequence_truncated(torch.tensor([0.6, 0.6, -0.1]), torch.tensor([2.0, 2.0, 1.0]), 2.0)
    assert weights.tolist() == pytest.approx([2.0, 2.0, math.exp(-0.1)])
    found, _ = gradient({"correction": f"{own}:halves"}, make_batch(fresh=True, old=old))
    assert found == pytest.approx([-0.5, -0.5, -0.5, 1.0])
    # means of log k: 0 and log 1/4, which is beyond 1; weights are 3, 3, 3 and 0
    found, terms = gradient({"correction": f"{own}:of_sequence"}, make_batch(fresh=True, old=old))
    assert found == pytest.approx([-3.0, -3.0, -3.0, 0.0])
    assert terms.sums["correction_masked_share"] == 1


def cut_off(sample: Any) -> Any:
    return replace(sample, response=replace(sample.response, finish_reason="length"))


@pytest.mark.parametrize(
    ("algorithm", "denominator", "scales"),
    [
        ("grpo", 2.0, {10: 0.1, 5: 0.2}),  # the mean over the responses that are left
        ("dapo", 15.0, {10: 1.0, 5: 1.0}),  # and over their tokens
        ("c3po", 40.0, {10: 1.0, 5: 1.0}),  # Phi is Phi
    ],
)
def test_masked_responses_carry_no_loss_and_count_in_no_mean(
    algorithm: str, denominator: float, scales: dict[int, float]
) -> None:
    samples = (make_sample(0, 0, 10), cut_off(make_sample(0, 1, 20)), make_sample(0, 2, 5))
    found = make_schedule([Group(prompt_id=0, samples=samples)], algorithm=ALGORITHMS[algorithm], mask_truncated=True)
    (step,) = found.plan.steps
    assert step.denominator == denominator
    assert {one.num_loss_tokens: one.loss_scale for one in step.selected} == scales
    assert [found.samples[i].id for i in found.masked] == [(0, 1)]


def test_masked_responses_take_their_part_of_a_budget_and_the_rest_is_carried() -> None:
    # Whatever the order of the groups, each budget takes one of them, and one of its two responses is cut off.
    groups = [Group(prompt_id=p, samples=(make_sample(p, 0, 10), cut_off(make_sample(p, 1, 10)))) for p in range(3)]
    found = make_schedule(groups, budgets=(20, 20), num_passes=2, mask_truncated=True)
    assert [step.num_loss_tokens for step in found.plan.steps] == [10, 10, 10, 10]
    assert (len(found.masked), len(found.carried), found.num_dropped) == (2, 2, 0)
    used = {s.index for step in found.plan.steps for s in step.selected}
    assert not used & set(found.masked)
    assert {s.id for s in found.carried} | {found.samples[i].id for i in (*used, *found.masked)} == {
        (p, i) for p in range(3) for i in range(2)
    }


def test_a_second_pass_trains_the_same_responses_as_those_of_older_weights() -> None:
    groups = [Group(prompt_id=p, samples=tuple(make_sample(p, i, 10) for i in range(2))) for p in range(2)]
    once = make_schedule(groups, algorithm=ALGORITHMS["grpo"], budgets=(40, 40))
    twice = make_schedule(groups, algorithm=ALGORITHMS["grpo"], budgets=(40, 40), num_passes=2)
    assert len(twice.plan.steps) == 4
    assert twice.first_pass == once.plan.steps == once.first_pass
    for first, again in zip(twice.plan.steps[:2], twice.plan.steps[2:], strict=True):
        assert [s.index for s in again.selected] == [s.index for s in first.selected]
        assert [s.num_stale_tokens for s in again.selected] == [10, 10]
    assert AlgorithmSection(optimizer_steps_per_rollout=2, passes_per_rollout=3).optimizer_steps_of_phase == 6
