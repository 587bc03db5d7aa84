"""Reads and writes scored responses in a file: what `megatron-rl rollout` writes and `megatron-rl train --rollouts`
trains from.

JSONL, one row per response, the rows of a group one after the other. Text for people, token ids and log-probs for
training; a float32 comes back from its decimal digits as it was. The rows of rollout/teacher.py have text alone.

A trajectory's row has both for each of its segments, under "segments" (docs/agents.md).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.families import Architecture
from megatron_rl.parsing import bounded_lines, parse_json, shown
from megatron_rl.records import Group, Response, Sample, Segment
from megatron_rl.reward.answers import extracted_answer

# The tests of a program have megabytes.
_ANSWER_CHARACTERS = 2000
# Rounding may lift one a little above 0.
_HIGHEST_LOGPROB = 1e-3

NO_TEACHER_IN_FILE = "--rollouts has no log-probs of a teacher; take distillation out, or train with servers"
Advantages = Callable[[Sequence[Response], np.ndarray], np.ndarray]
Decode = Callable[[list[int]], str]


def answer_columns(prompt: Prompt, judged_as: str, text: str) -> dict[str, str | None]:
    """Return the columns about the answer of a response `text`: what was expected, and what was taken from it, both
    cut.

    extracted: None where there is none, and for programs. judged_as: the kind of the reward.
    """
    extracted = extracted_answer(judged_as, text)
    return {
        "expected": prompt.answer[:_ANSWER_CHARACTERS],
        "extracted": None if extracted is None else extracted[:_ANSWER_CHARACTERS],
    }


def asked_columns(prompt: Prompt) -> dict[str, Any]:
    """Return the columns of a prompt that is more than a text: its messages and tools."""
    if prompt.asked is None:
        return {}
    tools = {"tools": json.loads(prompt.asked.tools)} if prompt.asked.tools else {}
    return {"messages": prompt.messages, **tools}


def parts_column(sample: Sample) -> dict[str, dict[str, float]]:
    """Return the column of the parts of a reward; none where it has no parts."""
    return {"parts": dict(sample.parts)} if sample.parts else {}


def text_of(response: Response, decode: Decode) -> str:
    """Return the text of a response: the one that it was judged by, or decoded now where that was not kept. For a
    trajectory that is its last turn."""
    if response.text is not None:
        return response.text
    if response.is_plain:
        return decode(response.segments[0].output_ids.tolist())
    last = next((segment for segment in reversed(response.segments) if segment.num_policy_tokens), None)
    if last is None:
        return ""
    start, stop = (0, None) if last.turns is None else last.turns[-1].tolist()
    return decode(last.output_ids[start:stop].tolist())


def trajectory_columns(response: Response, decode: Decode) -> dict[str, Any]:
    """Return the columns of a trajectory: its turns, and the text of its segments; none for other responses.

    A segment's "spans" are [text, whether the policy sampled it], in order. Of the prompts of later segments only what
    differs from the segment before is there ("prompt"), behind so many tokens that do not ("shared_tokens").
    """
    if response.is_plain:
        return {}
    rows: list[dict[str, Any]] = []
    before = np.zeros(0, np.int32)
    for segment in response.segments:
        same = _num_common(before, segment.prompt_ids)
        changed = {"shared_tokens": same, "prompt": decode(segment.prompt_ids[same:].tolist())} if rows else {}
        mask = segment.policy_mask
        ends = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
        spans = [
            [decode(segment.output_ids[start:stop].tolist()), bool(mask[start])]
            for start, stop in pairwise(ends)
            if start < stop
        ]
        rows.append({**changed, "spans": spans})
        before = np.concatenate([segment.prompt_ids, segment.output_ids])
    return {"num_masked_tokens": response.num_masked_tokens, "num_turns": response.num_turns, "segments": rows}


def _num_common(one: np.ndarray, other: np.ndarray) -> int:
    """Count the tokens with which both begin."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter


