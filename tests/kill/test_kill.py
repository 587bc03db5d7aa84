"""Runs that are killed again and again, and end with the numbers of one that was not.

`make test-kill KILLS=30`. Each chain is one run: it is killed at a random moment of a random phase of every step, by
SIGKILL to all of it or to one process of it, and started again with --resume until it ends. A run that is faster than
the test waits for it at the end of that phase.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from inputs import make_inputs
from small_disk import NO_MOUNT, small_disk

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
STEPS = 6
PHASES = ("sync", "rollout", "reward", "train", "save")
KILLS = int(os.environ.get("KILLS", "30"))
KILLS_PER_CHAIN = min(STEPS - 1, -(-KILLS // 2))  # one chain of one rank, the next of two
CHAINS = -(-KILLS // KILLS_PER_CHAIN)
CONFIG = """
run_dir = "{run}"
threads = 1
[model]
path = "{inputs}/model"
[data]
train = "{inputs}/data/train.jsonl"
[rollout]
prompts_per_step = 6
samples_per_prompt = 8
max_prompt_tokens = 32
max_response_tokens = 48
max_running_requests = 8
servers = 2
[reward]
kind = "math"
timeout_seconds = 300
[budget]
tokens = 1200
[optimizer]
learning_rate = 1e-3
[algorithm]
kl_coefficient = 1e-3
[train]
steps = {steps}
save_every = 2
micro_batch_tokens = 256
phase_deadline_seconds = 600
"""
# What every process of a run runs first. Rank 0 leaves the phase "PHASE of STEP" when there is a file.
HOLD = """
import os, pathlib, time
if held := os.environ.get("HELD_PHASE"):
    from megatron_rl.train.run.watchdog import Watchdog
    enter = Watchdog.enter
    def enter_in_time(watchdog, phase, step):
        if watchdog._rank == 0 and hasattr(watchdog, "phase"):
            now = f"{watchdog.phase} of {watchdog.step}"
            while now == held != f"{phase} of {step}" and not pathlib.Path(os.environ["MAY_LEAVE"]).exists():
                time.sleep(0.005)
        enter(watchdog, phase, step)
    Watchdog.enter = enter_in_time
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Holds what a run left: metrics without times, rows of rollouts by step, and files of traced tokens."""

    metrics: list[dict[str, Any]]
    sampled: list[list[str]]
    traced: list[str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), 10, 100, 8)


def start(inputs: Path, folder: Path, ranks: int, *options: str, held: str = "") -> subprocess.Popen[bytes]:
    """Start the run. held: the phase that it leaves only when there is `folder/may_leave`, as in HOLD."""
    config = folder / "config.toml"
    config.write_text(CONFIG.format(inputs=inputs, run=folder / "run", steps=STEPS))
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/sitecustomize.py").write_text(HOLD)
    (folder / "may_leave").unlink(missing_ok=True)
    environment = {"PYTHONPATH": f"{folder}/site:{ROOT}", "HELD_PHASE": held, "MAY_LEAVE": f"{folder}/may_leave"}
    command = [PYTHON, "-m", "megatron_rl.cli", "train", config, "--resume", *options]
    if ranks > 1:
        command += ["--nproc", str(ranks)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True)


def finish(run: subprocess.Popen[bytes], folder: Path) -> None:
    assert run.wait(timeout=900) == 0, (folder / "log.txt").read_text()[-4000:]


def outcome(folder: Path) -> Outcome:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    others = ("_seconds", "_per_second", "num_starts")
    metrics = [{key: value for key, value in row.items() if not key.endswith(others)} for row in rows]
    sampled = []
    for step in range(STEPS):
        lines = (folder / f"run/rollouts/step_{step:06d}.jsonl").read_text().splitlines()
        sampled.append(sorted(lines))
    traced = [(folder / f"run/tokens/step_{step:06d}.jsonl").read_text() for step in range(STEPS)]
    return Outcome(metrics=metrics, sampled=sampled, traced=traced)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcome]:
    """Return the outcomes of runs that nobody kills, by the number of ranks."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"undisturbed{ranks}")
        finish(start(inputs, folder, ranks), folder)
        found[ranks] = outcome(folder)
        assert len(found[ranks].metrics) == STEPS
    return found


def wait_for(phase: str, steps: Sequence[int], folder: Path, run: subprocess.Popen[bytes]) -> None:
    """Wait until the run is in this phase of one of these steps; for "reward", until the first groups are scored."""
    heartbeat, journal = folder / "run/heartbeat.json", folder / f"run/journal/step_{steps[0]:06d}.journal"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        place = f"{phase} of {steps}"
        assert run.poll() is None, f"ended before {place}: {(folder / 'log.txt').read_text()[-3000:]}"
        if phase == "reward":
            if journal.exists() and journal.stat().st_size > 1000:
                return
        else:
            try:
                now = json.loads(heartbeat.read_text())
            except (OSError, ValueError):
                now = {}
            # Looking at processes takes longer than some phases, so it comes last.
            if now.get("phase") == phase and now["step"] in steps and now["pid"] in {p.pid for p in tree(run)}:
                return
        time.sleep(0.003)
    raise AssertionError(f"{phase} of {steps} did not come within 600 s")


