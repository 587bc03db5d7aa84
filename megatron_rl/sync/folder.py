"""A folder through which weights travel from the trainer to servers: in memory, or where all nodes see it."""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch.distributed as dist

from megatron_rl.rollout.embedded.weight_roots import WEIGHT_FOLDER_PREFIX as _PREFIX

log = logging.getLogger(__name__)

_LOCK = "lock"


class WeightFolder:
    """Owns a folder, the same on every rank; `path` is the newest whole model directory in it.

    Rank 0 holds a lock on a file in it for as long as it lives, so that the next run can tell what a killed one left in
    memory from what another run is using, and remove it.
    """

    def __init__(self, control: Any, num_bytes: int, shared: Path | None) -> None:
        """Collective over the gloo group `control`. num_bytes: of one export; for a moment there are two. shared: a
        directory that every node sees, in which the folder is to be; None on one machine."""
        made: list[Any] = [None]
        if dist.get_rank() == 0:
            parent = shared or _memory(num_bytes)
            _remove_abandoned(parent)
            made = [tempfile.mkdtemp(prefix=_PREFIX, dir=parent)]
            self._lock = (Path(made[0]) / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        dist.broadcast_object_list(made, src=0, group=control)
        self._folder = Path(made[0])
        self.path = self._folder / "weights"

    def close(self) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.close()


def _memory(num_bytes: int) -> Path:
    """/dev/shm, or the temporary directory where there is no room for two copies."""
    memory = Path("/dev/shm")
    if memory.is_dir():
        _remove_abandoned(memory)
        if shutil.disk_usage(memory).free > 2.2 * num_bytes:
            return memory
    log.warning("%s has no room for two copies of the weights; they go through %s", memory, gettempdir())
    return Path(gettempdir())


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's folder, or a lock that its owner holds
            if folder.stat().st_uid == os.getuid():
                with (folder / _LOCK).open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
