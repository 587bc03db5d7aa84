"""A folder in memory through which weights travel from the trainer to servers on the same machine."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

_PREFIX = "megatron_rl-weights-"


class WeightFolder:
    """Owns a memory-backed folder, the same on every rank; `path` is the newest whole model directory in it.

    The folder's name carries rank 0's process id: what a killed run left in memory is removed by the next one.
    """

    def __init__(self, control: Any) -> None:
        """Collective over the gloo group `control`."""
        shared: list[Any] = [None]
        if dist.get_rank() == 0:
            memory = Path("/dev/shm")
            parent = memory if memory.is_dir() else Path(tempfile.gettempdir())
            _remove_abandoned(parent)
            shared = [tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)]
        dist.broadcast_object_list(shared, src=0, group=control)
        self._folder = Path(shared[0])
        self.path = self._folder / "weights"

    def write(self, export: Callable[[Path], None]) -> None:
        """Collective: `export` writes a model directory to `path`, replacing the last one."""
        export(self.path)

    def close(self) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and folder.owner() == Path("/proc/self").owner():
            shutil.rmtree(folder, ignore_errors=True)
