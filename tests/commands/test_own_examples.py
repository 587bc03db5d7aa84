"""Tests the examples that people copy, for two steps on a tiny model, and a killed run with a reward of its own."""

import importlib.util
import json
import sys
from pathlib import Path

import example_runs
import pytest
from example_runs import finish, numbers
from inputs import ROOT, make_inputs
from inside import killed

SMALL = [
    *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_response_tokens=16"),
    *("rollout.max_running_requests=4", "rollout.threads=1", "threads=1", "budget.tokens=48", "train.steps=2"),
    *("train.micro_batch_tokens=256", "train.save_every=1", "reward.workers=1", "optimizer.warmup_steps=0"),
    "reward.timeout_seconds=300",  # a busy machine changes no verdict
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), 8, 40, 8)


def command(example: str, inputs: Path, run: Path, *options: str) -> list[str]:
    return example_runs.command(example, inputs, run, SMALL, *options)


@pytest.fixture(scope="module")
def own_reward(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(command("own_reward", inputs, run))
    return run


def test_an_own_reward_with_parts_trains_and_leaves_its_parts(own_reward: Path) -> None:
    rows = numbers(own_reward)
    assert len(rows) == 2
    for row in rows:
        assert row["reward"] == pytest.approx(0.2 * row["reward_part/form"] + row["reward_part/near"], abs=1e-12)
        assert row["reward_error_share"] == 0
    lines = (own_reward / "rollouts/step_000000.jsonl").read_text().splitlines()
    for sample in map(json.loads, lines):
        assert sample["reward"] == pytest.approx(0.2 * sample["parts"]["form"] + sample["parts"]["near"])
    assert (own_reward / "reward_output.log").is_file()


BEHIND_A_CHECKPOINT = """
from megatron_rl.checkpoint import steps
point_to = steps.point_to
def point_and_end(path):
    point_to(path)
    end_now()
steps.point_to = point_and_end
"""


def test_a_killed_run_with_an_own_reward_and_parts_comes_to_the_same_bits(
    own_reward: Path, inputs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed(command("own_reward", inputs, run), BEHIND_A_CHECKPOINT)
    assert (run / "checkpoints/latest").read_text() == "step_1"
    finish(command("own_reward", inputs, run, "--resume"))
    assert numbers(run) == numbers(own_reward)
    for step in (0, 1):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (run / name).read_text() == (own_reward / name).read_text()


def test_an_own_algorithm_trains_in_two_passes(inputs: Path, tmp_path: Path) -> None:
    # So long that some responses of random weights end: what is cut off carries no loss here.
    longer = [
        part for change in ("samples_per_prompt=4", "max_response_tokens=80") for part in ("--set", f"rollout.{change}")
    ]
    finish(command("own_algorithm", inputs, tmp_path / "run", *longer))
    rows = numbers(tmp_path / "run")
    assert [len(row["num_loss_tokens_by_step"]) for row in rows] == [2, 2]
    assert all(min(row["num_loss_tokens_by_step"]) > 0 for row in rows)
    assert all(row["correction_weight"] <= 2 for row in rows)


def test_reasoning_gyms_tasks_train_with_their_own_scores(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym", reason="the package reasoning-gym is not installed")
    folder = ROOT / "examples/reasoning_gym"
    modules = {}
    for name in ("prepare", "rewards"):
        spec = importlib.util.spec_from_file_location(f"reasoning_gym_{name}", folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path), "--num", "3"])
    modules["prepare"].main()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert {row["domain"] for row in rows} == set(modules["prepare"].TASKS)
    for row in rows:
        right = f"so \\boxed{{{row['answer']}}}"
        assert modules["rewards"].score(right, row["domain"], row["meta"]).value == 1.0
        assert modules["rewards"].score("\\boxed{nonsense}", row["domain"], row["meta"]).value < 1.0
    changes = [f"data.train={tmp_path}/train.jsonl", "data.too_long=drop", "data.system=''", "model.dtype=float32"]
    changes += ["rollout.max_prompt_tokens=480", "train.micro_batch_tokens=512"]
    flags = [part for change in changes for part in ("--set", change)]
    finish(command("reasoning_gym", inputs, tmp_path / "run", *flags))
    (first, _) = numbers(tmp_path / "run")
    assert first["reward_error_share"] == 0
