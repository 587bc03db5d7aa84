"""Tests trackers: none may delay a run, fail it or lose its place. The real ones are tested without a network."""

import json
import queue
import sqlite3
import struct
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import forked
import pytest
from rank_zero import config_of
from until import wait_until

from megatron_rl.preflight.checks import check_start
from megatron_rl.preflight.registry import Start
from megatron_rl.train.run import trackers
from megatron_rl.train.run.metrics import MetricsLog, read_metrics
from megatron_rl.train.run.trackers import TrackedRun, Trackers

# Writes steps FIRST to LAST as a run does, and ends; or is killed soon behind them.
PROGRAM = """
import logging, os, pathlib, signal, sys, time
sys.path.insert(0, {tests!r})
from rank_zero import config_of
from megatron_rl.train.run.metrics import MetricsLog
from megatron_rl.train.run import trackers as trackers_module
from megatron_rl.train.run.trackers import Trackers
logging.basicConfig(level="INFO")
if __name__ == "__main__":
    trackers_module._Told.close.__defaults__ = (600.0,)  # a busy machine takes long over wandb's start
    first, last, ends, *changes = sys.argv[1:]
    config = config_of(pathlib.Path({folder!r}), *changes)
    trackers = Trackers(config, int(first), resume=int(first) > 0)
    log = MetricsLog(config.run_dir, int(first), lambda row: None, trackers)
    for step in range(int(first), int(last)):
        log.write({{"step": step, "reward": step / 100, "kl": float("nan"), "by_step": [1], "num_prompts": 3}})
    if ends == "killed":
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    log.close()
"""


class Fake:
    """Keeps what it is told; waits for `go` before each step, and raises what it is told to."""

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.told, self.closed = run, [], False  # type: ignore[var-annotated]
        self.go, self.fails = threading.Event(), False
        self.go.set()

    def log(self, step: int, numbers: Any) -> None:
        self.go.wait()
        if self.fails:
            raise ConnectionError("host is down")
        self.told.append((step, dict(numbers)))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fake]]:
    """Put fakes in the place of wandb, and yield a list of those that are made."""
    made: list[Fake] = []

    def make(run: TrackedRun) -> Fake:
        made.append(Fake(run))
        return made[-1]

    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("json", make))
    yield made
    for fake in made:
        fake.go.set()


def test_a_tracker_gets_every_number_of_a_row_and_no_other(fakes: list[Fake], tmp_path: Path) -> None:
    tracker = Trackers(config_of(tmp_path, "tracking.to=['wandb']"), 0, resume=False)
    log = MetricsLog(tmp_path / "run", 0, lambda row: None, tracker)
    log.write({"step": 0, "reward": 0.5, "kl": float("inf"), "num_loss_tokens_by_step": [3], "num_prompts": 4})
    log.track(1, {"validation/toys": 0.25})
    log.close()
    (fake,) = fakes
    assert fake.told == [(0, {"reward": 0.5, "num_prompts": 4, "num_starts": 1}), (1, {"validation/toys": 0.25})]
    assert fake.closed
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 1


def test_a_slow_tracker_costs_a_warning_and_no_time(
    fakes: list[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "_MOST_WAITING", 5)
    monkeypatch.setattr(trackers._Told.close, "__defaults__", (0.2,))
    ready = queue.Queue[None]()
    monkeypatch.setattr(Fake, "log", lambda fake, step, numbers: (ready.put(None), fake.go.wait()))
    tracker = Trackers(config_of(tmp_path, "tracking.to=['wandb']"), 0, resume=False)
    log = MetricsLog(tmp_path / "run", 0, lambda row: None, tracker)
    log.write({"step": 0})
    ready.get(timeout=300)  # it has the first
    fakes[0].go.clear()
    for step in range(1, 20):
        log.write({"step": step})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(20))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "wandb fails: it is 5 steps behind. The run goes on" in warnings[0]
    assert "wandb has not taken all steps within 0.2 s; metrics.jsonl has them" in warnings[1]


def test_a_tracker_that_fails_is_told_the_next_step_all_the_same_and_warned_of_once(
    fakes: list[Fake], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Trackers(config_of(tmp_path, "tracking.to=['wandb']"), 0, resume=False)
    tracker.log(0, {"reward": 0.0})
    wait_until(lambda: fakes and fakes[0].told, "the first row is told")
    fakes[0].fails = True
    for step in (1, 2):
        tracker.log(step, {"reward": 0.0})
    wait_until(lambda: tracker._told[0]._num_lost == 2, "two rows are lost")
    fakes[0].fails = False
    tracker.log(3, {"reward": 0.0})
    tracker.close()
    assert [step for step, _ in fakes[0].told] == [0, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "wandb fails: host is down. The run goes on, metrics.jsonl has what is missing there",
        "wandb has not taken 2 times what a step gave; metrics.jsonl has it",
    ]


@pytest.mark.parametrize("module", ["no_such_package", "json"])
def test_a_tracker_that_cannot_be_started_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: str
) -> None:
    def broken(run: TrackedRun) -> Any:
        raise RuntimeError("no api key")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", (module, broken))
    tracker = Trackers(config_of(tmp_path, "tracking.to=['wandb']"), 0, resume=False)
    tracker.log(0, {"reward": 0.0})
    tracker.close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert ("No module named 'no_such_package'" if module != "json" else "no api key") in warning


