"""Reads rows of rollouts as text, whoever wrote them: `megatron-rl rollout` with a checkpoint or an endpoint, or a
training run (rollouts/step_N.jsonl)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.data.messages import Conversation, prompt_of, tools_of
from megatron_rl.data.prompts import Prompt
from megatron_rl.parsing import bounded_lines, parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Holds one response with its reward. asked: the whole conversation, where the prompt is more than a text.
    reasoning: what an endpoint's model thought before the response, where it keeps that apart; else "". reward: None of
    a response that was never finished. reason, finish_reason: as recorded. is_trajectory: an agent's, of which prompt
    and response are the ends."""

    prompt_id: str
    domain: str
    prompt: str
    asked: Conversation | None
    response: str
    reasoning: str
    reward: float | None
    reason: str
    finish_reason: str
    is_trajectory: bool


def lines_of(path: Path) -> Iterator[tuple[int, bytes, str]]:
    """Yield (byte at which it begins, line, its name) of every line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file, path), start=1):
            if line.strip():
                yield offset, line, f"{path} line {number}"
            offset += len(line)


def read_scored(line: bytes, where: str, prompts: Mapping[str, Prompt]) -> Scored:
    """Read a line. Raise ValueError, with the name `where`, for one that is no scored response. prompts: by id, for a
    run's rows, which have the prompt as the chat template renders it and no domain."""
    try:
        row = parse_json(line)
        if "domain" in row:
            domain, prompt, asked = row["domain"], row["prompt"], _asked(row)
        elif row["prompt_id"] in prompts:
            of_row = prompts[row["prompt_id"]]
            domain, prompt, asked = of_row.domain, of_row.prompt, of_row.asked
        else:
            raise ValueError(
                f"it has no domain, as in a training run's rollouts; name the data file with id {row['prompt_id']!r} "
                "by --prompts"
            )
        unjudged = "outcome" in row and "reward" not in row
        found = Scored(
            prompt_id=str(row["prompt_id"]),
            domain=domain,
            prompt=prompt,
            asked=asked,
            response=row["response"],
            reasoning=row.get("reasoning", ""),
            reward=None if unjudged else float(row["reward"]),
            reason="" if unjudged else str(row["reason"]),
            finish_reason=str(row["finish_reason"]),
            is_trajectory="segments" in row,
        )
        for text in (found.domain, found.prompt, found.response, found.reasoning):
            text.encode()  # half a surrogate pair is no text
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "" if line.endswith(b"\n") else "; it is cut short: go on with megatron-rl rollout --resume"
        raise ValueError(f"{where} is no scored response ({type(error).__name__}: {error}){remedy}") from None
    return found


def _asked(row: Mapping[str, Any]) -> Conversation | None:
    if not row.get("messages"):
        return None
    return Conversation(messages=prompt_of(row["messages"], "messages"), tools=tools_of(row.get("tools")))
