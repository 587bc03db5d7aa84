"""Appends responses to a file group by group, so that a killed run can go on with those that are there.

The file is JSONL with one row per response, and the rows of a group follow each other. A row has its group's
"position". A process that looks for missing positions in order to add them holds `sole_writer` until they are added.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_rl.errors import Fault, Stopped
from megatron_rl.files import naming
from megatron_rl.parsing import bounded_lines, parse_json
from megatron_rl.records import Group
from megatron_rl.reward.verdict import GAVE_UP
from megatron_rl.rollout.sampler import Question, Sampler

log = logging.getLogger(__name__)

_TELL_EVERY_SECONDS = 10.0
_MOST_WAITING = 2**26  # characters that are not written yet


@contextmanager
def told_of_resume(where: Path, files: Sequence[Path]) -> Iterator[None]:
    """Log how to go on when a signal, a Fault or a full disk ends the block and `files` have responses. Then a signal
    becomes `Stopped`.

    where: the folder that the message names.
    """
    try:
        yield
    except (KeyboardInterrupt, Fault, OSError) as error:
        if not any(map(has_responses, files)):
            raise
        log.warning("the responses so far are in %s; --resume goes on with them", where)
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise Stopped from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Holds a complete group. lines: its rows. num_tokens: generated for it. reward: the mean of its responses.
    error_share: of those that could not be judged."""

    lines: str
    num_tokens: int
    reward: float
    error_share: float


class _Appending:
    """Appends texts to a file in a thread. Texts that come while it writes are written together afterwards."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._texts, self._num_characters = file, list[str](), 0
        self._writing: asyncio.Task[None] | None = None

    async def append(self, text: str) -> None:
        """Queue a text to be written. Wait only when too much text is queued."""
        self._texts.append(text)
        self._num_characters += len(text)
        if self._writing is None or self._writing.done():
            await self.end()
            self._writing = asyncio.create_task(self._write_all())
        elif self._num_characters > _MOST_WAITING:
            await self.end()

    async def end(self) -> None:
        """Return when everything so far is on the disk."""
        if self._writing is not None:
            await asyncio.shield(self._writing)  # who is cancelled here must not take its file away from the thread

    async def _write_all(self) -> None:
        while self._texts:
            texts, self._texts, self._num_characters = self._texts, [], 0
            await asyncio.to_thread(self._write, texts)

    def _write(self, texts: Sequence[str]) -> None:
        self._file.writelines(texts)
        self._file.flush()
        os.fsync(self._file.fileno())


@asynccontextmanager
async def _appending(path: Path) -> AsyncIterator[_Appending]:
    """Open the file to append to. All of it is on the disk at the end, whatever ends the block."""
    # Closing writes what is left, so it may fail as well, and hide the failure before.
    with naming(path), path.open("a", encoding="utf-8") as file:
        appending = _Appending(file)
        try:
            yield appending
        finally:
            await appending.end()


async def write_groups(path: Path, groups: AsyncGenerator[Finished, None], num_groups: int, noun: str) -> int:
    """Append every group as it completes, log the progress, and return the number of tokens. noun: what groups are
    called.

    What is written survives a kill. num_groups: expected; fewer may come.
    """
    started = told = time.perf_counter()
    num_done = num_tokens = 0
    reward = errors = 0.0
    async with _appending(path) as appending, aclosing(groups):
        async for group in groups:
            await appending.append(group.lines)
            num_done += 1
            num_tokens += group.num_tokens
            reward += group.reward
            errors += group.error_share
            if time.perf_counter() - told > _TELL_EVERY_SECONDS or num_done == num_groups:
                told = time.perf_counter()
                log.info(
                    "%d of %d %s, mean reward %.3f, %s%.0f tokens/s",
                    num_done,
                    num_groups,
                    noun,
                    reward / num_done,
                    f"errors {errors / num_done:.0%}, " if errors else "",
                    num_tokens / (told - started),
                )
    return num_tokens


async def sample_into(
    path: Path, sampler: Sampler, questions: Sequence[Question], lines: Callable[[Question, Group], str], noun: str
) -> int:
    """Append `lines` of every question's group, see `write_groups`. lines: called in a thread."""

    async def finished() -> AsyncGenerator[Finished, None]:
        async with aclosing(sampler.as_completed(questions, 0)) as completed:
            async for question, group in completed:
                yield Finished(
                    # Long responses take a while to encode, so a thread does it: the event loop has others to read.
                    lines=await asyncio.to_thread(lines, question, group),
                    num_tokens=sum(sample.response.num_policy_tokens for sample in group.samples),
                    reward=sum(sample.reward for sample in group.samples) / len(group.samples),
                    error_share=sum(sample.reason in GAVE_UP for sample in group.samples) / len(group.samples),
                )

    return await write_groups(path, finished(), len(questions), noun)


def has_responses(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def whole_groups(path: Path, size: int, remedy: str) -> set[int]:
    """Return the positions of the whole groups of `size` responses in the file; none without a file.

    A last group that a kill cut short is cut off. Raise ValueError for any other group that is not whole, and change
    nothing then.

    remedy: the end of its message.
    """
    positions, end = find_groups(path, size, remedy)
    if has_responses(path):
        os.truncate(path, end)
    return positions


def find_groups(path: Path, size: int, remedy: str) -> tuple[set[int], int]:
    """Return what `whole_groups` does and the number of bytes up to the end of the last whole group. Change nothing."""
    if not has_responses(path):
        return set(), 0
    sizes: dict[int, int] = {}
    end_of_whole = end = 0
    with path.open("rb") as file:
        for line in bounded_lines(file, path):
            if not line.endswith(b"\n"):
                break  # the last one, cut short
            try:
                position = int(parse_json(line)["position"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}: a line after byte {end} is no response; {remedy}") from None
            end += len(line)
            sizes[position] = sizes.get(position, 0) + 1
            if sizes[position] == size:
                end_of_whole = end
    last = next(reversed(sizes), None)
    for position, count in sizes.items():
        if count > size or (count < size and position != last):
            raise ValueError(f"{path}: the group at position {position} has {count} responses, not {size}; {remedy}")
    return {position for position, count in sizes.items() if count == size}, end_of_whole
