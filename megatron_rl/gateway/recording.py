"""Records what a trajectory's requests had the policy read and write: token ids, and which of them the policy sampled.

A request's tokens are its context, which the policy read, and what it sampled behind that. Where a context begins with
all tokens of a segment, the segment goes on; otherwise a new one begins, whose context is read only. So what the policy
sampled is in the output of one segment, as it was sampled, and in others at most among what was read.
"""

from dataclasses import dataclass

import numpy as np

from megatron_rl.records import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Holds what the policy sampled for one request.

    context_ids: int32 [c], what it read. output_ids: int32 [n]. logprobs: float32 [n]. policy_versions: int32 [n].
    finish_reason: "stop" or "length"; "" while it is not whole.
    routed_experts: uint8 [c + n - 1, layers, topk], of all tokens but the last; None where nobody asked for them.
    """

    context_ids: np.ndarray
    output_ids: np.ndarray
    logprobs: np.ndarray
    policy_versions: np.ndarray
    finish_reason: str
    routed_experts: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Marks the place behind a turn: the first `end` tokens of the segment with that number."""

    segment: int
    end: int


class Recording:
    """Holds the segments of one trajectory, in the order in which they began."""

    def __init__(self) -> None:
        self._segments: list[_Growing] = []
        self.num_policy_tokens = 0

    @property
    def num_segments(self) -> int:
        return len(self._segments)

    @property
    def num_turns(self) -> int:
        return sum(len(segment.turns) for segment in self._segments)

    def add(self, turn: Turn) -> Place:
        """Append a turn of at least one token. Return where it ends."""
        number = self._continued(turn.context_ids)
        if number is None:
            self._segments.append(_Growing(len(turn.context_ids)))
            number = len(self._segments) - 1
        segment = self._segments[number]
        segment.add(turn)
        self.num_policy_tokens += len(turn.output_ids)
        return Place(number, segment.length)

    def ids_up_to(self, place: Place) -> np.ndarray:
        """Return the token ids up to a place, int32 [place.end]."""
        return self._segments[place.segment].ids()[: place.end]

    def segments(self) -> tuple[Segment, ...]:
        return tuple(segment.whole() for segment in self._segments)

    def _continued(self, context_ids: np.ndarray) -> int | None:
        """Return the number of the latest segment of which the context has all tokens at its beginning; None where
        there is none."""
        for number in reversed(range(len(self._segments))):
            segment = self._segments[number]
            if segment.length <= len(context_ids) and np.array_equal(segment.ids(), context_ids[: segment.length]):
                return number
        return None


class _Growing:
    """Holds a segment that may go on. Its arrays are put together when somebody wants them, not at every turn."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self.length, self._num_prompt_tokens = 0, num_prompt_tokens
        self.turns: list[tuple[int, int]] = []
        self._ids: list[np.ndarray] = []
        self._logprobs: list[np.ndarray] = []
        self._versions: list[np.ndarray] = []
        self._routed_experts: np.ndarray | None = None

    def add(self, turn: Turn) -> None:
        """Append a turn whose context begins with all tokens that are here."""
        self._ids += [turn.context_ids[self.length :], turn.output_ids]
        self._logprobs.append(turn.logprobs)
        self._versions.append(turn.policy_versions)
        start = len(turn.context_ids) - self._num_prompt_tokens
        self.turns.append((start, start + len(turn.output_ids)))
        self.length = len(turn.context_ids) + len(turn.output_ids)
        self._routed_experts = turn.routed_experts

    def ids(self) -> np.ndarray:
        return _joined(self._ids)

    def whole(self) -> Segment:
        ids = self.ids()
        return Segment(
            prompt_ids=ids[: self._num_prompt_tokens],
            output_ids=ids[self._num_prompt_tokens :],
            rollout_logprobs=_joined(self._logprobs),
            policy_versions=_joined(self._versions),
            turns=np.array(self.turns, np.int32),
            routed_experts=self._routed_experts,
        )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Return one array of the parts, which takes their place."""
    if len(parts) > 1:
        parts[:] = [np.concatenate(parts)]
    return parts[0]
