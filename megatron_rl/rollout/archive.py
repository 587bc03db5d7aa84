"""Responses as bytes and back: a numpy archive without pickled objects."""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from megatron_rl.records import Response, Sample, UnfinishedGroup

# Per response: prompt_id, sample_index, and how many prompt tokens, output tokens and routed positions it has.
_NUM_COLUMNS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """What one rollout phase leaves to the next.

    samples: scored surplus. since: the step in which each became that. unfinished: groups that are not finished.
    """

    samples: tuple[Sample, ...] = ()
    since: tuple[int, ...] = ()
    unfinished: tuple[UnfinishedGroup, ...] = ()


def pack_carry(carry: Carry) -> bytes:
    """Inverse of `unpack_carry`, exactly."""
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
    routed = [r.routed_experts for r in responses if r.routed_experts is not None]
    table = [
        (
            r.prompt_id,
            r.sample_index,
            len(r.prompt_ids),
            len(r.output_ids),
            -1 if r.routed_experts is None else len(r.routed_experts),
        )
        for r in responses
    ]
    return {
        "table": np.array(table, np.int64).reshape(-1, _NUM_COLUMNS),
        "prompt_ids": _joined((r.prompt_ids for r in responses), np.int32),
        "output_ids": _joined((r.output_ids for r in responses), np.int32),
        "rollout_logprobs": _joined((r.rollout_logprobs for r in responses), np.float32),
        "policy_versions": _joined((r.policy_versions for r in responses), np.int32),
        "finish_reasons": np.array([r.finish_reason for r in responses], np.str_),
        "routed_experts": np.concatenate(routed) if routed else np.zeros((0, 0, 0), np.uint8),
    }


def _responses(arrays: dict[str, np.ndarray]) -> list[Response]:
    table = arrays["table"]
    prompts = np.split(arrays["prompt_ids"], np.cumsum(table[:, 2]))
    outputs = np.cumsum(table[:, 3])
    logprobs, versions = np.split(arrays["rollout_logprobs"], outputs), np.split(arrays["policy_versions"], outputs)
    routed = np.split(arrays["routed_experts"], np.cumsum(np.maximum(table[:, 4], 0)))
    return [
        Response(
            prompt_id=int(row[0]),
            sample_index=int(row[1]),
            prompt_ids=prompts[i],
            output_ids=output,
            rollout_logprobs=logprobs[i],
            policy_versions=versions[i],
            finish_reason=str(arrays["finish_reasons"][i]),
            routed_experts=routed[i] if row[4] >= 0 else None,
        )
        for i, (row, output) in enumerate(zip(table, np.split(arrays["output_ids"], outputs)[:-1], strict=True))
    ]


def _joined(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    parts = list(arrays)
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
