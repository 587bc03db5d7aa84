"""Makes a file system of a few megabytes, on machines where a test may mount one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_MOUNT = "mounting a small tmpfs needs root and CAP_SYS_ADMIN"


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[bool]:
    """Mount a small file system on `folder`. Yield False, with a plain folder, when mounting is not allowed."""
    folder.mkdir(parents=True)
    mounted = os.geteuid() == 0 and _mount(f"size={num_bytes}", "-t", "tmpfs", "tmpfs", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, num_bytes: int) -> None:
    assert _mount(f"remount,size={num_bytes}", str(folder))


def _mount(options: str, *arguments: str) -> bool:
    return subprocess.run(["mount", "-o", options, *arguments], check=False, capture_output=True).returncode == 0
