"""Runs one decode step: the next token of every running sequence."""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_rl.rollout.embedded.cache import BLOCK
from megatron_rl.rollout.embedded.model import Batch
from megatron_rl.rollout.embedded.runner import ModelRunner
from megatron_rl.rollout.embedded.sampling import sample
from megatron_rl.rollout.embedded.slot_memory import SlotMemory
from megatron_rl.rollout.embedded.slots import SlotTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Holds the tokens that were drawn for some slots, n of them."""

    slots: np.ndarray  # [n] int64
    tokens: np.ndarray  # [n] int64
    logprobs: np.ndarray  # [n] float32

    def where(self, chosen: np.ndarray) -> "Drawn":
        """Keep those that are `chosen` [n]."""
        return Drawn(slots=self.slots[chosen], tokens=self.tokens[chosen], logprobs=self.logprobs[chosen])


class Decode:
    """Draws tokens for slots: the first one after a prefill, and one for each running sequence in a step."""

    def __init__(self, runner: ModelRunner, memory: SlotMemory, table: SlotTable) -> None:
        self._runner, self._memory, self._table = runner, memory, table

    def first(self, slots: np.ndarray) -> Drawn:
        """Draw the first token of `slots` [n] from the logits after their prompts."""
        rows = self._runner.decode_rows(int(slots.max()) + 1)
        tokens, logprobs = sample(self._memory.prompt_logits[:rows], self._table.sampling_rows(rows))
        return Drawn(slots=slots, tokens=tokens[slots], logprobs=logprobs[slots])

    def step(self) -> Drawn:
        """Put the last token of every running sequence through the model and draw its next one."""
        table, memory = self._table, self._memory
        rows = self._runner.decode_rows(table.used)
        active = table.active[:rows]
        positions = np.where(active, table.position[:rows], 0)
        batch = Batch(
            tokens=torch.from_numpy(np.where(active, table.token[:rows], 0)),
            positions=torch.from_numpy(positions),
            write_blocks=torch.from_numpy(np.where(active, positions // BLOCK, memory.cache.trash_block)),
            write_slots=torch.arange(rows),
            entry_slots=None,
            num_queries=1,
            num_blocks=int(positions.max()) // BLOCK + 1,
            routed=memory.routing.new_rows(rows) if table.num_routed else None,
        )
        logits = self._runner.logits(self._runner.hidden(memory.cache, batch))
        slots = np.flatnonzero(active)
        if batch.routed is not None:
            memory.routing.write(slots, positions[active], batch.routed[active])
        table.position[:rows][active] += 1
        tokens, logprobs = sample(logits, table.sampling_rows(rows))
        return Drawn(slots=slots, tokens=tokens[slots], logprobs=logprobs[slots])
