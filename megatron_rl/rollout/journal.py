"""Keeps scored groups on disk as they complete, so that a killed rollout phase goes on with what was done.

One file for each phase: records of [length, uint64][blake2b of the content, 16 bytes][content], the first a JSON
header, each other one group (rollout/archive.py). The last record of a file may be cut short; it and what follows is
cut off. Files are kept until a checkpoint covers their phase, so what a run does again after a kill, it does with the
same responses and without sampling them. As soon as a phase samples anything anew, the files of later phases go: their
responses came from weights that may never be again.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path

from megatron_rl.records import Group
from megatron_rl.reward.verdict import GAVE_UP
from megatron_rl.rollout.archive import Carry, pack_carry, unpack_carry

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<Q16s")


class Journal:
    """Owns the file of the present phase. `close()` closes it."""

    def __init__(self, folder: Path, identity: str, on_error: Callable[[OSError], Exception | None]) -> None:
        """Begin without a file; `open` opens that of a phase. identity: of everything that decides what a phase samples
        beside its weights and cursor; groups of another one are not used. on_error: what to raise when the disk takes
        no more; None to go on without."""
        self._folder, self._identity, self._on_error = folder, identity, on_error
        self._file: RawIOBase | None = None
        self._found: dict[int, Group] = {}
        self._queue: list[bytes] = []
        self._lock = asyncio.Lock()

    def open(self, step: int) -> int:
        """Begin or resume the phase of `step`. Return the number of groups that it has already."""
        self.close()
        path = self._folder / f"step_{step:06d}.journal"
        header = json.dumps({"step": step, "identity": self._identity}).encode()
        self._found, self._step, self._is_new = {}, step, False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            whole = self._read(path, header) if path.exists() else 0
            self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
            self._file.truncate(whole)
            self._file.seek(whole)
            if not whole:
                self._write(framed(header))
        except OSError as error:
            self._give_up(error)
        return len(self._found)

    def find(self, prompt_id: int) -> Group | None:
        """Return the group of this prompt, if it was completed before. Its advantages are those of the run that wrote
        it."""
        return self._found.get(prompt_id)

    async def append(self, group: Group) -> None:
        """Append a group, and return when it is on disk. Groups that come at the same time share one fsync.

        A group that could not be judged is not kept: sampled again, it may be.
        """
        if not self._is_new:
            # From here on the run may go another way than the one that wrote the later phases.
            self._is_new = True
            self.forget(lambda step: step > self._step)
        if self._file is None or any(sample.reason in GAVE_UP for sample in group.samples):
            return
        self._queue.append(framed(pack_carry(Carry(samples=group.samples, since=(0,) * len(group.samples)))))
        async with self._lock:
            # Whoever had the lock before may have written this group too.
            if self._queue and self._file is not None:
                data, self._queue = b"".join(self._queue), []
                try:
                    await asyncio.to_thread(self._write, data)
                except OSError as error:
                    self._give_up(error)

    def forget(self, which: Callable[[int], bool]) -> None:
        """Delete the phases of the steps for which `which` is true."""
        for path in self._folder.glob("step_*.journal"):
            found = re.fullmatch(r"step_(\d+)\.journal", path.name)
            if found and which(int(found[1])):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())

    def _read(self, path: Path, header: bytes) -> int:
        """Read the groups of a file. Return the bytes of whole records, 0 if the file is of another run."""
        found = records(path)
        first, whole = next(found, (b"", 0))
        if first != header:
            if first:
                log.warning("%s was written under other settings; its phase is sampled anew", path)
            return 0
        for content, whole in found:  # noqa: B007, the last end is what counts
            samples = unpack_carry(content).samples
            self._found[samples[0].response.prompt_id] = Group(prompt_id=samples[0].response.prompt_id, samples=samples)
        return whole

    def _give_up(self, error: OSError) -> None:
        """Close the file: no more groups are kept in this phase."""
        self.close()
        self._queue = []
        fault = self._on_error(error)
        if fault is not None:
            raise fault from error


def framed(content: bytes) -> bytes:
    """Return one record of a file."""
    return _HEAD.pack(len(content), hashlib.blake2b(content, digest_size=16).digest()) + content


def records(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield (content, end) of every record up to the first that is not whole."""
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, digest = _HEAD.unpack(head)
            content = file.read(min(length, os.path.getsize(path)))
            if hashlib.blake2b(content, digest_size=16).digest() != digest:
                return
            yield content, file.tell()
