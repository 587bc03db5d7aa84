"""Chooses one of the measured candidates.

The paper (Ring-lite, arXiv 2506.14731v2) chooses among the epochs of its distillation by the policy's token entropy,
within 0.3 to 0.5, and not by a validation score. It gives entropies for three of them, and the averages over its
benchmarks after reinforcement learning for four:

    epoch            1      5      7      9
    entropy        0.489  0.351    -    0.275
    after RL       46.05  50.91  53.07  53.05

So of the two epochs whose entropy is known to be in the band, that of the lower entropy did better; the best is epoch
7, whose entropy it does not give, but which lies between two that straddle the lower end; and epoch 9, outside of the
band, did as well. The paper does not say how to choose between several in the band, nor what to do when there is
none. Hence our reading, and the default: the lowest entropy that is still in the band, and, when none is, the
nearest to it, which is said. Four epochs of one run are thin evidence: the rule can be set by `prefer` and `band`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rl.checkpoint.epochs import SFT_NOTE
from megatron_rl.evaluation.statistics import Estimate
from megatron_rl.selection.candidates import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Holds a candidate and what its responses show.

    entropy: in nats per token. accuracy: mean reward. truncated_share: of responses that ran into the limit of tokens.
    error_share: of responses that could not be judged, which count as wrong.
    """

    candidate: Candidate
    num_prompts: int
    samples_per_prompt: int
    num_tokens: int
    entropy: Estimate
    accuracy: Estimate
    truncated_share: float
    error_share: float

    @property
    def response_tokens_mean(self) -> float:
        return self.num_tokens / (self.num_prompts * self.samples_per_prompt)


Band = tuple[float, float]

# The candidate of the smallest value is chosen.
PREFERENCES: dict[str, Callable[[Measured], float]] = {
    "lowest": lambda one: one.entropy.value,
    "highest": lambda one: -one.entropy.value,
    "accuracy": lambda one: -one.accuracy.value,
    "validation_loss": lambda one: _validation_loss(one.candidate),
}


def choose(measured: Sequence[Measured], band: Band, prefer: str) -> tuple[Measured, bool]:
    """Return the chosen one, and whether it is in the band. Of equals the first."""
    inside = [one for one in measured if is_in(one.entropy.value, band)]
    if inside:
        return min(inside, key=PREFERENCES[prefer]), True
    return min(measured, key=lambda one: _distance(one.entropy.value, band)), False


def is_in(value: float, band: Band) -> bool:
    return band[0] <= value <= band[1]


def straddled_ends(entropy: Estimate, band: Band) -> list[float]:
    """Return the ends of the band that the interval holds: on which side of them the policy is cannot be told from the
    sample."""
    return [end for end in band if entropy.low < end < entropy.high]


def check_preference(candidates: Sequence[Candidate], prefer: str) -> None:
    """Raise ValueError when a candidate lacks what they are to be preferred by."""
    if prefer == "validation_loss":
        for candidate in candidates:
            _validation_loss(candidate)


def _validation_loss(candidate: Candidate) -> float:
    if candidate.sft.validation_loss is None:
        raise ValueError(
            f"prefer = 'validation_loss' needs a validation_loss in {candidate.path / SFT_NOTE}; run SFT with "
            "validation data, or set prefer to 'lowest', 'highest' or 'accuracy'"
        )
    return candidate.sft.validation_loss


def _distance(value: float, band: Band) -> float:
    return max(band[0] - value, value - band[1])
