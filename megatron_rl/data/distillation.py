"""Makes SFT rows out of rollouts: what a teacher answered rightly and to the end, so many times to each prompt.

The files are read twice: first everything is judged, and of each response that may stay a few numbers are remembered;
then those that stay are read again, in their order, and written. So memory depends on how many responses there are and
not on how long. Which ones stay depends on their text and the seed alone, not on the order of rows and files: shards
may be joined in any way.
"""

import json
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import xxhash

from megatron_rl.data.distillation_report import Counts, total
from megatron_rl.data.messages import Message, of_text
from megatron_rl.data.prompts import Prompt
from megatron_rl.data.scored import Scored, lines_of, read_scored
from megatron_rl.data.sft_files import SftFiles
from megatron_rl.data.student import Student
from megatron_rl.reward.verdict import GAVE_UP

Progress = Callable[[str, int, int], None]  # what is done, bytes so far, bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Says which responses stay.

    per_prompt: at most so many responses of a prompt, chosen by the seed or, with `shortest_first`, by their length;
        None is all. validation_share: of the prompts. with_reasoning: what a reasoning model thought goes before its
        answer, between <think> and </think>. max_tokens: of the whole conversation; None is any number.
    """

    min_reward: float = 1.0
    per_prompt: int | None = None
    shortest_first: bool = False
    seed: int = 1
    validation_share: float = 0.0
    with_reasoning: bool = True
    max_tokens: int | None = None

    def is_validation(self, prompt: str) -> bool:
        """Tell by the text alone whether a prompt is for validation, so that it stays where it is when others join it,
        whatever domain or file it is in."""
        return self._hash(f"validation {prompt}") < self.validation_share * 2.0**64

    def rank(self, text: str, identity: int) -> tuple[int, int]:
        """Return the rank of a response; the lowest ones of a prompt stay."""
        return (len(text) if self.shortest_first else 0), self._hash(f"choice {identity:x}")

    def _hash(self, text: str) -> int:
        return xxhash.xxh3_64_intdigest(text.encode(), seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Holds a response that may stay. text: what SFT would teach as the assistant's message."""

    row: Scored
    text: str

    @property
    def messages(self) -> tuple[Message, ...]:
        asked = self.row.asked or of_text(self.row.prompt)
        return (*asked.messages, Message(role="assistant", content=self.text))

    def question(self) -> int:
        """Return 128 bits for domain and prompt."""
        return _digest([self.row.domain, self.row.prompt, *self._more()])

    def identity(self) -> int:
        """Return 128 bits for domain, prompt and text."""
        return _digest([self.row.domain, self.row.prompt, self.text, *self._more()])

    def _more(self) -> list[str]:
        return [json.dumps(self.row.asked.parts())] if self.row.asked else []


@dataclass(slots=True)
class _Asked:
    """Holds a prompt, and the responses that may stay: (rank, number of the file, byte at which the row begins)."""

    domain: str
    is_validation: bool
    best: list[tuple[tuple[int, int], int, int]] = field(default_factory=list)