def test_the_id_of_a_run_stays_over_resumes_and_is_new_for_a_new_run(fakes: list[Fake], tmp_path: Path) -> None:
    config = config_of(tmp_path, "tracking.to=['wandb']", "tracking.name=mine")
    for first, resume in ((0, False), (0, True), (10, True), (0, False)):
        Trackers(config, first, resume).close()
    ids = [fake.run.id for fake in fakes]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert {fake.run.name for fake in fakes} == {"mine"}
    assert Trackers(config_of(tmp_path, "tracking.to=[]"), 0, resume=True)._told == []


def test_a_resume_tells_again_what_a_tracker_may_not_have_written_when_the_kill_came(
    fakes: list[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, "tracking.to=['wandb']")
    told, now = Trackers(config, 0, resume=False), [100.0]
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    for step, seconds in ((0, 100.0), (1, 120.0), (2, 140.0)):  # then killed: 0 has been told 40 s ago, 1 only 20
        now[0] = seconds
        told.log(step, {"reward": 0.0})
        wait_until(
            lambda step=step: len(fakes) == 1 and len(fakes[0].told) == step + 1 and told._told[0]._lately,
            f"the row of step {step} is told",
        )
    wait_until(lambda: trackers._number(tmp_path / "run/tracking/wandb") == 0, "the number of the row is on disk")
    rows = [{"step": step, "reward": step / 10} for step in range(5)]  # of which the last two are trained again
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = MetricsLog(tmp_path / "run", 3, lambda row: None, Trackers(config, 3, resume=True))
    log.write({"step": 3, "reward": 7.0})
    log.close()
    assert [(step, numbers["reward"]) for step, numbers in fakes[1].told] == [(1, 0.1), (2, 0.2), (3, 7.0)]
    assert fakes[1].run.first_step == 1


def test_a_tracker_that_is_not_installed_is_refused_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_rl.preflight import checks, registry

    monkeypatch.setattr(registry, "CHECKS", {"trackers": registry.CHECKS["trackers"]})
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    start = Start(config=config_of(tmp_path, "tracking.to=['tensorboard', 'wandb']"), world_size=1)
    with pytest.raises(ValueError, match=r"tracking.to names wandb, .* pip install 'megatron_rl\[wandb\]', or take it"):
        check_start(start)


def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """Track twenty steps, killed after the twelfth and resumed from the tenth. Return the second start's stderr."""
    monkeypatch.chdir(tmp_path)
    text = PROGRAM.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    command = [sys.executable, "-c", text]
    changes = [f"tracking.to=['{name}']", "tracking.project=p", "tracking.group=g", "tracking.tags=['a', 'b']"]
    assert forked.run([*command, 0, 12, "killed", *changes]).returncode == -9
    done = forked.run([*command, 10, 20, "ended", *changes])
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(20))
    return done.stderr


def test_tensorboard_has_every_step_once_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked(tmp_path, monkeypatch, "tensorboard")
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [(one.step, one.value) for one in board.Scalars("reward")] == [
        (step, pytest.approx(step / 100)) for step in range(20)
    ]
    assert sorted(board.Tags()["scalars"]) == ["num_prompts", "num_starts", "reward"]


def test_wandb_keeps_every_step_under_one_id_when_its_host_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    said = tracked(tmp_path, monkeypatch, "wandb")
    assert "`wandb sync` sends it" in said
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    run_id = (tmp_path / "run/tracking/id").read_text()
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    assert steps_of_wandb(files[-1]) == list(range(20))  # the kill came before its host was given up


def steps_of_wandb(file: Path) -> list[int]:
    """Return the steps that an offline file of wandb holds."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for content in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            steps += [int(item.value_json) for item in record.history.item if "step" in (item.key, *item.nested_key)]
    return steps


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log. A record has parts of [checksum, 4][length, 2][kind, 1][content].

    Blocks have 32 KiB, the first less by wandb's header of 7. A part is whole, or the first, a middle or the last one.
    """
    place, parts = 7, b""
    log = b"-" * 7 + log
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        parts += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_trackio_keeps_every_step_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    tracked(tmp_path, monkeypatch, "trackio")
    (file,) = (tmp_path / "trackio").glob("p*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_id, run_name, step FROM metrics").fetchall()
    run_id = (tmp_path / "run/tracking/id").read_text()
    assert {name for _, name, _ in rows} == {f"run-{run_id}"}
    assert len({identity for identity, _, _ in rows}) == 1
    assert {step for _, _, step in rows} == set(range(20))
