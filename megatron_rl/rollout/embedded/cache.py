"""Keeps keys and values: slots of fixed length, cut into blocks of BLOCK positions.

Blocks are the outermost axis after the layer, so the first blocks of the first slots are one contiguous piece and
memory that no sequence has reached is never touched. Attention works block by block with a fixed shape, which makes
its result independent of how long the other sequences are.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK = 64


class KVCache:
    """Holds keys [layers, blocks + 1, slots, nkv, d, BLOCK] and values [layers, blocks + 1, slots, nkv, BLOCK, d] in
    fp32.

    Keys are stored transposed, which the score product reads three times faster. The last block is where rows without a
    sequence write; nothing reads it. Always fp32: attention runs in fp32 in bfloat16 models too.
    """

    def __init__(self, *, num_layers: int, num_slots: int, num_kv_heads: int, head_dim: int, context_length: int):
        self.num_slots = num_slots
        self.num_blocks = -(-context_length // BLOCK)
        shape = (num_layers, self.num_blocks + 1, num_slots, num_kv_heads)
        self.keys = _lazy_zeros((*shape, head_dim, BLOCK))
        self.values = _lazy_zeros((*shape, BLOCK, head_dim))
        self._views: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    @staticmethod
    def num_bytes(*, num_layers: int, num_slots: int, num_kv_heads: int, head_dim: int, context_length: int) -> int:
        blocks = -(-context_length // BLOCK) + 1
        return 2 * 4 * num_layers * blocks * BLOCK * num_slots * num_kv_heads * head_dim

    def blocks(self, layer: int, num_slots: int) -> list[tuple[Tensor, Tensor]]:
        """Return views of the first `num_slots` slots, block by block: keys [slots nkv, d, BLOCK], values [.., BLOCK,
        d].

        The views are kept, because making them anew would cost a decode step as much as using them.
        """
        views = self._views.get((layer, num_slots))
        if views is None:
            views = [
                (self.keys[layer, b, :num_slots].flatten(0, 1), self.values[layer, b, :num_slots].flatten(0, 1))
                for b in range(self.num_blocks)
            ]
            self._views[layer, num_slots] = views
        return views

    def gather_blocks(self, layer: int, slots: Tensor, num_blocks: int) -> list[tuple[Tensor, Tensor]]:
        """Return copies of the given slots' blocks, shaped as those of `blocks`."""
        keys, values = self.keys[layer], self.values[layer]
        return [
            (keys[b].index_select(0, slots).flatten(0, 1), values[b].index_select(0, slots).flatten(0, 1))
            for b in range(num_blocks)
        ]

    @property
    def trash_block(self) -> int:
        return self.num_blocks

    def copy_slots(self, sources: list[int], targets: list[int], num_tokens: int) -> None:
        """Copy the first `num_tokens` positions (rounded up to blocks) of each source slot to its target slot."""
        blocks = -(-num_tokens // BLOCK)
        src, dst = torch.tensor(sources), torch.tensor(targets)
        for cache in (self.keys, self.values):
            view = cache[:, :blocks]
            view[:, :, dst] = view[:, :, src]

    def clear_slot(self, slot: int) -> None:
        """Zero a slot. Masked positions are multiplied by zero, so a leftover NaN would reach the next sequence."""
        self.keys[:, : self.num_blocks, slot] = 0
        self.values[:, : self.num_blocks, slot] = 0


def _lazy_zeros(shape: tuple[int, ...]) -> Tensor:
    """Return fp32 zeros, 64-byte aligned, whose pages the kernel hands out on first use (torch.zeros would touch them
    all)."""
    count = int(np.prod(shape))
    raw = np.zeros(count + 16, dtype=np.float32)
    skip = (-raw.ctypes.data % 64) // 4
    return torch.from_numpy(raw[skip : skip + count]).view(shape)