def tree(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        top = psutil.Process(run.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def kill(run: subprocess.Popen[bytes], folder: Path, rng: random.Random) -> str:
    """Kill everything, or one training process or the launcher, by SIGKILL, and check that all of the run ends."""
    processes = tree(run)
    ranks = [p for p in processes if any("megatron_rl.cli" in part for part in words_of(p))]
    victims = processes if rng.random() < 0.3 else [rng.choice(ranks)]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    (folder / "may_leave").touch()  # so that rank 0 meets the others, where it is left
    run.wait(timeout=300)
    _, left = psutil.wait_procs(processes, timeout=300)
    assert not left, f"still there after the kill: {[words_of(p) for p in left if p.is_running()]}"
    return "all" if len(victims) > 1 else f"1 of {len(ranks)}"


@pytest.mark.timeout(10000)
@pytest.mark.parametrize("chain", range(CHAINS))
def test_a_run_that_is_killed_continues_to_the_same_numbers(
    chain: int, inputs: Path, undisturbed: dict[int, Outcome], tmp_path: Path
) -> None:
    rng = random.Random(f"kill {chain}")
    ranks = 1 + chain % 2
    for step in range(KILLS_PER_CHAIN):
        phase = PHASES[(3 * chain + step) % len(PHASES)]
        # A checkpoint is made after every second step, and called by the number of steps before it.
        place = step if phase != "save" else 2 * (step // 2) + 2
        held = "rollout" if phase == "reward" else phase
        run = start(inputs, tmp_path, ranks, held=f"{held} of {place}")
        try:
            wait_for(phase, [place], tmp_path, run)
            time.sleep(rng.uniform(0, 0.3))
            who = kill(run, tmp_path, rng)
            print(f"chain {chain}, {ranks} rank(s): killed {who} in {phase} of step {place}")
        finally:
            for process in tree(run):
                process.kill()
    finish(start(inputs, tmp_path, ranks), tmp_path)
    assert "groups of this phase were completed before" in (tmp_path / "log.txt").read_text()
    found = outcome(tmp_path)
    for mine, theirs in zip(found.metrics, undisturbed[ranks].metrics, strict=True):
        assert mine == theirs
    assert found.sampled == undisturbed[ranks].sampled
    assert found.traced == undisturbed[ranks].traced


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "lost contact with another rank"),
        (signal.SIGSTOP, "not done after train.phase_deadline_seconds = 60"),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_run_soon_and_leaves_nothing(
    inputs: Path, tmp_path: Path, number: signal.Signals, message: str
) -> None:
    run = start(inputs, tmp_path, 2, "--set", "train.steps=5000", "--set", "train.phase_deadline_seconds=60")
    processes: list[psutil.Process] = []
    try:
        wait_for("train", range(2, 5000), tmp_path, run)
        processes = tree(run)
        (rank,) = (p for p in processes if "megatron_rl.cli" in words_of(p) and p.environ().get("RANK") == "1")
        rank.send_signal(number)  # in that phase, or soon behind it: it says the same in every one
        assert run.wait(timeout=600) == 1
        assert message in (tmp_path / "log.txt").read_text()
        _, left = psutil.wait_procs(processes, timeout=300)
        assert left == []
        assert (tmp_path / "run/stacks/rank_0.txt").exists() == (number == signal.SIGSTOP)
    finally:
        for process in processes:
            if process.is_running():
                process.kill()


@pytest.mark.timeout(10000)
def test_a_disk_that_takes_no_more_rollouts_stops_the_run_or_costs_it_the_log_as_configured(
    inputs: Path, tmp_path: Path
) -> None:
    log, run_dir = tmp_path / "log.txt", tmp_path / "run"
    with small_disk(run_dir / "journal", 8192) as mounted:
        if not mounted:
            pytest.skip(NO_MOUNT)
        options = ["--set", "train.steps=2", "--set", "train.on_save_error=continue"]
        finish(start(inputs, tmp_path, 1, *options), tmp_path)
        said = log.read_text()
        assert "No space left on device" in said
        assert "groups of this phase are not kept for a resume (train.on_save_error)" in said
        assert start(inputs, tmp_path, 1, "--set", "train.steps=3").wait(timeout=900) == 1
        said = log.read_text()[len(said) :]
        assert "groups of this phase are not kept for a resume. Make room and --resume" in said
        assert "Traceback" not in said
    with small_disk(tmp_path / "full", 4096):
        for name in ("rollouts", "tokens"):
            shutil.rmtree(run_dir / name)
            (run_dir / name).symlink_to(tmp_path / "full")
        already = len(log.read_text())
        finish(start(inputs, tmp_path, 1, "--set", "train.steps=3", "--set", "train.on_save_error=continue"), tmp_path)
        said = log.read_text()[already:]
        assert "the responses of this step are not written (train.on_save_error)" in said
        assert "the token traces of this step are not written (train.on_save_error)" in said
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
