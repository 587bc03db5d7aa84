"""Defines what a train step minimises, and what it reports, from the log-probabilities of a micro-batch's loss
tokens."""

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.c3po.correction import icepop, kpop, sequence_truncated, truncated
from megatron_rl.c3po.loss import policy_loss
from megatron_rl.c3po.own_objective import own_correction, own_surrogate
from megatron_rl.c3po.surrogate import SURROGATES, at_sequence_level
from megatron_rl.config.algorithm import CORRECTION_NAMES, AlgorithmSection
from megatron_rl.train.step.batch import MicroBatch
from megatron_rl.train.step.step_metrics import Reports, Terms


class Objective(Protocol):
    reports: Reports

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Terms: ...


class CrossEntropy:
    """Computes -sum_t w_t log p(y_t), for SFT."""

    reports = Reports(means=("entropy",))

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Terms:
        return Terms(total=-(batch.weights * logprobs).sum(), sums={"entropy": entropy.detach().sum()})


class PolicyObjective:
    """Computes C3PO (Eq. 2 with the entropy term of Eq. 6) and its rivals, as the configuration says.

    context_group: the context-parallel ranks, over which a response may be divided; None for one rank.
    """

    def __init__(self, section: AlgorithmSection, context_group: Any = None) -> None:
        self._section, self._context_group = section, context_group
        self._algorithm = algorithm = chosen_algorithm(section)
        self._surrogate = SURROGATES.get(algorithm.surrogate) or own_surrogate(algorithm.surrogate)
        self._own_correction = None
        if section.correction not in CORRECTION_NAMES:
            self._own_correction = own_correction(section.correction)
        means = ["entropy", "kl", "clip_low_share", "clip_high_share"]
        distributions = {"logprob_difference": ("mean", "p999", "max"), "ratio": ("mean", "min", "max")}
        if section.correction != "none":
            means += ["correction_masked_share", "correction_weight"]
            distributions["train_rollout_log_ratio"] = ("p001", "p50", "p999")
        self.reports = Reports(means=tuple(means), distributions=distributions)

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Terms:
        section, algorithm = self._section, self._algorithm
        old = self._old_logprobs(logprobs.detach(), batch)
        held = old
        if algorithm.ratio == "sequence":
            held = at_sequence_level(logprobs, self._mean_log_ratio(logprobs.detach() - old, batch))
        surrogate = self._surrogate(logprobs, held, batch.advantages, algorithm.clip_low, algorithm.clip_high)
        correction = self._correction(old, batch)
        loss = policy_loss(
            surrogate,
            logprobs,
            entropy,
            batch.weights,
            entropy_coefficient=section.entropy_coefficient,
            correction=correction,
            kl_coefficient=section.kl_coefficient,
            kl_estimator=section.kl_estimator,
            ref_logprobs=batch.ref_logprobs,
        )
        sums = {
            "entropy": entropy.detach().sum(),
            "kl": loss.kl.sum(),
            "clip_low_share": surrogate.clipped_low.sum(),
            "clip_high_share": surrogate.clipped_high.sum(),
        }
        # Tokens that these very weights sampled: others differ by right. How many these are only the device knows.
        difference = (logprobs.detach() - batch.rollout_logprobs).abs().masked_fill(~batch.fresh, math.nan)
        values = {"logprob_difference": difference, "ratio": surrogate.ratio}
        if correction is not None:
            sums |= {"correction_masked_share": (correction == 0).sum(), "correction_weight": correction.sum()}
            values["train_rollout_log_ratio"] = old - batch.rollout_logprobs
        return Terms(total=loss.total, sums=sums, values=values)

    def _old_logprobs(self, present: Tensor, batch: MicroBatch) -> Tensor:
        """Return the log-probs that the ratio refers to: what the trainer recorded at the start of the phase, else the
        sampler's log-prob for tokens that older weights sampled, else those of the present weights themselves (then the
        ratio is exactly 1)."""
        if batch.old_logprobs is not None:
            return batch.old_logprobs
        if self._section.trains_on_own_old_logprobs:
            return present
        return torch.where(batch.fresh, present, batch.rollout_logprobs)

    def _mean_log_ratio(self, log_ratio: Tensor, batch: MicroBatch) -> Tensor:
        """Return the mean log-ratio over each token's response, [M]. Collective over the context-parallel ranks."""
        sums = log_ratio.new_zeros(len(batch.response_tokens)).index_add_(0, batch.response_of, log_ratio)
        if self._context_group is not None:
            dist.all_reduce(sums, group=self._context_group)
        return (sums / batch.response_tokens)[batch.response_of]

    def _correction(self, old: Tensor, batch: MicroBatch) -> Tensor | None:
        section = self._section
        match section.correction:
            case "none":
                return None
            case "icepop":
                return icepop(old, batch.rollout_logprobs, section.icepop_low, section.icepop_high)
            case "kpop":
                return kpop(old, batch.rollout_logprobs, section.kpop_limit)
            case "tis":
                return truncated(old, batch.rollout_logprobs, section.tis_cap)
        mean = self._mean_log_ratio(old - batch.rollout_logprobs, batch)
        response_tokens = batch.response_tokens[batch.response_of]
        if section.correction == "sequence_tis":
            return sequence_truncated(mean, response_tokens, section.tis_cap)
        values = {"old": old, "rollout": batch.rollout_logprobs, "mean_log_ratio": mean}
        assert self._own_correction is not None
        return self._own_correction(values | {"response_tokens": response_tokens})
