"""Tests the objective on a small batch: what each token's ratio refers to, and what corrections do to it."""

import dataclasses
import math

import pytest
import torch

from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.families import Rotary
from megatron_rl.model.packing import pack
from megatron_rl.rotary import frequencies
from megatron_rl.train.step.batch import MicroBatch
from megatron_rl.train.step.objective import PolicyObjective
from megatron_rl.train.step.step_metrics import MetricAccumulator, Terms

log = math.log
F64 = torch.float64

# Two responses, of three tokens and of one. The present weights give each token a fifth.
PRESENT = [log(0.2)] * 4
# The sampler gave the first as much, the second and third less and more, the fourth four times as much.
ROLLOUT = [log(0.2), log(0.1), log(0.4), log(0.8)]


def make_batch(fresh: bool, old: list[float] | None = None, reference: list[float] | None = None) -> MicroBatch:
    def tensor(values: list[float] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=F64)

    return MicroBatch(
        token_ids=torch.zeros(1, 6, dtype=torch.int64),
        packed=pack([4, 2], frequencies(Rotary(), head_dim=4), F64, torch.device("cpu")),
        padding_mask=torch.zeros(1, 6, dtype=torch.bool),
        loss_index=torch.tensor([0, 1, 2, 4]),
        targets=torch.zeros(4, dtype=torch.int64),
        weights=torch.ones(4, dtype=F64),
        advantages=torch.tensor([1.0, 1.0, 1.0, -2.0], dtype=F64),
        rollout_logprobs=torch.tensor(ROLLOUT, dtype=F64),
        fresh=torch.full((4,), fresh),
        response_of=torch.tensor([0, 0, 0, 1]),
        response_tokens=torch.tensor([3.0, 1.0], dtype=F64),
        old_logprobs=tensor(old),
        ref_logprobs=tensor(reference),
    )


def gradient(options: dict, batch: MicroBatch) -> tuple[list[float], Terms]:
    """Return d(total) / d(log-prob of each token), and the terms."""
    section = AlgorithmSection(**{"entropy_coefficient": 0.0, **options})
    logprobs = torch.tensor(PRESENT, dtype=F64, requires_grad=True)
    terms = PolicyObjective(section)(logprobs, torch.zeros(4, dtype=F64), batch)
    terms.total.backward()
    assert logprobs.grad is not None
    return logprobs.grad.tolist(), terms


def test_the_ratio_of_a_fresh_token_is_one() -> None:
    found, terms = gradient({}, make_batch(fresh=True))
    assert found == pytest.approx([-1.0, -1.0, -1.0, 2.0])
    assert terms.values["ratio"].tolist() == [1.0] * 4
    # fresh tokens are those on which sampler and trainer should agree
    assert terms.values["logprob_difference"].tolist() == pytest.approx([0.0, log(2), log(2), log(4)])


def test_a_token_of_older_weights_refers_to_what_the_sampler_recorded() -> None:
    # ratios 1, 2, 1/2, 1/4: the second (A > 0) is clipped above, the fourth (A < 0) below
    found, terms = gradient({"clip_low": 0.2, "clip_high": 0.28}, make_batch(fresh=False))
    assert found == pytest.approx([-1.0, 0.0, -0.5, 0.0])
    assert (float(terms.sums["clip_high_share"]), float(terms.sums["clip_low_share"])) == (1.0, 1.0)
    assert terms.values["logprob_difference"].isnan().all()  # which counts for nothing


def test_the_trainers_own_log_probs_of_the_start_of_the_phase_come_before_the_samplers() -> None:
    old = [log(0.2), log(0.24), log(0.2), log(0.2)]  # ratios within the clip, none at its edge
    found, _ = gradient({"old_logprobs": "train"}, make_batch(fresh=False, old=old))
    assert found == pytest.approx([-1.0, -5 / 6, -1.0, 2.0])
    # the first step of a phase starts from those weights: without a record the ratio is 1, whoever sampled
    found, _ = gradient({"old_logprobs": "train"}, make_batch(fresh=False))
    assert found == pytest.approx([-1.0, -1.0, -1.0, 2.0])


