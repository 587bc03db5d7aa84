"""Samples as bytes and back: a numpy archive without pickled objects."""

import io
from collections.abc import Sequence

import numpy as np

from megatron_rl.records import Response, Sample


def pack_samples(samples: Sequence[Sample]) -> bytes:
    """Inverse of `unpack_samples`, exactly."""
    responses = [sample.response for sample in samples]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=np.array([(r.prompt_id, r.sample_index, r.policy_version) for r in responses], np.int64).reshape(-1, 3),
        lengths=np.array([(len(r.prompt_ids), len(r.output_ids)) for r in responses], np.int64).reshape(-1, 2),
        prompt_ids=_joined([r.prompt_ids for r in responses], np.int32),
        output_ids=_joined([r.output_ids for r in responses], np.int32),
        rollout_logprobs=_joined([r.rollout_logprobs for r in responses], np.float32),
        scores=np.array([(s.reward, s.advantage) for s in samples], np.float64).reshape(-1, 2),
        texts=np.array([(s.reason, s.response.finish_reason) for s in samples], np.str_).reshape(-1, 2),
    )
    return buffer.getvalue()


def unpack_samples(data: bytes) -> tuple[Sample, ...]:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    prompts = np.split(arrays["prompt_ids"], np.cumsum(arrays["lengths"][:, 0]))
    outputs = np.split(arrays["output_ids"], np.cumsum(arrays["lengths"][:, 1]))
    logprobs = np.split(arrays["rollout_logprobs"], np.cumsum(arrays["lengths"][:, 1]))
    return tuple(
        Sample(
            response=Response(
                prompt_id=int(ids[0]),
                sample_index=int(ids[1]),
                policy_version=int(ids[2]),
                prompt_ids=prompts[i],
                output_ids=outputs[i],
                rollout_logprobs=logprobs[i],
                finish_reason=str(texts[1]),
            ),
            reward=float(score[0]),
            advantage=float(score[1]),
            reason=str(texts[0]),
        )
        for i, (ids, score, texts) in enumerate(zip(arrays["ids"], arrays["scores"], arrays["texts"], strict=True))
    )


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)
