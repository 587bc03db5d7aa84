"""Writes a checkpoint to the disk, in a thread beside training or while training waits."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_rl.checkpoint.checksums import Checksum
from megatron_rl.errors import SharedFault
from megatron_rl.sync.all_ranks import on_all_ranks
from megatron_rl.train.checkpointing.state import Part

# The results of `Part.write`, by rank.
Written = list[tuple[list[Any], dict[str, Checksum]]]


class Save:
    """Writes a checkpoint: every rank writes its part, then rank 0 finishes. Its collectives run on `group`, which
    nothing else may use.

    A thread and not a process: a fork of one that holds gloo's threads is unsafe, and a thread cannot outlive a kill.

    failure: why there will be no checkpoint; None until `done`, and when all went well.
    """

    def __init__(self, step: int, part: Part, finish: Callable[[Written], None], group: Any) -> None:
        """Prepare the save; `start` begins it. finish: called on rank 0 alone."""
        self.step, self.num_bytes = step, part.num_bytes
        self.failure: str | None = None
        self._part, self._finish, self._group = part, finish, group
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    def start(self, beside: bool) -> None:
        """Start the save. beside: return at once; otherwise return when it is done."""
        self._thread.start()
        if not beside:
            self.join()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            written = on_all_ranks(self._part.write, self._group)
            on_all_ranks(partial(self._finish, written) if dist.get_rank() == 0 else None, self._group)
        except SharedFault as fault:
            self.failure = str(fault)
        except Exception as error:  # a thread has nobody else to tell: gloo lost a rank or waited too long
            self.failure = f"the ranks lost each other: {error}"
