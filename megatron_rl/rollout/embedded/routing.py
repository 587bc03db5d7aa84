"""Records the experts that were chosen for the cached positions of each slot."""

import numpy as np
import torch
from torch import Tensor


class RoutingRecord:
    """Holds uint8 [slots, context, layers, topk], beside the KV cache: it is written, copied and overwritten where that
    is.

    A dense layer has zeros, as SGLang answers. Only positions that were written count; pages that nobody writes take
    no memory.
    """

    def __init__(self, *, num_slots: int, context_length: int, num_layers: int, topk: int) -> None:
        self._experts = np.zeros((num_slots, context_length, num_layers, topk), np.uint8)

    def new_rows(self, count: int) -> Tensor:
        """Return where a forward pass over `count` rows puts its choices, [count, layers, topk]."""
        return torch.zeros(count, *self._experts.shape[2:], dtype=torch.uint8)

    def write(self, slots: np.ndarray, positions: np.ndarray, rows: Tensor) -> None:
        """Record the choices of some rows. slots, positions: [n]; rows: [n, layers, topk]."""
        self._experts[slots, positions] = rows.numpy()

    def read(self, slot: int, num_tokens: int) -> np.ndarray:
        """Return a copy of the first `num_tokens` positions of a slot."""
        return self._experts[slot, :num_tokens].copy()

    def copy_slots(self, sources: list[int], targets: list[int], num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of each source slot to its target slot."""
        self._experts[targets, :num_tokens] = self._experts[sources, :num_tokens]
