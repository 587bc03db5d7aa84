"""This module locks files and folders that one process at a time may write."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def sole_writer(path: Path, remedy: str) -> Iterator[None]:
    """Lock a folder, or a file, which is made if need be. Enter it before looking at the content. A file system without
    locks is warned of.

    remedy: what to do instead of waiting. Raise ValueError, whose message ends in it, while another process holds the
    lock. Raise it too for a link that another user made: it may lead to any file of ours.
    """
    if path.is_symlink() and (owner := path.lstat().st_uid) not in (os.geteuid(), 0):
        raise ValueError(f"{path} is a link that another user made (user id {owner}); remove it, or {remedy}")
    handle = os.open(path, os.O_RDONLY | (0 if path.is_dir() else os.O_CREAT), 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
        except BlockingIOError:
            raise ValueError(f"another process is writing to {path}; wait for it, or {remedy}") from None
        except OSError as error:
            message = "%s cannot be locked (%s): nothing keeps a second process from writing to it"
            log.warning(message, path, error.strerror)
        yield
    finally:
        os.close(handle)
