"""This module reads the files of a model directory that somebody else made. It writes files, links and directories as a
whole.

No file that is read may lie outside of the directory, and none may be anything but a file.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from megatron_rl.errors import DISK_ERRORS
from megatron_rl.parsing import read_json

INDEX = "model.safetensors.index.json"


def model_directory(name: str | Path) -> Path:
    """Return the directory of a model. ValueError says what to do where there is none."""
    directory = Path(name)
    if directory.is_dir():
        return directory
    remedy = (
        "fetch one (`hf download ORG/NAME --local-dir DIR`), name one of the Hugging Face Hub as hub:ORG/NAME, or make "
        "a tiny one with tools/make_tiny_model.py"
    )
    if directory.name.startswith("step_") and directory.parent.is_dir():
        steps = sorted(int(one.name[5:]) for one in directory.parent.glob("step_*") if one.name[5:].isdecimal())
        there = ", ".join(f"step_{step}" for step in steps) or "none"
        remedy = f"{directory.parent} has {there}; train.keep_last and train.keep_every say which a run keeps"
    if directory.is_file():
        raise ValueError(f"model directory {name} is a file; name the folder that it lies in, {directory.parent}")
    raise ValueError(f"model directory {name} does not exist; {remedy}")


def model_files(directory: Path, folder: str = "") -> list[Path]:
    """List the files of a model directory, or of a folder in it, by name. Folders below are not looked at.

    A link may lead to a file of the directory. It may also lead to the blobs of Hugging Face's cache, where the
    directory is a snapshot in it. ValueError names any other link, one that leads nowhere, and what is neither a file
    nor a folder: whoever opens a FIFO waits for ever.
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


def indexed_names(directory: Path) -> list[str] | None:
    """Read from the index of a model directory which files hold its weights, by name; None where there is no index.

    Other *.safetensors beside them are no part of the model. ValueError for what is no index, and for a name that leads
    out of the directory.
    """
    index = directory / INDEX
    if not index.is_file():
        return None
    try:
        names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors: {error!r}; fetch it again") from None
    for name in names:
        if (directory / name).parent != directory:
            raise ValueError(f"{index} names {directory / name}, which is outside of {directory}")
    return names


@contextmanager
def open_model_file(directory: Path, name: str) -> Iterator[BinaryIO]:
    """Open one of `model_files` for reading. The opened file is checked as they were, in case somebody has put a link
    there since. FileNotFoundError where there is none of the name."""
    file = directory / name
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        _refuse_outside(file, os.readlink(f"/proc/self/fd/{opened.fileno()}"), directory)
        _refuse_special(file, os.fstat(opened.fileno()).st_mode)
        yield opened


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what fails in the block say which file or folder it was: a write that finds the disk full names none."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def whole_file(path: Path, *, mode: int = 0o666, is_durable: bool = False) -> Iterator[TextIO]:
    """Write a file that gets its name when the block ends well. Until then an older file keeps the name.

    Nothing is kept when the block fails or the process is killed. mode: less the umask. is_durable: the text is on the
    disk before it gets the name.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed, or a link to somewhere else
    try:
        with (
            naming(path),
            open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file,
        ):
            yield file
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # the room that it takes is wanted
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text into a file, all of it or nothing: see `whole_file`."""
    with whole_file(path) as file:
        file.write(text)


def replace_directory(source: Path, destination: Path) -> None:
    """Rename `source` to `destination`. An old `destination` is moved aside first and deleted after."""
    old = _moved_aside(destination)
    source.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def link_directory(target: Path, link: Path) -> None:
    """Make `link` a relative symbolic link to `target`, and replace whatever had the name before.

    A link that is replaced is there at any time. Nothing puts a link in a directory's place in one step: a directory is
    moved aside first, and deleted after.
    """
    partial = link.with_name(f".{link.name}.link")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()), target_is_directory=True)
    is_directory = link.is_dir() and not link.is_symlink()
    old = _moved_aside(link) if is_directory else None
    partial.replace(link)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _moved_aside(directory: Path) -> Path:
    """Move a directory that has the name aside, and return where it is now. A link is removed."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        directory.rename(old)
    return old


def _refuse_outside(file: Path, real: str, directory: Path) -> None:
    """Raise ValueError for a file outside of the directory. real: where it is once links are followed."""
    if not any(Path(real).is_relative_to(home) for home in _homes(directory)):
        raise ValueError(
            f"{file} is a link to {real}, outside of the model directory; put a copy of the file in its place, or "
            "remove it"
        )


def _homes(directory: Path) -> Iterator[Path]:
    """List the folders in which files of the directory may lie: itself, and for models--NAME/snapshots/REVISION the
    blobs."""
    root = Path(os.path.realpath(directory))
    yield root
    model = root.parent.parent
    if root.parent.name == "snapshots" and model.name.startswith("models--"):
        yield model / "blobs"


def _refuse_special(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise ValueError(f"{file} is {kinds.get(stat.S_IFMT(mode), 'a device')} and not a regular file; remove it")
