"""Defines judged responses: the lines of the file that an evaluation leaves for each benchmark. All numbers come from
them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_rl.data.prompts import Prompt
from megatron_rl.parsing import bounded_lines, parse_json
from megatron_rl.records import Sample
from megatron_rl.reward.answers import extracted_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Holds one judged response.

    position: sample_index * prompts of the benchmark + the prompt's place among them.
    kind: the group of prompts that this one is counted with: "kind" of its meta, else its domain.
    judged_as: the kind of reward.
    answer: what the response gives in its last box; None without one, and for programs.
    score, reason, details, parts: the verdict's.
    num_tokens: of the response, the end-of-sequence token included. finish_reason: "stop" or "length", or what ended an
    agent's run.
    turns: how often an agent asked; `response` is the last answer then.
    """

    position: int
    sample_index: int
    prompt_id: str
    kind: str
    judged_as: str
    prompt: str
    response: str
    answer: str | None
    score: float
    reason: str
    details: str
    num_tokens: int
    finish_reason: str
    parts: dict[str, float] = field(default_factory=dict)
    turns: int = 1


def judged(sample: Sample, prompt: Prompt, num_prompts: int, judged_as: str, text: str) -> Judged:
    """Make the row of a judged sample. text: of the response."""
    position = sample.response.prompt_id
    return Judged(
        position=position,
        sample_index=position // num_prompts,
        prompt_id=prompt.id,
        kind=str(prompt.meta.get("kind", prompt.domain)),
        judged_as=judged_as,
        prompt=prompt.prompt,
        response=text,
        answer=extracted_answer(judged_as, text),
        score=sample.reward,
        reason=sample.reason,
        details=sample.details,
        num_tokens=sample.response.num_policy_tokens,
        finish_reason=sample.response.finish_reason,
        parts=dict(sample.parts),
        turns=sum(segment.num_turns for segment in sample.response.segments),
    )


def as_line(row: Judged) -> str:
    values = asdict(row)
    if not row.parts:
        del values["parts"]
    if row.turns == 1:
        del values["turns"]
    return json.dumps(values, ensure_ascii=False) + "\n"


def judged_rows(path: Path) -> Iterator[Judged]:
    """Yield every row, one at a time, in the order in which they were completed. ValueError names a line that is
    none."""
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file, path), start=1):
            try:
                row = Judged(**parse_json(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} line {number} is no judged response ({error}); remove the file") from None
            yield row


def read_verdicts(path: Path) -> list[Judged]:
    """Read the rows by position, without what was asked and answered: that may be more than fits into memory."""
    return sorted((replace(row, prompt="", response="") for row in judged_rows(path)), key=lambda row: row.position)
