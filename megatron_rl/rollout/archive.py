"""Turns responses into bytes and back: a numpy archive without pickled objects."""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from megatron_rl.records import Response, Sample, Segment, UnfinishedGroup

# Per segment: prompt_id, sample_index, and how many prompt tokens, output tokens and routed positions it has.
_NUM_COLUMNS = 5
# Per response: prompt_id, sample_index and how many segments it has.
_NUM_RESPONSE_COLUMNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """Holds what one rollout phase leaves to the next.

    samples: scored surplus. since: the step in which each became that. unfinished: groups that are not finished.
    """

    samples: tuple[Sample, ...] = ()
    since: tuple[int, ...] = ()
    unfinished: tuple[UnfinishedGroup, ...] = ()


def pack_carry(carry: Carry) -> bytes:
    """Pack what a phase leaves into bytes; `unpack_carry` gives exactly the same back."""
    unfinished = [response for group in carry.unfinished for response in group.responses]
    arrays: dict[str, Any] = _arrays([*(sample.response for sample in carry.samples), *unfinished])
    buffer = io.BytesIO()
    np.savez(
        buffer,
        **arrays,
        scores=np.array([(s.reward, s.advantage) for s in carry.samples], np.float64).reshape(-1, 2),
        since=np.array(carry.since, np.int64),
        reasons=np.array([s.reason for s in carry.samples], np.str_),
        # Bytes: numpy strings drop what ends in NUL, and take four bytes for every character of the longest.
        details=np.frombuffer(json.dumps([s.details for s in carry.samples]).encode(), np.uint8),
        parts=np.frombuffer(json.dumps([dict(s.parts) for s in carry.samples]).encode(), np.uint8),
        groups=np.array([(g.prompt_id, len(g.responses), g.retention) for g in carry.unfinished], np.int64).reshape(
            -1, 3
        ),
    )
    return buffer.getvalue()


def unpack_carry(data: bytes) -> Carry:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if "details" not in arrays:
        raise ValueError(
            "carried.npz of this checkpoint was written by an older megatron_rl; start a new run from the checkpoint "
            "by model.path"
        )
    responses, details = _responses(arrays), json.loads(arrays["details"].tobytes())
    # Without them it is of a version that knew none.
    parts = json.loads(arrays["parts"].tobytes()) if "parts" in arrays else [{} for _ in details]
    samples = tuple(
        Sample(response=response, reward=float(s[0]), advantage=float(s[1]), reason=str(reason), details=text, parts=of)
        for response, s, reason, text, of in zip(
            responses, arrays["scores"], arrays["reasons"], details, parts, strict=False
        )
    )
    ends = accumulate((int(size) for _, size, _ in arrays["groups"]), initial=len(samples))
    groups = tuple(
        UnfinishedGroup(prompt_id=int(prompt_id), responses=tuple(responses[a:b]), retention=int(retention))
        for (prompt_id, _, retention), (a, b) in zip(arrays["groups"], pairwise(ends), strict=True)
    )
    return Carry(samples=samples, since=tuple(arrays["since"].tolist()), unfinished=groups)


def _arrays(responses: Sequence[Response]) -> dict[str, Any]:
    rows = [(response, segment) for response in responses for segment in response.segments]
    segments = [segment for _, segment in rows]
    routed = [s.routed_experts for s in segments if s.routed_experts is not None]
    table = [
        (
            r.prompt_id,
            r.sample_index,
            len(s.prompt_ids),
            len(s.output_ids),
            -1 if s.routed_experts is None else len(s.routed_experts),
        )
        for r, s in rows
    ]
    return {
        "table": np.array(table, np.int64).reshape(-1, _NUM_COLUMNS),
        "prompt_ids": _joined((s.prompt_ids for s in segments), np.int32),
        "output_ids": _joined((s.output_ids for s in segments), np.int32),
        "rollout_logprobs": _joined((s.rollout_logprobs for s in segments), np.float32),
        "policy_versions": _joined((s.policy_versions for s in segments), np.int32),
        "finish_reasons": np.array([r.finish_reason for r in responses], np.str_),
        "routed_experts": np.concatenate(routed) if routed else np.zeros((0, 0, 0), np.uint8),
        **({} if all(r.is_plain for r in responses) else _trajectories(responses, segments)),
        **({} if all(s.teacher_logprobs is None for s in segments) else _of_teacher(segments)),
    }


