"""Makes a folder through which weights travel from the trainer to servers: in memory, or where all nodes see it."""

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
from megatron_rl.sync.all_ranks import broadcast_object

log = logging.getLogger(__name__)

_LOCK = "lock"


class WeightFolder:
    """Owns a folder, the same on every rank; `path` is the newest whole model directory in it.

    Rank 0 holds a lock on a file in it for as long as it lives, so that the next run can tell what a killed one left in
    memory from what another run is using, and remove it.
    """

    def __init__(self, control: Any, num_bytes: int, shared: Path | None) -> None:
        """Make the folder. Collective over the gloo group `control`. num_bytes: of one export; for a moment there are
        two. shared: a directory that every node sees, in which the folder is to be; None on one machine."""
        made = ""
        if dist.get_rank() == 0:
            parent = shared or _memory(num_bytes)
            _remove_abandoned(parent)
            made = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)  # mode 0700
            self._lock = (Path(made) / _LOCK).open("x", encoding="utf-8")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._folder = Path(broadcast_object(made, 0, control))
        self.path = self._folder / "weights"

    def close(self) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.close()


def _memory(num_bytes: int) -> Path:
    """Return /dev/shm, or the temporary directory where there is no room for two copies."""
    memory = Path("/dev/shm")
    if memory.is_dir():
        _remove_abandoned(memory)
        if shutil.disk_usage(memory).free > 2.2 * num_bytes:
            return memory
    log.warning("%s has no room for two copies of the weights; they go through %s", memory, gettempdir())
    return Path(gettempdir())


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user whose lock nobody holds. Anybody may put such a name into /dev/shm, as a link to
    a folder or file of ours too; what is not our own folder with our own lock stays as it is."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:  # OSError: a link, or somebody holds it
            inside = _own(opened, folder, os.O_RDONLY | os.O_DIRECTORY)
            lock = _own(opened, _LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, inside)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)


def _own(opened: contextlib.ExitStack, path: Path | str, flags: int, folder: int | None = None) -> int:
    """Open what this user owns, and return the descriptor. Raise OSError for a link, and for what is somebody
    else's."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    opened.callback(os.close, descriptor)
    if os.fstat(descriptor).st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    return descriptor
