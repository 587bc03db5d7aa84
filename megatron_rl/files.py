"""Look at and open the files of a model directory that somebody else made.

None may lead out of the directory, and none may be anything but a file.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def model_files(directory: Path, folder: str = "") -> list[Path]:
    """List the files of a model directory, or of a folder in it, by name. Folders below are not looked at.

    A link may lead to a file of the directory. It may also lead to the blobs of Hugging Face's cache, where the
    directory is a snapshot in it. ValueError names any other link, one that leads nowhere, and what is neither a file
    nor a folder: who opens a FIFO waits for ever.
    """
    found = []
    for file in sorted((directory / folder).iterdir()):
        real = os.path.realpath(file)
        _refuse_outside(file, real, directory)
        try:
            mode = os.stat(real).st_mode
        except FileNotFoundError:
            raise ValueError(f"{file} leads to {real}, where there is nothing; fetch it again, or remove it") from None
        if not stat.S_ISDIR(mode):
            _refuse_special(file, mode)
            found.append(file)
    return found


@contextmanager
def open_model_file(directory: Path, name: str) -> Iterator[BinaryIO]:
    """Open one of `model_files` for reading. The same is asked of what was opened, in case that somebody has put a link
    there since. FileNotFoundError where there is none of the name."""
    file = directory / name
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        _refuse_outside(file, os.readlink(f"/proc/self/fd/{opened.fileno()}"), directory)
        _refuse_special(file, os.fstat(opened.fileno()).st_mode)
        yield opened


def _refuse_outside(file: Path, real: str, directory: Path) -> None:
    """Raise ValueError for a file outside of the directory. real: where it is once links are followed."""
    if not any(Path(real).is_relative_to(home) for home in _homes(directory)):
        raise ValueError(
            f"{file} is a link to {real}, outside of the model directory; put a copy of the file in its place, or "
            "remove it"
        )


def _homes(directory: Path) -> Iterator[Path]:
    """List where files of the directory may lie: in itself, and for models--NAME/snapshots/REVISION in the blobs."""
    root = Path(os.path.realpath(directory))
    yield root
    model = root.parent.parent
    if root.parent.name == "snapshots" and model.name.startswith("models--"):
        yield model / "blobs"


def _refuse_special(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise ValueError(f"{file} is {kinds.get(stat.S_IFMT(mode), 'a device')} and not a regular file; remove it")