def _of_teacher(segments: Sequence[Segment]) -> dict[str, Any]:
    """Return the arrays of a teacher's log-probs of the policy tokens, NaN in segments that it has not scored."""
    nothing = [np.full(s.num_policy_tokens, np.nan, np.float32) for s in segments]
    found = [s.teacher_logprobs for s in segments]
    return {
        "teacher_logprobs": _joined((n if t is None else t for n, t in zip(nothing, found, strict=True)), np.float32),
        "has_teacher_logprobs": np.array([s.teacher_logprobs is not None for s in segments]),
    }


def _trajectories(responses: Sequence[Response], segments: Sequence[Segment]) -> dict[str, Any]:
    """Return the arrays that are needed besides where a response is more than a continuation of its prompt. num_turns
    is -1 for a segment that has only one turn and nothing else."""
    described = [(r.prompt_id, r.sample_index, len(r.segments)) for r in responses]
    turns = [segment.turns for segment in segments if segment.turns is not None]
    texts = [None if response.is_plain else response.text for response in responses]
    return {
        "responses": np.array(described, np.int64).reshape(-1, _NUM_RESPONSE_COLUMNS),
        "num_turns": np.array([-1 if s.turns is None else len(s.turns) for s in segments], np.int64),
        "turns": np.concatenate([np.zeros((0, 2), np.int32), *turns]),
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
    }


def _responses(arrays: dict[str, np.ndarray]) -> list[Response]:
    segments = _segments(arrays)
    if "responses" in arrays:
        described, texts = arrays["responses"].tolist(), json.loads(arrays["texts"].tobytes())
    else:
        described = [(prompt_id, sample_index, 1) for prompt_id, sample_index, *_ in arrays["table"].tolist()]
        texts = [None] * len(described)
    ends = accumulate((count for *_, count in described), initial=0)
    return [
        Response(
            prompt_id=prompt_id,
            sample_index=sample_index,
            segments=tuple(segments[first:stop]),
            finish_reason=str(reason),
            text=text,
        )
        for (prompt_id, sample_index, _), (first, stop), reason, text in zip(
            described, pairwise(ends), arrays["finish_reasons"], texts, strict=True
        )
    ]


def _segments(arrays: dict[str, np.ndarray]) -> list[Segment]:
    table = arrays["table"]
    prompts, outputs = _divided(arrays["prompt_ids"], table[:, 2]), _divided(arrays["output_ids"], table[:, 3])
    turns: list[np.ndarray | None] = [None] * len(table)
    num_policy_tokens = table[:, 3]
    if "num_turns" in arrays:
        parts = _divided(arrays["turns"], np.maximum(arrays["num_turns"], 0))
        turns = [part if count >= 0 else None for part, count in zip(parts, arrays["num_turns"], strict=True)]
        counts = [len(o) if t is None else int((t[:, 1] - t[:, 0]).sum()) for o, t in zip(outputs, turns, strict=True)]
        num_policy_tokens = np.array(counts, np.int64)
    logprobs = _divided(arrays["rollout_logprobs"], num_policy_tokens)
    versions = _divided(arrays["policy_versions"], num_policy_tokens)
    routed = _divided(arrays["routed_experts"], np.maximum(table[:, 4], 0))
    teacher: list[np.ndarray | None] = [None] * len(table)
    if "teacher_logprobs" in arrays:
        scored = zip(
            _divided(arrays["teacher_logprobs"], num_policy_tokens), arrays["has_teacher_logprobs"], strict=True
        )
        teacher = [part if has else None for part, has in scored]
    return [
        Segment(
            prompt_ids=prompts[i],
            output_ids=outputs[i],
            rollout_logprobs=logprobs[i],
            policy_versions=versions[i],
            turns=turns[i],
            routed_experts=routed[i] if row[4] >= 0 else None,
            teacher_logprobs=teacher[i],
        )
        for i, row in enumerate(table)
    ]


def _divided(array: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Divide an array into parts of these lengths, which together are all of it."""
    return np.split(array, np.cumsum(counts))[:-1]


def _joined(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    parts = list(arrays)
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