class Distillation:
    """Carries out one run over `rollouts`. prompts: see `read_scored`. domains: the counts of each, once it is
    through."""

    def __init__(
        self,
        rollouts: Sequence[Path],
        selection: Selection,
        student: Student,
        prompts: Mapping[str, Prompt],
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        """Prepare the run. Raise ValueError for a file that does not exist."""
        for path in rollouts:
            if not path.is_file():
                raise ValueError(f"rollouts file {path} does not exist; megatron-rl rollout writes one")
        self._rollouts, self._selection, self._student, self._prompts = rollouts, selection, student, prompts
        self._progress = progress
        # The byte at which each file begins, counted over all files one after the other, and their end.
        self._begins = [*accumulate((path.stat().st_size for path in rollouts), initial=0)]
        self._asked: dict[int, _Asked] = {}
        self._seen: set[int] = set()
        self.domains: dict[str, Counts] = {}

    def write(self, files: SftFiles) -> None:
        """Choose and write. Raise ValueError for a row that is no scored response, and when nothing stays for training
        or for validation."""
        for number in range(len(self._rollouts)):
            self._choose(number, files)
        self._seen.clear()
        chosen: list[list[tuple[int, bool]]] = [[] for _ in self._rollouts]
        for asked in self._asked.values():
            self.domains[asked.domain].num_kept_prompts += bool(asked.best)
            for _, number, offset in asked.best:
                chosen[number].append((offset, asked.is_validation))
        self._check([is_validation for rows in chosen for _, is_validation in rows])
        for number, rows in enumerate(chosen):
            self._copy(number, sorted(rows), files)

    def _choose(self, number: int, files: SftFiles) -> None:
        for offset, line, where in lines_of(self._rollouts[number]):
            candidate = self._candidate(line, where)
            domain = candidate.row.domain
            if domain not in self.domains:
                files.claim(domain)
                self.domains[domain] = Counts()
            count = self.domains[domain]
            count.num_responses += 1
            question = candidate.question()
            if question not in self._asked:
                self._asked[question] = _Asked(domain, self._selection.is_validation(candidate.row.prompt))
                count.num_prompts += 1
            reason = self._objection(candidate) or self._keep(self._asked[question], candidate, number, offset)
            if reason:
                count.dropped[reason] += 1
            self._tell("read", number, offset + len(line))

    def _candidate(self, line: bytes, where: str) -> Candidate:
        row = read_scored(line, where, self._prompts)
        text = row.response
        if row.reasoning and self._selection.with_reasoning:
            text = f"<think>\n{row.reasoning.strip()}\n</think>\n\n{text}"
        return Candidate(row=row, text=text)

    def _objection(self, candidate: Candidate) -> str:
        """Say why a response is dropped for itself; "" when it may stay."""
        row, text, student, selection = candidate.row, candidate.text, self._student, self._selection
        if row.reward is None or row.reason in GAVE_UP:
            return "no_verdict"
        if row.reward < selection.min_reward:
            return "low_reward"
        if row.is_trajectory:
            return "many_turns"
        if row.finish_reason != "stop":
            return "unfinished"
        if not row.response.strip():
            return "empty"
        if student.would_misread(row.prompt) or student.would_misread(text):
            return "special_token"
        if selection.max_tokens is not None and student.num_tokens(candidate.messages) > selection.max_tokens:
            return "too_long"
        return ""

    def _keep(self, asked: _Asked, candidate: Candidate, number: int, offset: int) -> str:
        """Keep a response where it is among the best of its prompt. Returns why a response was dropped, this one or the
        one whose place it took; "" when none was."""
        identity = candidate.identity()
        if identity in self._seen:
            return "repeat"
        self._seen.add(identity)
        insort(asked.best, (self._selection.rank(candidate.text, identity), number, offset))
        if self._selection.per_prompt is not None and len(asked.best) > self._selection.per_prompt:
            asked.best.pop()
            return "over_per_prompt"
        return ""

    def _check(self, is_validation: Sequence[bool]) -> None:
        """Raise ValueError when there is no response for training or none for validation."""
        if not is_validation:
            counts = total(self.domains.values())
            why = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.most_common())
            raise ValueError(f"no response stays of {counts.num_responses}: {why or 'the files are empty'}")
        share = self._selection.validation_share
        if share and len(set(is_validation)) == 1:
            raise ValueError(
                f"a validation share of {share:g} of {len(self._asked)} prompts leaves no response for "
                f"{'training' if is_validation[0] else 'validation'}; change it, or bring more prompts"
            )

    def _copy(self, number: int, rows: Sequence[tuple[int, bool]], files: SftFiles) -> None:
        """Copy rows of a file to the output. rows: (byte at which it begins, whether it is for validation), in their
        order."""
        path = self._rollouts[number]
        with path.open("rb") as file:
            for offset, is_validation in rows:
                file.seek(offset)
                candidate = self._candidate(file.readline(), f"{path} byte {offset}")
                row, count = candidate.row, self.domains[candidate.row.domain]
                count.num_kept += 1
                count.num_validation += is_validation
                count.num_characters += len(candidate.text)
                written = {
                    "id": f"{row.prompt_id}:{candidate.identity():032x}",
                    "messages": [message.as_dict() for message in candidate.messages],
                    **({"tools": json.loads(row.asked.tools)} if row.asked and row.asked.tools else {}),
                    "meta": {"domain": row.domain, "prompt_id": row.prompt_id, "source": str(path)},
                }
                files.write(written, row.domain, is_validation)
                self._tell("written", number, offset)

    def _tell(self, stage: str, number: int, done: int) -> None:
        self._progress(stage, self._begins[number] + done, self._begins[-1])


def _digest(parts: Sequence[str]) -> int:
    return xxhash.xxh3_128_intdigest(json.dumps(parts).encode())
