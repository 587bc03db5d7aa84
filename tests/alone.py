"""Makes a training world of this process alone, for tests that build a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_rl.config.layout import Layout
from megatron_rl.model.build import initialize_parallel, mpu

ALONE = Layout(world_size=1)


@contextmanager
def world() -> Iterator[None]:
    """Make this process a world of one rank inside the block."""
    initialize_parallel(ALONE, deadline_seconds=600, seed=0)
    try:
        yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
