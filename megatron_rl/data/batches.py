"""Divides chats into the optimizer steps of supervised fine-tuning: batches of whole chats in their order, and where
epochs end."""

from collections.abc import Iterable, Iterator


def batch_ends(lengths: Iterable[int], batch_tokens: int) -> Iterator[int]:
    """Yield after how many chats each batch ends. A batch has as many chats as `batch_tokens` tokens hold, at least
    one; the last has what is left. There is no last one where `lengths` go on for ever."""
    position = used = 0
    for length in lengths:
        if used and used + length > batch_tokens:
            yield position
            used = 0
        position += 1
        used += length
    if used:
        yield position


def epochs_ended(seen_before: int, seen_after: int, num_chats: int) -> range:
    """Return the epochs, from 1, whose last chat is in a batch. An epoch is `num_chats` chats, so the batch may hold
    the first chats of the next one too, or whole ones.

    seen_before, seen_after: chats since the start of training.
    """
    return range(seen_before // num_chats + 1, seen_after // num_chats + 1)
