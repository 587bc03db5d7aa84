"""This module describes C3PO and its rivals as choices of advantage, surrogate, ratio, normalisation and clip range.

A configuration names one of `ALGORITHMS` and may replace all but the normalisation. Sources (arXiv): C3PO 2506.14731;
GRPO 2402.03300; DAPO 2503.14476 (its over-long punishment is `reward.overlong_buffer_tokens`); Dr.GRPO 2503.20783;
GSPO 2507.18071; CISPO 2506.13585; RLOO 2402.14740; REINFORCE++ 2501.03262.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.algorithm import AlgorithmSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Holds the parts of an algorithm.

    advantage: a name of `advantage.ADVANTAGES` or `BATCH_ADVANTAGES`, or a function of the user's own. surrogate: a
    name of `surrogate.SURROGATES`, or such a function.

    ratio: of the token, or the geometric mean of the ratios over its response.
    normalisation: what the sum over tokens is divided by, a name of `normalise`. "budget" also decides that only
    Phi tokens are taken; every other one trains all samples.
    clip_low, clip_high: the ratio's range is [1 - clip_low, 1 + clip_high].
    dynamic_sampling: groups whose rewards are all equal are dropped and replaced by further prompts.
    """

    advantage: str = "standardised"
    surrogate: str = "clip"
    ratio: Literal["token", "sequence"] = "token"
    normalisation: str
    clip_low: float = 0.2
    clip_high: float = 0.2
    dynamic_sampling: bool = False

    @property
    def uses_budget(self) -> bool:
        return self.normalisation == "budget"


ALGORITHMS: dict[str, Algorithm] = {
    "c3po": Algorithm(normalisation="budget"),
    "grpo": Algorithm(normalisation="sequence"),
    "dapo": Algorithm(normalisation="token", clip_high=0.28, dynamic_sampling=True),
    "dr_grpo": Algorithm(normalisation="constant", advantage="centred"),
    # The paper's clip range of the sequence ratio, Section 5.1.
    "gspo": Algorithm(normalisation="sequence", ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    # It has no lower bound, as in the paper, which does not give the upper one: 5 is our choice.
    "cispo": Algorithm(normalisation="token", surrogate="cispo", clip_low=1.0, clip_high=4.0),
    # Responses of a phase are each other's baseline.
    "reinforce_pp": Algorithm(normalisation="token", advantage="batch_standardised"),
    "rloo": Algorithm(normalisation="sample", advantage="leave_one_out", surrogate="plain"),
}


def chosen_algorithm(section: AlgorithmSection) -> Algorithm:
    """Return the named algorithm with the parts that the configuration replaces."""
    preset = ALGORITHMS[section.name]
    replaced = {
        name: value
        for name in ("advantage", "surrogate", "ratio", "clip_low", "clip_high", "dynamic_sampling")
        if (value := getattr(section, name)) is not None
    }
    return dataclasses.replace(preset, **replaced)


def normalise(
    kind: str, loss_tokens: Sequence[Sequence[int]], *, budget: int, max_response_tokens: int
) -> tuple[list[list[float]], float]:
    """Return the weights of the samples' tokens and the denominator D of an optimizer step. The step minimises
    (1/D) * sum_i sum_s w_is * sum_t loss_ist over its samples i and their segments s.

        budget    w = 1                  D = Phi                            Eq. 2 of C3PO
        sequence  w = 1 / (S_i |y_is|)   D = number of samples              GRPO, GSPO: mean over samples of token means
        token     w = 1                  D = sum of |y_is|                  DAPO, CISPO: token mean
        constant  w = 1                  D = samples * longest response     Dr.GRPO: a constant instead of |y_i|
        sample    w = 1                  D = number of samples              RLOO: log-probability of whole responses

    The mean of a response of S_i segments is the mean of their means, so it counts as much as any other response.

    loss_tokens: |y_is|, tokens that carry loss, of each sample by segment; segments without any are left out. Without
    samples D is 1.
    """
    count, is_mean = len(loss_tokens), kind == "sequence"
    weights = [[1.0 / (len(segments) * n) if is_mean else 1.0 for n in segments] for segments in loss_tokens]
    denominators = {
        "budget": budget,
        "sequence": count,
        "token": sum(map(sum, loss_tokens)),
        "constant": count * max_response_tokens,
        "sample": count,
    }
    return weights, float(max(1, denominators[kind]))
