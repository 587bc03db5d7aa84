"""Tests scores of any size and sign in training, evaluation, selection and curation."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import make_sample

from megatron_rl.c3po.advantage import ADVANTAGES, all_equal, group_advantages, overlong_penalty
from megatron_rl.config.train import RlTrainSection
from megatron_rl.data.curation.config import DifficultySection
from megatron_rl.data.curation.difficulty import read_difficulty
from megatron_rl.evaluation.report import interval
from megatron_rl.evaluation.responses import Judged
from megatron_rl.evaluation.results import summarise
from megatron_rl.evaluation.statistics import estimate, mean_of
from megatron_rl.rollout.archive import Carry, pack_carry, unpack_carry
from megatron_rl.train.run.alarms import Alarms

SCORES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=16)


@pytest.mark.parametrize("kind", sorted(ADVANTAGES))
@given(rewards=SCORES, shift=st.floats(-1e3, 1e3))
def test_advantages_are_finite_sum_to_nothing_and_do_not_change_with_a_shift(
    kind: str, rewards: list[float], shift: float
) -> None:
    values = np.round(np.array(rewards), 3)
    advantages = group_advantages(values, kind)
    assert np.isfinite(advantages).all()
    assert advantages.sum() == pytest.approx(0, abs=1e-6 * max(1.0, np.abs(advantages).sum()))
    moved = group_advantages(values + round(shift, 3), kind)
    scale = max(1.0, np.abs(advantages).max()) * max(1.0, np.abs(values).max() / max(1e-3, np.ptp(values)))
    assert moved == pytest.approx(advantages, abs=1e-8 * scale)


def test_sums_that_only_rounding_tells_apart_are_equal_rewards() -> None:
    rewards = [0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]
    assert len(set(rewards)) == 2
    assert all_equal(rewards)
    assert group_advantages(np.array(rewards)).tolist() == [0.0] * 4
    assert all_equal([-5.0, -5.0]) and all_equal([0.0, 0.0])
    assert not all_equal([1e-13, 0.0]) and not all_equal([1e6, 1e6 + 1e-3])


def test_the_overlong_punishment_is_in_the_units_of_the_reward() -> None:
    # a buffer of 4 tokens before 20: half of it is used up at 18
    assert [overlong_penalty(n, 20, 4, 10.0) for n in (16, 18, 20)] == [0.0, -5.0, -10.0]
    assert overlong_penalty(18, 20, 4) == -0.5


def row(step: int, reward: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "grad_norm": 1.0, "reward": reward, "entropy": 1.0, "uniform_group_share": 0.0, **more}


def alarms() -> Alarms:
    return Alarms(RlTrainSection(steps=1, micro_batch_tokens=1, reward_alarm=0.5))


def test_a_negative_reward_that_collapses_is_told_and_one_that_climbs_is_not() -> None:
    watching = alarms()
    climbing = [watching.check(row(i, -5.0 + 0.2 * i)) for i in range(21)]  # to -1; best mean of ten: -1.9
    assert climbing == [[]] * 21
    # from the lowest, -5, half of the way up to the best mean is -3.45
    assert [watching.check(row(21 + i, -3.4)) for i in range(4)] == [[]] * 4
    told = [watching.check(row(25 + i, -3.5)) for i in range(3)]
    assert told[:2] == [[], []]
    assert (
        "the reward has been below -3.45 for 3 steps or more, now -3.5, and its best mean of 10 steps was -1.9"
        in told[2][0]
    )


def test_equal_scores_are_called_too_easy_only_where_they_are_correct() -> None:
    def told(reward: float, **shares: float) -> str:
        watching = alarms()
        changes = {"uniform_group_share": 1.0, **shares}
        return [watching.check(row(i, reward, **changes)) for i in range(3)][-1][0]

    assert "too easy" in told(0.25, correct_share=1.0)
    assert "too hard" in told(5.0, correct_share=0.0)
    assert "either always or never solved" in told(1.0, correct_share=0.5)


def test_parts_come_back_from_an_archive() -> None:
    some = [replace(make_sample(0, 0, 3), parts={"form": 0.1 + 0.2, "answer": -1.0}), make_sample(0, 1, 3)]
    back = unpack_carry(pack_carry(Carry(samples=tuple(some), since=(0, 0)))).samples
    assert [dict(one.parts) for one in back] == [{"form": 0.1 + 0.2, "answer": -1.0}, {}]


def rows_of(scores: Mapping[str, list[tuple[float, str, str | None]]]) -> list[Judged]:
    """Make judged rows of the (score, reason, answer) of each prompt's samples."""
    return [
        Judged(
            position=0, sample_index=i, prompt_id=name, kind="k", judged_as="own.py:f", prompt="", response="",
            answer=answer, score=score, reason=reason, details="", num_tokens=4, finish_reason="stop",
        )
        for name, found in scores.items()
        for i, (score, reason, answer) in enumerate(found)
    ]  # fmt: skip


def test_an_evaluation_averages_scores_and_counts_what_was_judged_correct() -> None:
    found = summarise(
        rows_of(
            {
                "a": [(-2.0, "wrong", "1"), (3.0, "correct", "2")],
                "b": [(0.5, "wrong", "1"), (0.0, "wrong", "1")],
                "c": [(0.0, "correct", None), (2.0, "wrong", "7")],
            }
        ),
        (1, 2),
    )
    # the prompts' means are 0.5, 0.25, 1; s = sqrt(7/48), t(0.975, 2) = 4.30265
    assert found.average.value == pytest.approx(7 / 12)
    far = 4.30265 * math.sqrt(7 / 48 / 3)
    assert (found.average.low, found.average.high) == pytest.approx((7 / 12 - far, 7 / 12 + far), rel=1e-5)
    assert [found.pass_at[k].value for k in (1, 2)] == pytest.approx([1 / 3, 2 / 3])
    assert found.majority_at is not None
    assert found.majority_at[1].value == pytest.approx(1 / 3)
    assert found.reasons == {"correct": 2, "wrong": 4}
    assert interval(found.average) == "0.583 [-0.365, 1.532]"


def test_scores_between_0_and_1_keep_their_interval_in_percent() -> None:
    found = summarise(rows_of({"a": [(0.25, "wrong", "1")], "b": [(1.0, "correct", "2")]}), (1,))
    assert found.average == estimate([0.25, 1.0], 1)
    assert interval(found.average).startswith("62.5 [")
    graded = estimate([2.0, 4.0], 1, is_share=False)
    both = mean_of([found.average, graded])
    assert (both.value, both.is_share) == ((0.625 + 3) / 2, False)
    assert both.high > 1


def test_difficulty_counts_what_was_judged_correct_unless_a_least_reward_is_named(tmp_path: Path) -> None:
    rows = [(0.7, "correct"), (0.2, "wrong"), (-1.0, "wrong"), (0.9, "error")]
    lines = [json.dumps({"prompt": "p", "reward": reward, "reason": reason}) + "\n" for reward, reason in rows]
    (tmp_path / "rollouts.jsonl").write_text("".join(lines))
    for passing, solved in ((None, 1), (0.1, 2), (0.95, 0)):
        section = DifficultySection(rollouts=(str(tmp_path / "rollouts.jsonl"),), passing_reward=passing)
        found = read_difficulty(section)
        assert found is not None
        assert list(found.model.values()) == [(solved, 3)]
