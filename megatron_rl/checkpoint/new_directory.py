"""This module makes a directory from a checkpoint, which appears when it is whole, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rl.checkpoint.read import resolve
from megatron_rl.files import replace_directory


@contextmanager
def new_directory(source: Path, destination: Path, num_bytes: int) -> Iterator[Path]:
    """Make a folder beside the destination. It takes the destination's name when the block ends well, else it is
    deleted.

    source: the checkpoint that the content is made from. ValueError for a destination that exists, that is inside of
    the source, or whose disk has too little room.
    """
    origin = resolve(source).resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists already; remove it or choose another destination")
    if origin == destination.resolve() or origin in destination.resolve().parents:
        raise ValueError(f"destination {destination} is inside the source {source}; choose another")
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{destination.parent} cannot be written to ({error.strerror}); choose another") from None
    try:
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            raise ValueError(
                f"{destination} needs {num_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there; make room or "
                "choose another disk"
            )
        yield partial
        replace_directory(partial, destination)
    except OSError as error:
        raise ValueError(f"writing {destination} failed: {error.strerror or error}; nothing was kept") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
