"""Makes scored samples and plans over them, for tests of what makes and uses plans."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.c3po.algorithms import ALGORITHMS
from megatron_rl.c3po.packing import CostModel
from megatron_rl.c3po.plan import PlanRules, Schedule, schedule
from megatron_rl.records import Group, Response, Sample, Segment


def make_sample(prompt_id: int, index: int, length: int, version: int = 3, reward: float = 1.0) -> Sample:
    """Make a sample that continues its prompt by `length` tokens."""
    return make_trajectory(prompt_id, index, [make_segment(length, version)], reward)


def make_trajectory(prompt_id: int, index: int, segments: Sequence[Segment], reward: float = 1.0) -> Sample:
    response = Response(prompt_id=prompt_id, sample_index=index, segments=tuple(segments), finish_reason="stop")
    return Sample(response=response, reward=reward, reason="correct" if reward else "wrong", advantage=0.5)


def make_segment(
    length: int, version: int = 3, turns: Sequence[tuple[int, int]] | None = None, num_prompt_tokens: int = 4
) -> Segment:
    """Make a segment of `length` output tokens, of which the policy sampled those of `turns`, or all."""
    count = length if turns is None else sum(stop - start for start, stop in turns)
    return Segment(
        prompt_ids=np.arange(num_prompt_tokens, dtype=np.int32),
        output_ids=np.arange(length, dtype=np.int32),
        rollout_logprobs=np.zeros(count, np.float32),
        policy_versions=np.full(count, version, np.int32),
        turns=None if turns is None else np.array(turns, np.int32).reshape(-1, 2),
    )


def random_segment(seed: int, length: int, turns: Sequence[tuple[int, int]] | None = None) -> Segment:
    """Make a segment of random tokens behind a prompt of 8."""
    ids = np.random.default_rng(seed).integers(2, 96, 8 + length).astype(np.int32)
    return replace(make_segment(length, turns=turns), prompt_ids=ids[:8], output_ids=ids[8:])


def make_schedule(
    groups: list[Group], carried: tuple[Sample, ...] = (), *, seed: int = 1, **changes: object
) -> Schedule:
    options = {
        "algorithm": ALGORITHMS["c3po"], "budgets": (40,), "cut": "token", "keep_surplus": True,
        "num_data_ranks": 2, "token_cap": 64, "cost": CostModel(linear=1.0, quadratic=0.0),
        "max_response_tokens": 32,
    }  # fmt: skip
    return schedule(groups, carried, PlanRules(**options | changes), policy_version=3, seed=seed)
