"""Queues the sequences that wait for a slot, and decides whose turn it is."""

import heapq
from collections.abc import Callable, Iterable, Iterator

from megatron_rl.rollout.embedded.sequence import Sequence

# So many of a request come in the order of the requests; what is more waits until everybody else had as many.
SHARE = 256


class WaitingQueue:
    """Serves first come, first served, in turns: no request with thousands of sequences keeps another one waiting for
    all."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        """Return all sequences, in no particular order."""
        return (sequence for _, _, sequence in self._heap)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Put sequences where their `turn` and `order` say, so that one that ran before comes back to its place."""
        for sequence in sequences:
            heapq.heappush(self._heap, (sequence.turn, sequence.order, sequence))

    def take(self) -> Sequence:
        """Take the next sequence out of the queue."""
        return heapq.heappop(self._heap)[2]

    def remove_where(self, chosen: Callable[[Sequence], bool]) -> list[Sequence]:
        """Take the chosen sequences out, wherever they are. Return them in order."""
        removed = [entry for entry in self._heap if chosen(entry[2])]
        if removed:
            self._heap = [entry for entry in self._heap if not chosen(entry[2])]
            heapq.heapify(self._heap)
        return [sequence for _, _, sequence in sorted(removed)]
