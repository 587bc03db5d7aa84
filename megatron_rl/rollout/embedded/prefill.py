"""Fills the slots of new sequences: their tokens go through the model, CHUNK tokens an entry."""

import numpy as np
import torch
from torch import Tensor

from megatron_rl.rollout.embedded.cache import BLOCK
from megatron_rl.rollout.embedded.invariance import CHUNK, MIN_HEAD_ROWS
from megatron_rl.rollout.embedded.model import Batch
from megatron_rl.rollout.embedded.runner import ModelRunner
from megatron_rl.rollout.embedded.sequence import Sequence
from megatron_rl.rollout.embedded.slot_memory import SlotMemory


class _Rows:
    """Holds the rows of one pass, as arrays [entries, CHUNK]. Rows without a token have position 0 and the trash
    block."""

    def __init__(self, entries: list[tuple[Sequence, int]], size: int, trash_block: int) -> None:
        """Lay out the entries. entries: (sequence, its first token in the entry). size: at least as many."""
        self.tokens = np.zeros((size, CHUNK), np.int64)
        self.positions = np.zeros((size, CHUNK), np.int64)
        self.following = np.zeros((size, CHUNK), np.int64)  # the token after each, for input log-probs
        self.blocks = np.full((size, CHUNK), trash_block)
        self.slots = np.zeros(size, np.int64)
        self.last: list[int] = []  # rows of sequences' last tokens
        self.last_slots: list[int] = []
        for i, (sequence, start) in enumerate(entries):
            ids = sequence.tokens
            count = min(CHUNK, len(ids) - start)
            self.tokens[i, :count] = ids[start : start + count]
            after = ids[start + 1 : start + 1 + count]
            self.following[i, : len(after)] = after
            self.positions[i, :count] = np.arange(start, start + count)
            self.blocks[i, :count] = self.positions[i, :count] // BLOCK
            self.slots[i] = sequence.used_slot
            if start + count == len(ids):
                self.last.append(i * CHUNK + count - 1)
                self.last_slots.append(sequence.used_slot)

    def batch(self, routed: Tensor | None) -> Batch:
        return Batch(
            tokens=torch.from_numpy(self.tokens).flatten(),
            positions=torch.from_numpy(self.positions).flatten(),
            write_blocks=torch.from_numpy(self.blocks).flatten(),
            write_slots=torch.from_numpy(self.slots).repeat_interleave(CHUNK),
            entry_slots=torch.from_numpy(self.slots),
            num_queries=CHUNK,
            num_blocks=int(self.positions.max()) // BLOCK + 1,
            routed=routed,
        )


class Prefill:
    """Fills slots. It leaves there a cache for every token, and the logits after each sequence's last one."""

    def __init__(self, runner: ModelRunner, memory: SlotMemory) -> None:
        self._runner, self._memory = runner, memory

    def run(self, sequences: list[Sequence]) -> None:
        """Fill the slots that the sequences have taken."""
        entries = [(sequence, start) for sequence in sequences for start in range(0, sequence.num_tokens, CHUNK)]
        while entries:
            size = self._runner.prefill_entries(len(entries))
            self._pass(entries[:size], size)
            del entries[:size]

    def _pass(self, entries: list[tuple[Sequence, int]], size: int) -> None:
        runner, memory = self._runner, self._memory
        rows = _Rows(entries, size, memory.cache.trash_block)
        wants_experts = any(sequence.return_routed_experts for sequence, _ in entries)
        batch = rows.batch(memory.routing.new_rows(size * CHUNK) if wants_experts else None)
        hidden = runner.hidden(memory.cache, batch)
        if batch.routed is not None:
            real = (rows.blocks != memory.cache.trash_block).flatten()
            slots = rows.slots.repeat(CHUNK)[real]
            memory.routing.write(slots, rows.positions.flatten()[real], batch.routed[real])
        if rows.last:
            # A fixed number of rows, at least MIN_HEAD_ROWS: fillers repeat the first.
            fill = max(size, MIN_HEAD_ROWS) - len(rows.last)
            logits = runner.logits(hidden[rows.last + rows.last[:1] * fill])
            memory.prompt_logits[rows.last_slots] = logits[: len(rows.last)]
        if any(sequence.input_logprob_start is not None for sequence, _ in entries):
            logprobs = runner.logits(hidden).log_softmax(-1)
            taken = logprobs.gather(1, torch.from_numpy(rows.following).view(-1, 1)).view(size, CHUNK)
            _keep_input_logprobs(entries, taken)


def _keep_input_logprobs(entries: list[tuple[Sequence, int]], taken: Tensor) -> None:
    """Append log-probs of prompt[1:] chunk by chunk; `taken` [entries, CHUNK] is of the token after each row."""
    for i, (sequence, start) in enumerate(entries):
        if sequence.input_logprob_start is None or sequence.output_ids:
            continue
        if start == 0:
            sequence.input_logprobs = [float("nan")]
        assert sequence.input_logprobs is not None
        missing = len(sequence.prompt) - len(sequence.input_logprobs)
        sequence.input_logprobs += taken[i, : min(CHUNK, missing)].tolist()
