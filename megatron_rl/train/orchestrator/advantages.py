"""Computes the advantages of scored responses: of a group as soon as it is scored, or of a whole phase when it is
planned. Adds what a teacher contributes, token by token."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np

from megatron_rl.c3po.advantage import advantages_by, overlong_penalty, takes_batch
from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.config.schema import RlConfig
from megatron_rl.records import Group, Response, Sample
from megatron_rl.reward.verdict import GAVE_UP
from megatron_rl.rollout.rollout_file import Advantages


def advantages_of(config: RlConfig) -> Advantages:
    """Return the function that gives a group its advantages, float64 [K] from its responses and rewards [K]. It gives
    zeros where advantages come from the whole phase, or from a teacher alone, token by token."""
    rule = chosen_algorithm(config.algorithm).advantage
    of_phase = takes_batch(rule) or _is_of_teacher_alone(config)

    def advantages(responses: Sequence[Response], rewards: np.ndarray) -> np.ndarray:
        return np.zeros(len(rewards)) if of_phase else advantages_by(rule, _values(config, responses, rewards))

    return advantages


def with_phase_advantages(
    config: RlConfig, groups: Sequence[Group], carried: Sequence[Sample]
) -> tuple[list[Group], list[Sample]]:
    """Return the groups and carried samples with the advantages that an algorithm gives all responses of a phase at
    once. They stay as they are where the algorithm gives advantages to groups. Carried responses get new ones, among
    those that they are trained with.

    A response that could not be judged has the advantage 0 and no part in those of the others: what stands in for its
    reward, the mean of its group or 0, says nothing beside the rewards of other groups."""
    rule = chosen_algorithm(config.algorithm).advantage
    samples = [*carried, *(sample for group in groups for sample in group.samples)]
    if not samples or not takes_batch(rule) or _is_of_teacher_alone(config):
        return list(groups), list(carried)
    is_judged = np.array([sample.reason not in GAVE_UP for sample in samples])
    given = np.zeros(len(samples))
    if is_judged.any():
        judged = list(compress(samples, is_judged))
        values = _values(config, [s.response for s in judged], np.array([s.reward for s in judged]))
        _, of_prompt = np.unique([sample.response.prompt_id for sample in judged], return_inverse=True)
        given[is_judged] = advantages_by(rule, values | {"groups": of_prompt})
    new = iter([replace(s, advantage=float(a)) for s, a in zip(samples, given, strict=True)])
    carried = [next(new) for _ in carried]
    return [replace(group, samples=tuple(next(new) for _ in group.samples)) for group in groups], carried


def with_teacher(
    config: RlConfig, groups: Sequence[Group], carried: Sequence[Sample], step: int, domain_of: Callable[[int], str]
) -> tuple[list[Group], list[Sample]]:
    """Give all samples the coefficient by which their teacher's log-probs count in this step. domain_of: by the
    position of a prompt."""
    section = config.distillation
    if section is None:
        return list(groups), list(carried)

    def taught(samples: Sequence[Sample]) -> list[Sample]:
        return [
            replace(s, teacher_coefficient=section.coefficient_at(step, domain_of(s.response.prompt_id)))
            for s in samples
        ]

    return [replace(group, samples=tuple(taught(group.samples))) for group in groups], taught(carried)


def _is_of_teacher_alone(config: RlConfig) -> bool:
    return config.distillation is not None and config.distillation.advantage == "alone"


def _values(config: RlConfig, responses: Sequence[Response], rewards: np.ndarray) -> dict[str, Any]:
    """Return the values that an advantage is computed from: c3po/own_objective.py, `OF_ADVANTAGE`."""
    longest, reward = config.rollout.max_response_tokens, config.reward
    buffer, most = reward.overlong_buffer_tokens, reward.overlong_penalty
    penalties = [overlong_penalty(response.num_policy_tokens, longest, buffer, most) for response in responses]
    return {
        "rewards": rewards + penalties,
        "response_tokens": np.array([response.num_policy_tokens for response in responses]),
        "is_truncated": np.array([response.finish_reason == "length" for response in responses]),
    }
