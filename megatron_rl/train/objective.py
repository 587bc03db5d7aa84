"""What a train step minimises, and what it reports, as sums over the tokens of a micro-batch."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.c3po.loss import policy_loss
from megatron_rl.config.schema import AlgorithmSection
from megatron_rl.train.batch import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """total: the sum to be divided by the denominator, differentiable. sums: detached scalars by metric name."""

    total: Tensor
    sums: dict[str, Tensor]


class Objective(Protocol):
    names: tuple[str, ...]

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch, ref_logprobs: Tensor | None) -> Terms: ...


class CrossEntropy:
    """-sum_t w_t log p(y_t), for SFT."""

    names: tuple[str, ...] = ("loss", "entropy")

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch, ref_logprobs: Tensor | None) -> Terms:
        total = -(batch.weights * logprobs).sum()
        return Terms(total=total, sums={"loss": total.detach(), "entropy": entropy.detach().sum()})


class PolicyObjective:
    """Eq. 2 with the entropy term of Eq. 6."""

    names: tuple[str, ...] = ("loss", "entropy", "kl", "clip_share")

    def __init__(self, algorithm: AlgorithmSection) -> None:
        self.algorithm = algorithm

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch, ref_logprobs: Tensor | None) -> Terms:
        terms = policy_loss(
            logprobs,
            entropy,
            batch.old_logprobs,
            batch.advantages,
            batch.weights,
            clip_low=self.algorithm.clip_low,
            clip_high=self.algorithm.clip_high,
            entropy_coefficient=self.algorithm.entropy_coefficient,
            kl_coefficient=self.algorithm.kl_coefficient,
            ref_logprobs=ref_logprobs,
        )
        return Terms(
            total=terms.total,
            sums={
                "loss": terms.total.detach(),
                "entropy": terms.entropy,
                "kl": terms.kl,
                "clip_share": terms.clipped,
            },
        )


def fresh_logprob_difference(logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """|train log-prob - rollout log-prob| of the tokens sampled by the present weights; others differ by right."""
    fresh = torch.isnan(batch.old_logprobs) & ~torch.isnan(batch.rollout_logprobs)
    return (logprobs.detach() - batch.rollout_logprobs)[fresh].abs()
