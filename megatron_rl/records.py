"""This module holds the records that cross the boundaries of the package. They are frozen, keyword-only and without
torch.

Vocabulary: a *prompt* is sampled K times into a *group* of *responses*; a scored response becomes a *sample* once it
has a reward and an advantage. An agent's response is a *trajectory*: many turns, in one *segment* or several. A
response may be sampled in parts, over several phases; until it ends it is *unfinished*. A *plan* says which samples a
train phase uses, how many of each response's tokens carry loss, and where they run (docs/agents.md, "What is trained").
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Holds one sequence of a response: a prompt and what follows it, some of which the policy may not have sampled.

    Policy tokens are those that the policy sampled. Others of an agent's turns are a tool's results, the user's next
    message, and what the chat template writes around them.

    prompt_ids: int32 [prompt_tokens], at least one.
    output_ids: int32 [output_tokens], the end-of-sequence token included when it was generated.
    rollout_logprobs: float32 [policy_tokens], log-probabilities under the sampling policy at the sampling temperature.
    policy_versions: int32 [policy_tokens], the weights that sampled each token; never decreasing.
    turns: int32 [turns, 2], where in `output_ids` the policy tokens of each request begin and end, in order; None where
        all of them were sampled in one.
    routed_experts: uint8 [prompt_tokens + output_tokens - 1, layers, topk], the experts that the server chose at every
        position but the last, 0 in dense layers; None where it was not asked for them, and while the response is
        unfinished. A response that went on under new weights has the new weights' experts throughout: its tokens so far
        were put through them again.
    teacher_logprobs: float32 [policy_tokens], log-probabilities of the same tokens under a teacher policy at
        temperature 1; None without a teacher, and while the response is unfinished.
    """

    prompt_ids: np.ndarray
    output_ids: np.ndarray
    rollout_logprobs: np.ndarray
    policy_versions: np.ndarray
    turns: np.ndarray | None = None
    routed_experts: np.ndarray | None = None
    teacher_logprobs: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = len(self.output_ids)
        if self.turns is not None:
            bounds = np.concatenate([[0], self.turns.ravel(), [count]])
            assert (np.diff(bounds) >= 0).all() and (self.turns[:, 0] < self.turns[:, 1]).all(), self.turns.tolist()
            count = int((self.turns[:, 1] - self.turns[:, 0]).sum())
        found = len(self.rollout_logprobs), len(self.policy_versions)
        assert found == (count, count), f"{count} policy tokens have {found} log-probs and versions"
        assert self.teacher_logprobs is None or len(self.teacher_logprobs) == count, len(self.teacher_logprobs)

    @property
    def num_policy_tokens(self) -> int:
        return len(self.rollout_logprobs)

    @property
    def num_turns(self) -> int:
        return 1 if self.turns is None else len(self.turns)

    @property
    def policy_mask(self) -> np.ndarray:
        """The mask of policy tokens: bool [output_tokens], True at them."""
        mask = np.full(len(self.output_ids), self.turns is None)
        for start, stop in () if self.turns is None else self.turns.tolist():
            mask[start:stop] = True
        return mask

    def num_output_tokens_up_to(self, num_policy_tokens: int) -> int:
        """Count the output tokens up to and including the policy token of that number, from 1; 0 for 0."""
        if self.turns is None or not num_policy_tokens:
            return num_policy_tokens
        ends = np.cumsum(self.turns[:, 1] - self.turns[:, 0])
        turn = int(np.searchsorted(ends, num_policy_tokens))
        return int(self.turns[turn, 1] - (ends[turn] - num_policy_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """Holds one answer to a prompt: a continuation, or the trajectory of an agent over many turns.

    prompt_id: the prompt's position in the data, unique in a run.
    sample_index: 0..K-1 within the group.
    segments: its sequences, in order. A trajectory has several where its history did not go on as it was sampled (a
        chat template that strips thinking, an agent that changes what was said), and none where the agent asked the
        policy nothing. A policy token is in the output of one of them, and may come again in later prompts.
    finish_reason: "stop" or "length"; an agent's may end otherwise. "" while it is unfinished.
    text: what rewards judge and files of responses show; None where nobody has decoded it. Journals and checkpoints
        keep that of trajectories alone.
    """

    prompt_id: int
    sample_index: int
    segments: tuple[Segment, ...]
    finish_reason: str
    text: str | None = None

    @property
    def is_plain(self) -> bool:
        """Tell whether it is one continuation of one prompt, and no trajectory."""
        return len(self.segments) == 1 and self.segments[0].turns is None

    @property
    def num_policy_tokens(self) -> int:
        """Count the policy tokens, as budgets do."""
        return sum(segment.num_policy_tokens for segment in self.segments)

    @property
    def num_masked_tokens(self) -> int:
        """Count the output tokens that the policy did not sample."""
        return sum(len(segment.output_ids) - segment.num_policy_tokens for segment in self.segments)

    @property
    def num_turns(self) -> int:
        return sum(segment.num_turns for segment in self.segments)

    @property
    def rollout_logprobs(self) -> np.ndarray:
        """Join the log-probs under the sampling policy of all segments, float32 [policy_tokens]."""
        return _joined([segment.rollout_logprobs for segment in self.segments], np.float32)

    @property
    def teacher_logprobs(self) -> np.ndarray | None:
        """Join the teacher's log-probs of all segments, float32 [policy_tokens]; None without a teacher."""
        parts = [s.teacher_logprobs for s in self.segments if s.teacher_logprobs is not None]
        return _joined(parts, np.float32) if parts and len(parts) == len(self.segments) else None

    @property
    def policy_versions(self) -> np.ndarray:
        """Join the policy versions of all segments, int32 [policy_tokens]."""
        return _joined([segment.policy_versions for segment in self.segments], np.int32)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype), *parts])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Holds a response with its verdict. A trajectory of several segments has one reward.

    reward: in the task's units (0 or 1 for verifiable tasks). reason, details, parts: see reward/verdict.py.
    advantage: what the reward gives every token. teacher_coefficient: beta of what a teacher adds to that, token by
        token, in the step that is planned.
    """

    response: Response
    reward: float
    reason: str
    advantage: float
    details: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    teacher_coefficient: float = 0.0

    def token_advantages(self, segment: int) -> np.ndarray:
        """Work out the advantage of each token of a segment, float64 [policy_tokens]: A + beta * (log p_teacher -
        log p_student), where the student's log-prob is that of the weights that sampled."""
        own = self.response.segments[segment]
        advantages = np.full(own.num_policy_tokens, self.advantage, np.float64)
        if self.teacher_coefficient:
            assert own.teacher_logprobs is not None, f"no teacher has scored {self.id}"
            wide = own.teacher_logprobs.astype(np.float64)
            advantages += self.teacher_coefficient * (wide - own.rollout_logprobs)
        return advantages

    @property
    def id(self) -> tuple[int, int]:
        return self.response.prompt_id, self.response.sample_index


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Holds all K samples of one prompt."""

    prompt_id: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedGroup:
    """Holds a group of which some responses had not ended when the rollout phase did (C3PO++).

    responses: all K, finished or not; one that never started has no tokens.
    retention: the number of rollout phases that it has been kept over.
    """

    prompt_id: int
    responses: tuple[Response, ...]
    retention: int

    @property
    def num_policy_tokens(self) -> int:
        return sum(response.num_policy_tokens for response in self.responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """Describes one sequence's part in an optimizer step: a segment of a sample.

    index: the sample's position in the step's sample list (the store on rank 0). segment: which one of its segments.
    num_prompt_tokens, num_output_tokens: the sequence that is forwarded is the prompt and the first `num_output_tokens`
        tokens of the output, the last of which carries loss; what was cut behind it influences nothing before it.
    num_loss_tokens: so many of these output tokens carry loss: the policy's.
    loss_scale: multiplies every loss token of this sequence: 1 for C3PO, 1 / policy tokens for GRPO's mean; see
        c3po/algorithms.py.
    num_stale_tokens: so many of its first loss tokens were sampled by weights older than those that this optimizer step
        starts from; the others by these.
    """

    index: int
    segment: int = 0
    num_prompt_tokens: int
    num_output_tokens: int
    num_loss_tokens: int
    loss_scale: float
    num_stale_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def has_gaps(self) -> bool:
        """Tell whether output tokens without loss lie between those with loss."""
        return self.num_loss_tokens < self.num_output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Describes one optimizer step.

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
    """Describes what one train phase does: its optimizer steps, in order.

    traced: the positions, in the step's sample list, of the samples whose tokens' log-probs are written down
    (train/step/token_traces.py).
    """

    steps: tuple[StepPlan, ...]
    traced: tuple[int, ...] = ()
