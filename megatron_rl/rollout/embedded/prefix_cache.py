"""Knows which slots hold the keys and values of which prompts, so that an identical prompt copies them."""

import numpy as np

from megatron_rl.rollout.embedded.sequence import Sequence

# The tokens, and whether the experts that were chosen for them are on record.
Key = tuple[bytes, bool]


class PrefixCache:
    """Remembers for each slot the tokens with which its memory starts, even after its sequence has left.

    Of slots with the same tokens only the first is remembered. Whoever writes into a slot drops it first.
    """

    def __init__(self) -> None:
        self._slot_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @staticmethod
    def key(sequence: Sequence) -> Key:
        """Return all tokens of a sequence, as this cache compares them."""
        return np.array(sequence.tokens, np.int32).tobytes(), sequence.return_routed_experts

    def find(self, key: Key) -> int | None:
        """Return the slot whose memory starts with these tokens; None where there is none."""
        return self._slot_of.get(key)

    def add(self, key: Key, slot: int) -> None:
        """Remember that the memory of the slot starts with these tokens, unless another slot's is known to."""
        if self._slot_of.setdefault(key, slot) == slot:
            self._key_of[slot] = key

    def drop(self, slot: int) -> None:
        """Forget the slot: its memory is about to change."""
        key = self._key_of.pop(slot, None)
        if key is not None:
            del self._slot_of[key]

    def clear(self) -> None:
        """Forget all slots: other weights would make other keys and values."""
        self._slot_of.clear()
        self._key_of.clear()
