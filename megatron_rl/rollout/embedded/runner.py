"""Runs the network with the weights that it serves, over the sizes of batches that were found to give the same bits."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.families import Architecture
from megatron_rl.rollout.embedded.cache import KVCache
from megatron_rl.rollout.embedded.invariance import check_invariance
from megatron_rl.rollout.embedded.load import load_weights
from megatron_rl.rollout.embedded.model import Batch, EmbeddedModel
from megatron_rl.rollout.embedded.weights import ModelWeights

log = logging.getLogger(__name__)


class ModelRunner:
    """Owns the network and its weights, and puts batches through it. Whoever sets `weights` makes it serve other
    ones."""

    def __init__(
        self, config: Architecture, model_path: str, *, dtype: torch.dtype, num_slots: int, context_length: int
    ) -> None:
        self._config, self._dtype = config, dtype
        self._model = EmbeddedModel(config, dtype=dtype, context_length=context_length)
        self.weights = load_weights(model_path, config, dtype)
        self.row_counts = check_invariance(self._model, self.weights, num_slots)
        if not self.row_counts.invariant:
            log.warning(
                "this machine's matrix products are not batch invariant for this model: results may depend "
                "on what else is in the batch"
            )

    def load(self, model_path: Path) -> ModelWeights:
        """Read and check new weights, in any thread; those that are served stay in place."""
        with torch.inference_mode():
            return load_weights(model_path, self._config, self._dtype)

    def hidden(self, cache: KVCache, batch: Batch) -> Tensor:
        """Return the hidden states of the rows, [R, H], and write their keys and values into the cache."""
        return self._model.hidden(self.weights, cache, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits: [R, H] -> fp32 [R, V]."""
        return self._model.logits(self.weights, hidden)

    def decode_rows(self, num_slots: int) -> int:
        """Return the size of a decode step over the first `num_slots` slots."""
        return next(count for count in self.row_counts.decode if count >= num_slots)

    def prefill_entries(self, wanted: int) -> int:
        """Return the size of a prefill pass for `wanted` entries; the largest one takes the first of them."""
        sizes = self.row_counts.prefill_entries
        return next((size for size in sizes if size >= wanted), sizes[-1])
