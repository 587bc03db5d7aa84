"""Scored samples for tests of what plans them."""

import numpy as np

from megatron_rl.records import Response, Sample


def make_sample(prompt_id: int, index: int, length: int, version: int = 3, reward: float = 1.0) -> Sample:
    response = Response(
        prompt_id=prompt_id,
        sample_index=index,
        prompt_ids=np.arange(4, dtype=np.int32),
        output_ids=np.arange(length, dtype=np.int32),
        rollout_logprobs=np.zeros(length, np.float32),
        policy_version=version,
        finish_reason="stop",
    )
    return Sample(response=response, reward=reward, reason="correct" if reward else "wrong", advantage=0.5)
