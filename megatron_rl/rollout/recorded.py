"""Scored responses in a file: what `megatron-rl rollout` writes and `megatron-rl train --rollouts` trains from.

JSONL, one row per response, the rows of a group one after the other. Text for people, token ids and log-probs for
training; a float32 comes back from its decimal digits as it was. The rows of rollout/teacher.py have text alone.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.data.prompts import Prompt
from megatron_rl.parsing import bounded_lines, parse_json
from megatron_rl.records import Group, Response, Sample

Advantages = Callable[[Sequence[Response], np.ndarray], np.ndarray]


def group_rows(group: Group, prompt: Prompt, decode: Callable[[list[int]], str]) -> str:
    """The lines of a group. decode: text of output ids, as in data/chat.py."""
    rows = [
        {
            "prompt_id": prompt.id,
            "domain": prompt.domain,
            "position": sample.response.prompt_id,
            "sample_index": sample.response.sample_index,
            "prompt": prompt.prompt,
            "response": decode(sample.response.output_ids.tolist()),
            "reward": sample.reward,
            "reason": sample.reason,
            "details": sample.details,
            "finish_reason": sample.response.finish_reason,
            "prompt_token_ids": sample.response.prompt_ids.tolist(),
            "output_ids": sample.response.output_ids.tolist(),
            "rollout_logprobs": [float(x) for x in sample.response.rollout_logprobs],
            "policy_version": sample.response.policy_version,
        }
        for sample in group.samples
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_groups(path: Path, advantages: Advantages) -> tuple[list[Group], dict[int, Prompt]]:
    """Groups by position, that is in the order in which a run takes their prompts, whatever order they were completed
    in; and the prompt of each position, without its answer. ValueError names a wrong line.

    advantages: float64 [K] of one group from its responses and rewards [K].
    """
    if not path.is_file():
        raise ValueError(f"rollouts file {path} does not exist; megatron-rl rollout writes one")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file, path), start=1):
            rows.append(_row(line, f"{path} line {number}"))
    if not rows:
        raise ValueError(f"rollouts file {path} is empty")
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
    return groups, {sample.response.prompt_id: prompt for sample, prompt in rows}


def check_first_row(path: Path) -> None:
    """ValueError when what the file begins with cannot be trained from; `read_groups` comes when a model is loaded."""
    with path.open("rb") as file:
        _row(next(bounded_lines(file, path), b""), f"{path} line 1")


def with_advantages(group: Group, advantages: Advantages) -> Group:
    """The group with the advantages that the present configuration gives its rewards."""
    samples = group.samples
    given = advantages([sample.response for sample in samples], np.array([sample.reward for sample in samples]))
    return replace(group, samples=tuple(replace(s, advantage=float(a)) for s, a in zip(samples, given, strict=True)))


def _row(line: bytes, where: str) -> tuple[Sample, Prompt]:
    """The sample, without its advantage, and its prompt, without its answer."""
    try:
        row: dict[str, Any] = parse_json(line)
        output_ids = np.array(row["output_ids"], np.int32)
        response = Response(
            prompt_id=int(row["position"]),
            sample_index=int(row["sample_index"]),
            prompt_ids=np.array(row["prompt_token_ids"], np.int32),
            output_ids=output_ids,
            rollout_logprobs=np.array(row["rollout_logprobs"], np.float32),
            policy_versions=np.full(len(output_ids), int(row["policy_version"]), np.int32),
            finish_reason=str(row["finish_reason"]),
        )
        sample = Sample(
            response=response,
            reward=float(row["reward"]),
            reason=str(row["reason"]),
            details=str(row.get("details", "")),
            advantage=0.0,
        )
        prompt = Prompt(id=str(row["prompt_id"]), domain=str(row["domain"]), prompt=str(row["prompt"]), answer="")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        if isinstance(error, KeyError) and error.args == ("output_ids",):
            raise ValueError(
                f"{where} has no token ids and log-probs: neither what an endpoint (teacher) answers nor a run's own "
                "rollouts/ has. Sample from a checkpoint, or train on it by SFT (tools/make_sft_data.py makes its rows)"
            ) from None
        begins = line[:100].decode(errors="replace")
        raise ValueError(f"{where} is not a scored response ({type(error).__name__}: {error}): {begins!r}") from None
    if not len(output_ids) or len(output_ids) != len(response.rollout_logprobs) or not len(response.prompt_ids):
        raise ValueError(
            f"{where}: {len(response.prompt_ids)} prompt_token_ids, {len(output_ids)} output_ids and "
            f"{len(response.rollout_logprobs)} rollout_logprobs; the last two must be equally many, and none empty"
        )
    return sample, prompt
