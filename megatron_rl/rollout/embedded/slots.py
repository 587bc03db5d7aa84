"""Keeps the state of the running sequences, one array element per slot, so a decode step costs no Python work per
request.

S slots. A running sequence of L tokens so far has keys and values for positions 0 .. L - 2 in the cache; `token` is
its last token, `position` = L - 1 the place where that token goes.
"""

import heapq

import numpy as np

from megatron_rl.rollout.embedded.sampling import SamplingRows
from megatron_rl.rollout.embedded.sequence import Sequence

MAX_STOP_IDS = 32


class SlotTable:
    """Knows which sequence runs in which slot, and holds the arrays that a step reads and writes."""

    def __init__(self, num_slots: int, context_length: int) -> None:
        self.sequences: list[Sequence | None] = [None] * num_slots
        self._free = list(range(num_slots))
        self.active = np.zeros(num_slots, bool)
        self.token = np.zeros(num_slots, np.int64)
        self.position = np.zeros(num_slots, np.int64)
        self.num_output = np.zeros(num_slots, np.int64)
        self.max_output = np.zeros(num_slots, np.int64)
        self.temperature = np.ones(num_slots, np.float32)
        self.top_p = np.ones(num_slots, np.float64)
        self.top_k = np.ones(num_slots, np.int64)
        self.seed = np.zeros(num_slots, np.uint64)
        self.stop = np.full((num_slots, MAX_STOP_IDS), -1, np.int64)
        self.output = np.zeros((num_slots, context_length), np.int32)
        self.logprob = np.zeros((num_slots, context_length), np.float32)
        self.num_active = 0
        self.num_streaming = 0
        self.num_routed = 0  # sequences whose experts are wanted
        self.num_with_stops = 0  # sequences with stop strings

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def used(self) -> int:
        """One more than the highest slot in use."""
        return int(np.flatnonzero(self.active)[-1]) + 1 if self.num_active else 0

    def running(self) -> list[Sequence]:
        """Return the running sequences in order of arrival."""
        return sorted((s for s in self.sequences if s is not None), key=lambda s: s.order)

    def take(self, sequence: Sequence) -> int:
        """Put a sequence into the lowest free slot, and return that slot."""
        slot = heapq.heappop(self._free)
        params, count = sequence.params, len(sequence.output_ids)
        self.sequences[slot] = sequence
        sequence.slot = slot
        self.active[slot] = True
        self.position[slot] = len(sequence.prompt) + count
        self.num_output[slot] = count
        self.max_output[slot] = params.max_new_tokens
        self.temperature[slot] = params.temperature
        self.top_p[slot] = params.top_p
        self.top_k[slot] = params.top_k
        self.seed[slot] = sequence.seed
        self.stop[slot] = -1
        self.stop[slot, : len(sequence.stop_ids)] = sequence.stop_ids
        self.output[slot, :count] = sequence.output_ids
        self.logprob[slot, :count] = sequence.output_logprobs
        self.num_active += 1
        self.num_streaming += sequence.stream
        self.num_routed += sequence.return_routed_experts
        self.num_with_stops += bool(params.stop)
        return slot

    def save(self, slot: int) -> Sequence:
        """Copy what the slot has generated into its sequence."""
        sequence = self.sequences[slot]
        assert sequence is not None
        count = self.num_output[slot]
        sequence.output_ids = self.output[slot, :count].tolist()
        sequence.output_logprobs = self.logprob[slot, :count].tolist()
        return sequence

    def tail(self, slot: int, count: int) -> list[int]:
        """Return the last tokens that were drawn for a slot, at most `count`."""
        end = int(self.num_output[slot])
        return list(self.output[slot, max(0, end - count) : end].tolist())

    def release(self, slot: int) -> Sequence:
        """Save the sequence and free its slot."""
        sequence = self.save(slot)
        self.sequences[slot] = None
        sequence.slot = None
        self.active[slot] = False
        self.num_active -= 1
        self.num_streaming -= sequence.stream
        self.num_routed -= sequence.return_routed_experts
        self.num_with_stops -= bool(sequence.params.stop)
        heapq.heappush(self._free, slot)
        return sequence

    def move(self, source: int) -> int:
        """Move the sequence of `source` to the lowest free slot, and return that slot. The caller copies its cache."""
        target, position, token = self._free[0], self.position[source], self.token[source]
        self.take(self.release(source))
        # take() assumes a sequence whose next token is not drawn yet.
        self.position[target], self.token[target] = position, token
        return target

    def move_below(self, limit: int) -> tuple[list[int], list[int], int]:
        """Move all sequences into slots below `limit`; the caller copies their memory.

        Returns (the slots they left, those they took, the most tokens that one of them has in the cache).
        """
        sources = [int(slot) for slot in np.flatnonzero(self.active) if slot >= limit]
        longest = int(self.position[sources].max())
        return sources, [self.move(slot) for slot in sources], longest

    def sampling_rows(self, rows: int) -> SamplingRows:
        """Return what sampling needs of slots 0 .. rows - 1. The token to draw has position `position` before, + 1
        after a decode pass."""
        return SamplingRows(
            temperature=self.temperature[:rows],
            top_p=self.top_p[:rows],
            top_k=self.top_k[:rows],
            seeds=self.seed[:rows],
            positions=self.position[:rows],
        )

    def record(self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Append the drawn tokens [n] to the sequences of `slots` [n]; returns the slots that are finished now."""
        count = self.num_output[slots]
        self.output[slots, count] = tokens
        self.logprob[slots, count] = logprobs
        self.token[slots] = tokens
        self.num_output[slots] = count + 1
        done = (count + 1 >= self.max_output[slots]) | (self.stop[slots] == tokens[:, None]).any(1)
        return slots[done]
