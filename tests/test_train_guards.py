"""Tests the guards of a run: its alarms, deadlines and other checks of itself."""

import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config.train import TrainSection
from megatron_rl.errors import Fault, SharedFault
from megatron_rl.train.run.alarms import Alarms, SkipGuard
from megatron_rl.train.run.metrics import MetricsLog, read_metrics
from megatron_rl.train.run.signals import told_in_words
from megatron_rl.train.run.watchdog import Watchdog
from megatron_rl.train.step.trainer import StepResult

SECTION = TrainSection(micro_batch_tokens=1, max_skipped_steps=2)


def result(skipped: bool) -> StepResult:
    return StepResult(
        skipped=skipped, grad_norm=float("nan"), learning_rate=1.0, num_loss_tokens=1, num_forward_tokens=1,
        num_padding_tokens=0, metrics={"loss": 1.0},
    )  # fmt: skip


def test_so_many_skipped_steps_in_a_row_are_allowed_and_one_more_is_not() -> None:
    guard = SkipGuard(SECTION, "Batches: run_dir/skipped. ")
    guard.check([result(True), result(True)])
    guard.check([result(False), result(True)])
    guard.check([result(True)])
    with pytest.raises(
        SharedFault, match=r"3 optimizer steps in a row .* gradient norm nan.* allows 2.*run_dir/skipped"
    ):
        guard.check([result(True)])


def alarms_after(past: Sequence[Mapping[str, Any]]) -> Alarms:
    """Return the alarms of a run that goes on after these rows."""
    alarms = Alarms(SECTION)
    for row in past:
        alarms.check(row)
    return alarms


def rows(norms: list[float | None], rewards: list[float]) -> list[dict[str, float | None]]:
    return [{"grad_norm": norm, "reward": reward} for norm, reward in zip(norms, rewards, strict=True)]


def test_a_gradient_far_above_the_usual_is_reported_once_there_is_a_usual() -> None:
    alarms = alarms_after(rows([1.0] * 8, [0.5] * 8))
    assert alarms.check({"grad_norm": 50.0, "reward": 0.5}) == []  # 8 are too few
    assert alarms.check({"grad_norm": 1.0}) == []
    assert alarms.check({"grad_norm": 9.9}) == []
    assert alarms.check({"grad_norm": 10.5}) == ["the gradient norm 10.5 is far above the usual 1"]
    assert alarms.check({"grad_norm": None}) == alarms.check({"grad_norm": float("nan")}) == []


def test_a_reward_that_collapses_is_reported_also_across_a_resume() -> None:
    alarms = alarms_after(rows([None] * 10, [0.6] * 10))
    assert alarms.check({"grad_norm": None, "reward": 0.3}) == []  # half of 0.6, and not below
    falling = [alarms.check({"grad_norm": None, "reward": 0.29}) for _ in range(53)]
    assert [index for index, found in enumerate(falling, start=1) if found] == [3, 53]  # once, and again much later
    assert "the reward has been below 0.3 for 3 steps or more, now 0.29, and its best mean of 10" in falling[2][0]
    assert "was 0.6. Likely: the policy has collapsed (lower optimizer.learning_rate" in falling[2][0]
    noisy = alarms_after(rows([None] * 10, [0.6] * 10))
    assert [noisy.check({"grad_norm": None, "reward": r}) for r in (0.0, 0.0, 0.4, 0.0, 0.0)] == [[]] * 5
    never_good = alarms_after(rows([None] * 20, [0.04] * 10 + [0.0] * 10))
    assert never_good.check({"grad_norm": None, "reward": 0.0}) == []


def test_the_rows_of_a_resumed_run_are_seen_once_in_order_and_not_kept_in_memory(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0, lambda row: None).close()  # what it imports takes memory too
    path, num_rows = tmp_path / "metrics.jsonl", 3000
    made = [
        {"step": i, "grad_norm": i / 7, "text": f"{i} " * 300, "num_starts": 1 + i // 1000} for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made) + '{"step": 3000, "gra')
    seen: list[float] = []
    tracemalloc.start()
    log = MetricsLog(tmp_path, num_rows - 5, lambda row: seen.append(row["grad_norm"]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4
    log.write({"step": num_rows - 5, "grad_norm": 1.0})
    log.close()
    assert seen == [row["grad_norm"] for row in made[:-5]]
    assert read_metrics(path) == [*made[:-5], {"step": num_rows - 5, "grad_norm": 1.0, "num_starts": 4}]


def test_the_heartbeat_says_where_rank_0_is(tmp_path: Path) -> None:
    watch = Watchdog(tmp_path, 0, 3600.0)
    before = time.time()
    watch.enter("train", 7)
    after = time.time()
    said = json.loads((tmp_path / "heartbeat.json").read_text())
    other = Watchdog(tmp_path, 1, 3600.0)
    other.enter("save", 9)
    watch.close()
    other.close()
    assert (said["phase"], said["step"]) == ("train", 7)
    assert before <= said["time"] <= after
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 7


def test_a_phase_beyond_its_deadline_writes_stacks_and_ends_the_process(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\nfrom megatron_rl.train.run.watchdog import Watchdog\n"
        "watch = Watchdog(pathlib.Path(sys.argv[1]), 3, 0.5)\n"
        "def hang_here():\n    watch.enter('train', 12)\n    time.sleep(10**6)\nhang_here()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rank 3, phase train of step 12: not done after train.phase_deadline_seconds = 0.5" in done.stderr
    stacks = (tmp_path / "stacks/rank_3.txt").read_text()
    assert stacks.startswith("rank 3, phase train of step 12, after 0.5 s\n")
    assert "in hang_here" in stacks


def test_lost_ranks_and_full_memory_are_told_in_words(tmp_path: Path) -> None:
    watch = Watchdog(tmp_path, 2, 3600.0)
    watch.enter("train", 5)
    lost = "[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9"
    for error, message in [
        (RuntimeError(lost), r"rank 2, phase train of step 5: lost contact with another rank .*--resume"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), r"out of memory .*train.micro_batch_tokens.*recompute"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (MemoryError(), "out of memory"),
        (Fault("as it is"), "^as it is$"),
    ]:
        with pytest.raises(Fault, match=message), told_in_words(watch):
            raise error
    with pytest.raises(RuntimeError, match="^a bug$") as bug, told_in_words(watch):
        raise RuntimeError("a bug")
    assert not isinstance(bug.value, Fault)
    watch.close()