# k = train / rollout of the four tokens: 1, 2, 1/2, 1/4. Their binary KL, the larger of both directions, of p = 0.2
# against q = 0.1 is 0.2 ln 2 + 0.8 ln(8/9) = 0.0444, against 0.4 it is 0.4 ln 2 + 0.6 ln(3/4) = 0.1047.
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"correction": "icepop", "icepop_low": 0.5, "icepop_high": 5.0}, [1.0, 2.0, 0.5, 0.0]),
        ({"correction": "icepop", "icepop_low": 0.6, "icepop_high": 1.5}, [1.0, 0.0, 0.0, 0.0]),
        ({"correction": "tis", "tis_cap": 1.5}, [1.0, 1.5, 0.5, 0.25]),
        ({"correction": "kpop", "kpop_limit": 0.1}, [1.0, 1.0, 0.0, 0.0]),
        ({"correction": "kpop", "kpop_limit": 0.11}, [1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_a_correction_weighs_the_policy_term(options: dict, weights: list[float]) -> None:
    found, terms = gradient(options, make_batch(fresh=True))
    plain, _ = gradient({}, make_batch(fresh=True))
    assert found == pytest.approx([w * g for w, g in zip(weights, plain, strict=True)])
    assert float(terms.sums["correction_masked_share"]) == sum(w == 0 for w in weights)
    assert float(terms.sums["correction_weight"]) == pytest.approx(sum(weights))
    assert terms.values["train_rollout_log_ratio"].tolist() == pytest.approx([0.0, log(2), -log(2), -log(4)])


def test_a_correction_compares_the_log_probs_of_the_start_of_the_phase() -> None:
    # The weights have moved since: k is that of the old ones (1 everywhere), the ratio that of the present ones.
    options = {"correction": "icepop", "icepop_low": 0.5, "surrogate": "plain"}
    found, _ = gradient(options, make_batch(fresh=False, old=ROLLOUT))
    assert found == pytest.approx([-1.0, -2.0, -0.5, 2.0 / 4])


def test_a_sequence_ratio_is_the_geometric_mean_of_the_responses_tokens() -> None:
    # (1 * 2 * 1/2) ** (1/3) = 1 for the first response, 1/4 for the second
    _, terms = gradient({"name": "gspo"}, make_batch(fresh=False))
    assert terms.values["ratio"].tolist() == pytest.approx([1.0, 1.0, 1.0, 0.25])


def test_the_kl_term_pulls_towards_the_reference() -> None:
    reference = [log(0.2), log(0.1), log(0.4), log(0.2)]
    batch = make_batch(fresh=True, reference=reference)
    found, terms = gradient({"kl_coefficient": 0.5, "kl_estimator": "k3"}, batch)
    without, _ = gradient({}, make_batch(fresh=True))
    # k3 = r - 1 - log r with r = reference / present; its gradient is 1 - r
    pull = [0.5 * (1 - r) for r in (1.0, 0.5, 2.0, 1.0)]
    assert found == pytest.approx([g + p for g, p in zip(without, pull, strict=True)])
    assert float(terms.sums["kl"]) == pytest.approx(sum(r - 1 - log(r) for r in (1.0, 0.5, 2.0, 1.0)))


@pytest.mark.parametrize("algorithm", ["c3po", "gspo"])
@pytest.mark.parametrize("correction", ["none", "icepop", "kpop", "tis"])
def test_nothing_in_a_micro_batch_waits_for_a_value(algorithm: str, correction: str) -> None:
    """Check on the meta device, which has no values: what asks for one, or for a size that depends on one, raises."""
    where = torch.device("meta")
    batch = make_batch(fresh=True, old=PRESENT, reference=PRESENT)
    moved = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "packed"}
    moved = {name: x.to(where) for name, x in moved.items() if isinstance(x, torch.Tensor)}
    section = AlgorithmSection(name=algorithm, correction=correction, kl_coefficient=0.1)
    objective = PolicyObjective(section)
    logprobs, entropy = (torch.empty(4, dtype=F64, device=where, requires_grad=True) for _ in range(2))
    terms = objective(logprobs, entropy, dataclasses.replace(batch, **moved))
    tally = MetricAccumulator(objective.reports, where)
    tally.add(terms, num_tokens=4)
    terms.total.backward()
    with pytest.raises(RuntimeError):
        terms.total.item()
