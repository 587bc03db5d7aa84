"""Makes a rank's part of a micro-batch, in a size for tests."""

import torch

from megatron_rl.families import Rotary
from megatron_rl.rotary import frequencies
from megatron_rl.train.step.batch import MicroBatch, TrainSequence, make_micro_batch


def micro_batch(sequences: list[TrainSequence], multiple_of: int, rank: int, size: int) -> MicroBatch:
    """Return the micro-batch of these sequences for context-parallel rank `rank` of `size`."""
    return make_micro_batch(
        sequences,
        multiple_of=multiple_of,
        rotary=frequencies(Rotary(), head_dim=8),
        dtype=torch.float32,
        device=torch.device("cpu"),
        context_rank=rank,
        context_size=size,
    )
