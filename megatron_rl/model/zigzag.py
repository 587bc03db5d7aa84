"""This module says which positions of a sequence each context-parallel rank holds.

A sequence is padded to a multiple of 2 * size and cut into 2 * size chunks; rank r holds chunk r and chunk
2 * size - 1 - r, in this order. Under a causal mask a late chunk costs more than an early one; the pairs all cost the
same.
"""

from collections.abc import Sequence

import numpy as np


def padded_length(length: int, size: int) -> int:
    """Return the tokens of a sequence with its padding, which comes at its end; a single rank needs no padding."""
    return length if size == 1 else -(-length // (2 * size)) * 2 * size


def held_positions(length: int, size: int) -> np.ndarray:
    """Return int64 [size, length / size]: row r has the positions that rank r holds, in its order.

    length: a padded length.
    """
    if size == 1:
        return np.arange(length)[None]
    chunks = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([chunks[:size], chunks[: size - 1 : -1]], axis=1)


def merge(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return one value per position, from those that each rank holds: the inverse of indexing with `held_positions`."""
    rows = np.stack(parts)
    whole = np.empty_like(rows, shape=rows.size)
    whole[held_positions(rows.size, len(rows))] = rows
    return whole