def group_rows(group: Group, prompt: Prompt, judged_as: str, decode: Decode) -> str:
    """Return the lines of a group. judged_as: the kind of its reward. decode: text of output ids, as in
    data/chat.py."""
    texts = [text_of(sample.response, decode) for sample in group.samples]
    rows = [
        {
            "prompt_id": prompt.id,
            "domain": prompt.domain,
            "position": sample.response.prompt_id,
            "sample_index": sample.response.sample_index,
            "prompt": prompt.prompt,
            **asked_columns(prompt),
            "response": text,
            **answer_columns(prompt, judged_as, text),
            "reward": sample.reward,
            "reason": sample.reason,
            "details": sample.details,
            **parts_column(sample),
            "finish_reason": sample.response.finish_reason,
            **_token_columns(sample.response, decode),
            "policy_version": max(sample.response.policy_versions.tolist(), default=0),
        }
        for sample, text in zip(group.samples, texts, strict=True)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _token_columns(response: Response, decode: Decode) -> dict[str, Any]:
    """Return the columns that training needs; a trajectory has them for each segment, beside its text."""
    columns = [
        {
            "prompt_token_ids": segment.prompt_ids.tolist(),
            "output_ids": segment.output_ids.tolist(),
            "rollout_logprobs": [float(x) for x in segment.rollout_logprobs],
            **({} if segment.turns is None else {"turns": segment.turns.tolist()}),
        }
        for segment in response.segments
    ]
    if response.is_plain:
        return columns[0]
    texts = trajectory_columns(response, decode)
    return texts | {"segments": [text | ids for text, ids in zip(texts["segments"], columns, strict=True)]}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """Limits the rows that a run can train on; by default those of any file. vocab_size: token ids are below it."""

    vocab_size: int = 2**31
    max_prompt_tokens: int = 2**31
    max_response_tokens: int = 2**31
    max_sequence_tokens: int = 2**31
    smallest_group: int = 1


_ANY = RowLimits()


def limits_of(rollout: RolloutSection, architecture: Architecture) -> RowLimits:
    """Return the limits of a configuration and its model."""
    return RowLimits(
        vocab_size=architecture.vocab_size,
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_response_tokens=rollout.max_response_tokens,
        max_sequence_tokens=rollout.max_sequence_tokens,
        smallest_group=2,
    )


def read_groups(path: Path, advantages: Advantages, limits: RowLimits = _ANY) -> tuple[list[Group], dict[int, Prompt]]:
    """Read the groups by position, that is in the order in which a run takes their prompts, whatever order they were
    completed in; and the prompt of each position. Raise ValueError, which names a wrong line.

    advantages: float64 [K] of one group from its responses and rewards [K].
    """
    rows = list(_rows(path, limits))
    groups = []
    for position, members in groupby((sample for sample, _ in rows), key=lambda sample: sample.response.prompt_id):
        of_group = list(members)
        if [sample.response.sample_index for sample in of_group] != list(range(len(of_group))):
            raise ValueError(f"{path}: the samples of position {position} are not 0, 1, 2, ... one after the other")
        groups.append(with_advantages(Group(prompt_id=position, samples=tuple(of_group)), advantages))
    groups.sort(key=lambda group: group.prompt_id)
    for one, other in pairwise(groups):
        if one.prompt_id == other.prompt_id:
            raise ValueError(f"{path}: position {one.prompt_id} comes twice; remove one of the groups")
    for group in groups:
        if len(group.samples) < limits.smallest_group:
            raise ValueError(
                f"{path}: position {group.prompt_id} has one response, and a group of one has no advantage; remove it, "
                "or record with rollout.samples_per_prompt of at least 2"
            )
    return groups, {sample.response.prompt_id: prompt for sample, prompt in rows}


def check_rows(path: Path, limits: RowLimits) -> None:
    """Raise ValueError for the first row that cannot be trained from; `read_groups` comes when a model is loaded."""
    for _ in _rows(path, limits):
        pass


def _rows(path: Path, limits: RowLimits) -> Iterator[tuple[Sample, Prompt]]:
    """Yield every row, one at a time."""
    if not path.is_file():
        raise ValueError(f"rollouts file {path} does not exist; megatron-rl rollout writes one")
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file, path), start=1):
            yield _row(line, f"{path} line {number}", limits)
    if not number:
        raise ValueError(f"rollouts file {path} is empty")


def with_advantages(group: Group, advantages: Advantages) -> Group:
    """Return the group with the advantages that the present configuration gives its rewards."""
    samples = group.samples
    given = advantages([sample.response for sample in samples], np.array([sample.reward for sample in samples]))
    return replace(group, samples=tuple(replace(s, advantage=float(a)) for s, a in zip(samples, given, strict=True)))


def _row(line: bytes, where: str, limits: RowLimits) -> tuple[Sample, Prompt]:
    """Read the sample, without its advantage, and its prompt, whose answer is what the row has of it."""
    try:
        row: dict[str, Any] = parse_json(line)
        response = Response(
            prompt_id=_whole(row, "position"),
            sample_index=_whole(row, "sample_index"),
            segments=_trajectory(row, limits) if "segments" in row else (_segment(row, row, limits),),
            finish_reason=str(row["finish_reason"]),
        )
        sample = Sample(
            response=response,
            reward=_reward(row["reward"]),
            reason=str(row["reason"]),
            details=str(row.get("details", "")),
            parts={str(name): _reward(part) for name, part in dict(row.get("parts", {})).items()},
            advantage=0.0,
        )
        prompt = Prompt(
            id=str(row["prompt_id"]),
            domain=str(row["domain"]),
            prompt=str(row["prompt"]),
            answer=str(row.get("expected", "")),
        )
    except _WrongValue as error:
        raise ValueError(f"{where}: {error}; record its group again, or remove it") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        if isinstance(error, KeyError) and error.args == ("output_ids",):
            raise ValueError(
                f"{where} has no token ids and log-probs: neither what an endpoint (teacher) answers nor a run's own "
                "rollouts/ has. Sample from a checkpoint, or train on it by SFT (tools/make_sft_data.py makes its rows)"
            ) from None
        begins = line[:100].decode(errors="replace")
        raise ValueError(f"{where} is not a scored response ({type(error).__name__}: {error}): {begins!r}") from None
    return sample, prompt


