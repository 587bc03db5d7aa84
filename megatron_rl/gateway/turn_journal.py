"""Keeps turns on disk as they are sampled, so that after a kill the same requests have the same answers.

One file for each phase beside the journal of whole groups (rollout/journal.py), with records of the same form: a JSON
header, then turns and ends of agents. What is known of groups that go on in the next phase is written into its file,
too. Nothing is forced to the disk: a machine that fails costs turns, which are then sampled anew.
"""

import json
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from io import RawIOBase
from pathlib import Path

import msgspec
import numpy as np

from megatron_rl.gateway.protocol import Outcome
from megatron_rl.gateway.recording import Turn
from megatron_rl.rollout.journal import framed, records

log = logging.getLogger(__name__)

Key = tuple[int, int]  # prompt_id, sample_index


@dataclass(slots=True)
class _Known:
    """Holds what is known of one trajectory. turns: by the digest of what was asked. outcome: with why it ended."""

    turns: dict[str, bytes] = field(default_factory=dict)
    outcome: bytes = b""


class TurnJournal:
    """Owns the file of the present phase. `close()` closes it."""

    def __init__(self, folder: Path, identity: str, on_error: Callable[[OSError], Exception | None]) -> None:
        """Begin without a file; `open` opens that of a phase. identity, on_error: as of the journal of groups."""
        self._folder, self._identity, self._on_error = folder, identity, on_error
        self._file: RawIOBase | None = None
        self._known: dict[Key, _Known] = {}

    def open(self, step: int, carried: Collection[int]) -> None:
        """Begin or resume the phase of a step. carried: prompts whose groups the phase before has left unfinished."""
        self.close()
        before = {key: known for key, known in self._known.items() if key[0] in carried}
        if not before:
            self._known = {}
            self._read(step - 1)
            before = {key: known for key, known in self._known.items() if key[0] in carried}
        self._known = before
        path = self._path(step)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            whole = self._read(step)
            self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
            self._file.truncate(whole)
            self._file.seek(whole)
            if not whole:
                self._write(self._header(step))
                for known in before.values():
                    for content in (*known.turns.values(), known.outcome):
                        if content:
                            self._write(content)
        except OSError as error:
            self._give_up(error)

    def turn(self, key: Key, digest: str) -> Turn | None:
        """Return what was sampled for a request, whole or not; without its context, which the request says."""
        content = self._known[key].turns.get(digest) if key in self._known else None
        return None if content is None else _turn(content)

    def keep(self, key: Key, digest: str, turn: Turn) -> None:
        """Keep a turn. Those with routed experts are not kept: they are large, and without them nothing could be
        trained."""
        if turn.routed_experts is None:
            content = _packed(key, digest, turn)
            if self._known.setdefault(key, _Known()).turns.get(digest) != content:
                self._known[key].turns[digest] = content
                self._write(content)

    def outcome(self, key: Key) -> Outcome | None:
        content = self._known[key].outcome if key in self._known else b""
        return msgspec.convert(json.loads(content)["outcome"], Outcome, strict=False) if content else None

    def keep_outcome(self, key: Key, outcome: Outcome) -> None:
        content = json.dumps({"key": key, "outcome": asdict(outcome)}).encode()
        self._known.setdefault(key, _Known()).outcome = content
        self._write(content)

    def drop(self, prompt_id: int) -> None:
        """Forget a prompt whose group is whole, and in the other journal."""
        self._known = {key: known for key, known in self._known.items() if key[0] != prompt_id}

    def forget(self, which: Callable[[int], bool]) -> None:
        """Delete the phases of the steps for which `which` is true, but for the last: groups that it left unfinished
        are in it until the next phase begins."""
        for path in self._folder.glob("step_*.turns"):
            found = re.fullmatch(r"step_(\d+)\.turns", path.name)
            if found and which(int(found[1])) and which(int(found[1]) + 1):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}.turns"

    def _header(self, step: int) -> bytes:
        return json.dumps({"step": step, "identity": self._identity}).encode()

    def _write(self, content: bytes) -> None:
        if self._file is None:
            return
        try:
            left = memoryview(framed(content))
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._give_up(error)

    def _read(self, step: int) -> int:
        """Read what the file of a step knows. Return the bytes of its whole records."""
        path = self._path(step)
        if not path.exists():
            return 0
        found = records(path)
        first, whole = next(found, (b"", 0))
        if first != self._header(step):
            return 0
        for content, whole in found:  # noqa: B007, the last end is what counts
            head = json.loads(content.partition(b"\n")[0])
            known = self._known.setdefault((head["key"][0], head["key"][1]), _Known())
            if "outcome" in head:
                known.outcome = content
            else:
                known.turns[head["digest"]] = content
        return whole

    def _give_up(self, error: OSError) -> None:
        self.close()
        fault = self._on_error(error)
        if fault is not None:
            raise fault from error


def _packed(key: Key, digest: str, turn: Turn) -> bytes:
    head = {"key": key, "digest": digest, "finish_reason": turn.finish_reason, "count": len(turn.output_ids)}
    parts = [turn.output_ids.astype("<i4"), turn.logprobs.astype("<f4"), turn.policy_versions.astype("<i4")]
    return json.dumps(head).encode() + b"\n" + b"".join(part.tobytes() for part in parts)


def _turn(content: bytes) -> Turn:
    line, _, data = content.partition(b"\n")
    head = json.loads(line)
    size = 4 * head["count"]
    ids, logprobs, versions = (data[start : start + size] for start in (0, size, 2 * size))
    return Turn(
        context_ids=np.zeros(0, np.int32),
        output_ids=np.frombuffer(ids, "<i4").astype(np.int32),
        logprobs=np.frombuffer(logprobs, "<f4").astype(np.float32),
        policy_versions=np.frombuffer(versions, "<i4").astype(np.int32),
        finish_reason=head["finish_reason"],
    )
