"""This module writes and checks the `checksums.json` of a checkpoint. It has the length and xxh3_128 of every file, so
that damage is found and named.

It is written last. A directory without it is not whole. Files that it does not list are somebody's own, and ignored.
"""

import dataclasses
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_rl.parsing import read_json

CHECKSUMS = "checksums.json"
_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksum:
    num_bytes: int
    xxh3_128: str


def checksum_on_disk(path: Path) -> Checksum:
    """Return the checksum of a file that was just written. The file has reached the disk when this returns."""
    sync(path)
    return _checksum(path)


def write_checksums(folder: Path, files: dict[str, Checksum]) -> None:
    """Write `checksums.json` into `folder`. files: by path relative to `folder`."""
    content = {name: dataclasses.asdict(files[name]) for name in sorted(files)}
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=1), encoding="utf-8")
    sync(folder / CHECKSUMS)


def damage(folder: Path, share: int = 0, num_shares: int = 1) -> list[str]:
    """List what is wrong with a checkpoint, one line for each file; nothing when it is as it was written.

    share: the number of this one of `num_shares`. They are about equal in bytes, so that several ranks can read
    together.
    """
    try:
        content = read_json(folder / CHECKSUMS)
        files = {name: Checksum(**fields) for name, fields in content.items()}
    except FileNotFoundError:
        return [f"{CHECKSUMS} is missing"] if share == 0 else []
    except (ValueError, TypeError, AttributeError) as error:
        return [f"{CHECKSUMS} is damaged ({error})"] if share == 0 else []
    mine = sorted(files, key=lambda name: (-files[name].num_bytes, name))[share::num_shares]
    return [f"{name} {wrong}" for name in mine if (wrong := _difference(folder / name, files[name]))]


def _difference(path: Path, expected: Checksum) -> str:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is not a regular file"  # a pipe would hold us for ever
        num_bytes = found.st_size
        if num_bytes != expected.num_bytes:
            return f"has {num_bytes:,} bytes; {expected.num_bytes:,} were written"
        xxh3_128 = _checksum(path).xxh3_128
    except FileNotFoundError:
        return "is missing"
    return "" if xxh3_128 == expected.xxh3_128 else f"has checksum {xxh3_128}; what was written had {expected.xxh3_128}"


def _checksum(path: Path) -> Checksum:
    digest, num_bytes = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
            num_bytes += read
    return Checksum(num_bytes=num_bytes, xxh3_128=digest.hexdigest())


def sync(path: Path) -> None:
    """Flush to the disk what was written to a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
