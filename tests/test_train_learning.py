"""Tests that a run that learns nothing says so within three steps, with causes and responses."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from megatron_rl.config.train import TrainSection
from megatron_rl.train.run.alarms import Alarms

SECTION = TrainSection(micro_batch_tokens=1)
HEALTHY = {
    "grad_norm": 1.0,
    "reward": 0.5,
    "entropy": 0.4,
    "num_prompts": 8,
    "uniform_group_share": 0.5,
    "no_answer_share": 0.1,
    "wrong_share": 0.4,
    "truncated_share": 0.0,
    "too_slow_share": 0.0,
    "reward_error_share": 0.0,
}


def alarms_after(past: Sequence[Mapping[str, Any]]) -> Alarms:
    """Return the alarms of a run that goes on after these rows."""
    alarms = Alarms(SECTION)
    for row in past:
        alarms.check(row)
    return alarms


def told(num_steps: int, **changes: Any) -> list[list[str]]:
    """Return the alarms of each of so many steps of a new run."""
    alarms = Alarms(SECTION)
    return [alarms.check(HEALTHY | changes) for _ in range(num_steps)]


def test_a_run_that_learns_is_not_spoken_of() -> None:
    assert told(60) == [[]] * 60
    assert told(9, uniform_group_share=0.99) == told(9, no_answer_share=0.5) == told(9, entropy=0.01) == [[]] * 9


@pytest.mark.parametrize(
    ("changes", "said", "causes"),
    [
        (
            {"uniform_group_share": 1.0, "reward": 0.0, "wrong_share": 0.9},
            r"all responses of a prompt have the same reward, for every prompt of the last 3 steps (mean reward 0)",
            ["judge by the wrong rules", "too hard"],
        ),
        ({"uniform_group_share": 1.0, "reward": 1.0}, "(mean reward 1), so nothing is learned", ["too easy"]),
        ({"uniform_group_share": 1.0}, "(mean reward 0.5)", ["either always or never solved"]),
        (
            {"uniform_group_share": 1.0, "reward": 0.0, "too_slow_share": 0.9},
            "mean reward 0",
            ["reward.code.cpu_seconds"],
        ),
        (
            {"no_answer_share": 0.51},
            "51% of the responses give no answer",
            ["\\boxed{}", "chat template"],
        ),
        (
            {"no_answer_share": 1.0, "truncated_share": 0.8},
            "100% of the responses give no answer",
            ["80% are cut off at the limit (raise rollout.max_response_tokens", "\\boxed{}"],
        ),
        (
            {"uniform_group_share": 1.0, "correct_share": 0.0},
            "(mean reward 0.5)",
            ["the same number, such as the floor or the ceiling (make the reward finer)", "too hard"],
        ),
        (
            {"uniform_group_share": 1.0, "entropy": 0.004},
            "the entropy is 0.004 nats per token",
            ["the policy has collapsed"],
        ),
        (
            {"uniform_group_share": 1.0, "reward": 1.0, "ratio_max": 8.5},
            "(mean reward 1), so nothing is learned",
            ["steps are too large, and the policy has collapsed (ratio_max 8.5)", "too easy"],
        ),
        (
            {"num_trained_samples": 0, "no_token_share": 1.0, "entropy": None},
            "no response of the last 3 steps has a token that carries loss",
            ["the agents do not ask the policy"],
        ),
        (
            {"num_trained_samples": 0, "num_dropped_truncated": 64, "entropy": None},
            "so the weights stay as they are",
            ["algorithm.mask_truncated leaves these out (raise rollout.max_response_tokens"],
        ),
        ({"entropy": 0.004}, "the entropy is 0.004 nats per token", ["optimizer.learning_rate", "temperature"]),
    ],
)
def test_three_steps_without_learning_are_told_with_the_likeliest_causes(
    changes: dict[str, Any], said: str, causes: list[str]
) -> None:
    found = told(60, **changes)
    assert [index for index, messages in enumerate(found, start=1) if messages] == [3, 53]
    (message,) = found[2]
    assert said in message
    places = [message.index(cause, message.index("Likely: ")) for cause in causes]
    assert places == sorted(places)


def test_responses_that_cannot_be_judged_are_told() -> None:
    found = told(4, reward_error_share=0.125)
    assert [len(messages) for messages in found] == [0, 0, 1, 0]
    assert "12% of the responses could not be judged" in found[2][0]
    assert "reward_output.log" in found[2][0]
    of_agents = {"uniform_group_share": 1.0, "correct_share": 0.0, "reward_error_share": 0.9, "num_failed_agents": 5}
    *_, (uniform, errors) = told(3, **of_agents)
    assert "many agents failed (agent_output.log says how) or were not done in time (rollout.agent_seconds)" in uniform
    assert "agent_output.log has what the agents printed" in errors
    assert told(9, reward_error_share=0.01) == [[]] * 9


def test_a_step_that_waits_for_rewards_is_told_without_responses_as_examples(caplog: Any) -> None:
    found = told(4, step_seconds=100.0, reward_wait_seconds=51.0)
    assert [len(messages) for messages in found] == [0, 0, 1, 0]
    assert "51 s of 100 s went by with nothing to do but to wait for rewards" in found[2][0]
    assert "Raise reward.workers" in found[2][0]
    assert told(9, step_seconds=100.0, reward_wait_seconds=49.0) == [[]] * 9
    assert told(9, step_seconds=9.5, reward_wait_seconds=9.0) == [[]] * 9  # steps of a few seconds are no matter
    alarms = alarms_after([HEALTHY | {"step_seconds": 100.0, "reward_wait_seconds": 51.0}] * 2)
    alarms.report(HEALTHY | {"step": 2, "step_seconds": 100.0, "reward_wait_seconds": 51.0}, ["a response"])
    assert "wait for rewards" in caplog.text
    assert "a response" not in caplog.text


def test_a_run_without_any_answer_is_told_of_both() -> None:
    changes = {"uniform_group_share": 1.0, "no_answer_share": 1.0, "reward": 0.0, "truncated_share": 1.0}
    *_, (uniform, no_answer) = told(3, **changes)
    assert "100% are cut off at the limit" in uniform
    assert "give no answer" in no_answer


def test_steps_count_in_a_row_also_across_a_resume_and_not_where_nothing_was_sampled() -> None:
    silent = HEALTHY | {"uniform_group_share": 1.0, "reward": 0.0}
    alarms = alarms_after([silent, silent])
    carried = HEALTHY | {"num_prompts": 0, "uniform_group_share": 0.0}  # the step trained what another one had sampled
    assert alarms.check(carried) == []
    assert len(alarms.check(silent)) == 1
    broken = alarms_after([silent, silent, HEALTHY, silent])
    assert broken.check(silent) == []
    # Rows of SFT show no sign of it, and old ones may lack any of these.
    sft = Alarms(SECTION)
    assert [sft.check({"grad_norm": 1.0, "entropy": 0.0, "loss": 0.1}) for _ in range(5)] == [[]] * 5


def test_two_responses_are_told_beside_it_and_only_then(caplog: pytest.LogCaptureFixture) -> None:
    alarms = Alarms(SECTION)
    examples = ["prompt a: expected 7, extracted 8", "prompt b: expected 1, extracted nothing"]
    for step in range(3):
        row = HEALTHY | {"step": step, "uniform_group_share": 1.0, "reward": 0.0}
        alarms.report(row, examples)
    assert row["num_alarms"] == 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2
    assert said[0].startswith("step 2: all responses of a prompt have the same reward")
    assert (
        said[1]
        == "step 2: for example prompt a: expected 7, extracted 8\n  and prompt b: expected 1, extracted nothing"
    )
    caplog.clear()
    jumps = alarms_after([HEALTHY] * 20)
    jumps.report(HEALTHY | {"step": 20, "grad_norm": 99.0}, examples)
    assert len(caplog.records) == 1  # a gradient that jumps is no matter of responses
