"""The records that cross the boundaries of the package: frozen, keyword-only, without torch.

Vocabulary: a *prompt* is sampled K times into a *group* of *responses*; a scored response becomes a *sample* once it
has a reward and an advantage. A response may be sampled in parts, over several phases; until it ends it is
*unfinished*. A *plan* says which samples a train phase uses, how many of each response's tokens carry loss, and where
they run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One sampled continuation of a prompt.

    prompt_id: the prompt's position in the data, unique in a run.
    sample_index: 0..K-1 within the group.
    prompt_ids: int32 [prompt_tokens].
    output_ids: int32 [output_tokens], the end-of-sequence token included when it was generated.
    rollout_logprobs: float32 [output_tokens], log-probabilities under the sampling policy at the sampling temperature.
    policy_versions: int32 [output_tokens], the weights that sampled each token; never decreasing.
    finish_reason: "stop" or "length"; "" while it is unfinished.
    routed_experts: uint8 [prompt_tokens + output_tokens - 1, layers, topk], the experts that the server chose at every
        position but the last, 0 in dense layers; None where it was not asked for them, and while it is unfinished. A
        response that went on under new weights has those of the new ones throughout: its tokens so far were put through
        them again.
    text: what rewards judge and files of responses show; None where nobody has decoded it. Journals and checkpoints do
        not keep it.
    """

    prompt_id: int
    sample_index: int
    prompt_ids: np.ndarray
    output_ids: np.ndarray
    rollout_logprobs: np.ndarray
    policy_versions: np.ndarray
    finish_reason: str
    routed_experts: np.ndarray | None = None
    text: str | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_ids)

    @property
    def policy_version(self) -> int:
        """The weights that sampled its last token."""
        return int(self.policy_versions[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A response with its verdict.

    reward: in the task's units (0 or 1 for verifiable tasks). reason, details, parts: see reward/verdict.py.
    """

    response: Response
    reward: float
    reason: str
    advantage: float
    details: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def id(self) -> tuple[int, int]:
        return self.response.prompt_id, self.response.sample_index


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All K samples of one prompt."""

    prompt_id: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedGroup:
    """A group of which some responses had not ended when the rollout phase did (C3PO++).

    responses: all K, finished or not; one that never started has no tokens.
    retention: rollout phases that it has been kept over.
    """

    prompt_id: int
    responses: tuple[Response, ...]
    retention: int

    @property
    def num_output_tokens(self) -> int:
        return sum(response.num_output_tokens for response in self.responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """One sample's part in an optimizer step.

    index: position in the step's sample list (the store on rank 0).
    num_prompt_tokens, num_loss_tokens: the sequence that is forwarded is the prompt and the first `num_loss_tokens`
        tokens of the response; what was cut behind them influences nothing before it.
    loss_scale: multiplies every loss token of this sample: 1 for C3PO, 1 / output_tokens for GRPO's per-sequence mean,
        0 where it is masked.
    num_stale_tokens: so many of its first loss tokens were sampled by weights older than those that this optimizer step
        starts from; the others by these.
    """

    index: int
    num_prompt_tokens: int
    num_loss_tokens: int
    loss_scale: float
    num_stale_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_loss_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One optimizer step.

    denominator: divides the sum over all loss tokens: Phi for C3PO; see c3po/algorithms.py for the others.
    micro_batches: `[dp_rank][i]` lists positions in `selected`; every rank has equally many, some perhaps empty.
    """

    denominator: float
    selected: tuple[Selected, ...]
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_loss_tokens(self) -> int:
        return sum(s.num_loss_tokens for s in self.selected)

    @property
    def num_forward_tokens(self) -> int:
        return sum(s.num_tokens for s in self.selected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one train phase does: its optimizer steps, in order.

    traced: positions in the step's sample list of those whose tokens' log-probs are written down
    (train/step/token_traces.py).
    """

    steps: tuple[StepPlan, ...]
    traced: tuple[int, ...] = ()