class _WrongValue(ValueError):
    """Says that a row has a value that training would take, and come to nothing or to nonsense with."""


def _trajectory(row: Mapping[str, Any], limits: RowLimits) -> tuple[Segment, ...]:
    """Read the segments of a trajectory, whose lengths are limited together."""
    wide = replace(limits, max_prompt_tokens=limits.max_sequence_tokens, max_response_tokens=limits.max_sequence_tokens)
    found = []
    for number, part in enumerate(row["segments"]):
        try:
            found.append(_segment(part, row, wide))
            if (count := len(found[-1].prompt_ids) + len(found[-1].output_ids)) > limits.max_sequence_tokens:
                raise _WrongValue(
                    f"it has {count} tokens, more than rollout.max_prompt_tokens + max_response_tokens "
                    f"{limits.max_sequence_tokens}; raise one of them"
                )
        except _WrongValue as error:
            raise _WrongValue(f"segments[{number}]: {error}") from None
    if (count := sum(segment.num_policy_tokens for segment in found)) > limits.max_response_tokens:
        raise _WrongValue(
            f"the policy sampled {count} tokens of it, more than rollout.max_response_tokens "
            f"{limits.max_response_tokens}; raise that"
        )
    return tuple(found)


def _segment(part: Mapping[str, Any], row: Mapping[str, Any], limits: RowLimits) -> Segment:
    """Read one sequence. part: what has its token ids: the row, or one of its segments."""
    output_ids = _ids(part, "output_ids", limits.vocab_size, limits.max_response_tokens)
    turns = _turns(part["turns"], len(output_ids)) if "turns" in part else None
    count = len(output_ids) if turns is None else int((turns[:, 1] - turns[:, 0]).sum())
    return Segment(
        prompt_ids=_ids(part, "prompt_token_ids", limits.vocab_size, limits.max_prompt_tokens),
        output_ids=output_ids,
        rollout_logprobs=_logprobs(part["rollout_logprobs"], count, "output_ids" if turns is None else "policy tokens"),
        policy_versions=np.full(count, _whole(row, "policy_version"), np.int32),
        turns=turns,
    )


def _turns(values: Any, count: int) -> np.ndarray:
    """Read int32 [turns, 2]: where the policy's tokens begin and end among so many."""
    end = 0
    for at, pair in enumerate(values if isinstance(values, list) else ()):
        is_pair = isinstance(pair, list) and list(map(type, pair)) == [int, int]
        if not (is_pair and end <= pair[0] < pair[1] <= count):
            raise _WrongValue(
                f"turns[{at}] must be [start, stop] with {end} <= start < stop <= {count}, got {shown(pair)}"
            )
        end = pair[1]
    if not isinstance(values, list) or not values:
        raise _WrongValue(f"turns must be a list of [start, stop] and not empty, got {shown(values)}")
    return np.array(values, np.int32)


def _ids(row: Mapping[str, Any], name: str, vocab_size: int, longest: int) -> np.ndarray:
    """Read token ids int32 [n]. numpy alone would cut 1.5 to 1, and None is a number to it where others are floats."""
    ids = row[name]
    if not isinstance(ids, list) or not ids:
        raise _WrongValue(f"{name} must be a list of token ids and not empty, got {shown(ids)}")
    if set(map(type, ids)) != {int} or not 0 <= min(ids) <= max(ids) < vocab_size:
        at = next(i for i, one in enumerate(ids) if type(one) is not int or not 0 <= one < vocab_size)
        raise _WrongValue(
            f"{name}[{at}] must be a token id of the model, a whole number from 0 to {vocab_size - 1}, got "
            f"{shown(ids[at])}"
        )
    if len(ids) > longest:
        setting = "max_response_tokens" if name == "output_ids" else "max_prompt_tokens"
        raise _WrongValue(f"{name} has {len(ids)} tokens, more than rollout.{setting} {longest}; raise that")
    return np.array(ids, np.int32)


def _logprobs(values: Any, count: int, noun: str) -> np.ndarray:
    """Read log-probs float32 [count]. noun: what is counted."""
    if not isinstance(values, list) or len(values) != count:
        number = len(values) if isinstance(values, list) else shown(values)
        raise _WrongValue(f"it has {count} {noun} and {number} rollout_logprobs; they must be equally many")
    if set(map(type, values)) <= {float, int}:
        found = np.array(values, np.float64)
        if (np.isfinite(found) & (found <= _HIGHEST_LOGPROB)).all():
            return found.astype(np.float32)
    at = next(i for i, one in enumerate(values) if not _is_logprob(one))
    raise _WrongValue(f"rollout_logprobs[{at}] must be a finite number, at most 0, got {shown(values[at])}")


def _is_logprob(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value <= _HIGHEST_LOGPROB


def _reward(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _WrongValue(f"reward must be a finite number, got {shown(value)}")
    return float(value)


def _whole(row: Mapping[str, Any], name: str) -> int:
    value = row[name]
    if type(value) is not int or not 0 <= value < 2**31:
        raise _WrongValue(f"{name} must be a whole number from 0 on, got {shown(value)}")
    return value
