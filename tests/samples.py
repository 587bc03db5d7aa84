"""Scored samples, and plans over them, for tests of what plans and of what uses a plan."""

import numpy as np

from megatron_rl.c3po.algorithms import ALGORITHMS
from megatron_rl.c3po.packing import CostModel
from megatron_rl.c3po.plan import PlanRules, Schedule, schedule
from megatron_rl.records import Group, Response, Sample


def make_sample(prompt_id: int, index: int, length: int, version: int = 3, reward: float = 1.0) -> Sample:
    response = Response(
        prompt_id=prompt_id,
        sample_index=index,
        prompt_ids=np.arange(4, dtype=np.int32),
        output_ids=np.arange(length, dtype=np.int32),
        rollout_logprobs=np.zeros(length, np.float32),
        policy_versions=np.full(length, version, np.int32),
        finish_reason="stop",
    )
    return Sample(response=response, reward=reward, reason="correct" if reward else "wrong", advantage=0.5)


def make_schedule(
    groups: list[Group], carried: tuple[Sample, ...] = (), *, seed: int = 1, **changes: object
) -> Schedule:
    options = {
        "algorithm": ALGORITHMS["c3po"], "budgets": (40,), "cut": "token", "keep_surplus": True,
        "num_data_ranks": 2, "token_cap": 64, "cost": CostModel(linear=1.0, quadratic=0.0),
        "max_response_tokens": 32,
    }  # fmt: skip
    return schedule(groups, carried, PlanRules(**options | changes), policy_version=3, seed=seed)
