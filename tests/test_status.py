"""Tests that `megatron-rl status` and `report --follow` tell from a run's files where it is."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_runs import make_run

from megatron_rl.cli import main
from megatron_rl.errors import EXIT_DONE, EXIT_STOPPED, Fault, StopRequested
from megatron_rl.report.build import page_data
from megatron_rl.report.follow import Follower
from megatron_rl.report.page import render
from megatron_rl.report.runs import read_runs
from megatron_rl.report.status import as_text, status
from megatron_rl.terminal import duration
from megatron_rl.train.run.context import _ending

# A run as far as its files go: it enters the phases that it is told, and ends as it is told.
RUN = """
import pathlib, sys
from megatron_rl.train.run.watchdog import Watchdog
watch = Watchdog(pathlib.Path(sys.argv[1]), 0, 600.0)
watch.num_steps = 40
for line in sys.stdin:
    word, *more = line.split()
    if word == "end":
        watch.close(*more)
        break
    watch.enter(word, int(more[0]))
    print("there", flush=True)
"""


class Process:
    """Runs a program that writes its heartbeat as rank 0 of a run does."""

    def __init__(self, run_dir: Path) -> None:
        command = [sys.executable, "-c", RUN, str(run_dir)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def enter(self, phase: str, step: int) -> None:
        self._say(f"{phase} {step}")
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "there\n"

    def end(self, *words: str) -> None:
        self._say(" ".join(("end", *words)))
        assert self._process.wait() == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    make_run(tmp_path / "run", 30)
    started = Process(tmp_path / "run")
    yield started
    started.kill()


def test_the_state_is_right_in_each_phase_and_after_a_kill(process: Process, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for phase in ("sync", "rollout", "train", "save", "export"):
        process.enter(phase, 30)
        found = status(tmp_path / "run")
        assert (found["state"], found["phase"], found["step"]) == ("running", phase, 30)
        assert (found["pid"], found["host"]) == (process.pid, socket.gethostname())
    assert (found["kind"], found["num_done"], found["num_steps"], found["metrics"]) == ("rl", 30, 40, rows[-1])
    assert found["eta_seconds"] == pytest.approx(10 * sum(row["step_seconds"] for row in rows[-20:]) / 20)
    process.kill()
    found = status(tmp_path / "run")
    assert (found["state"], found["phase"], found["eta_seconds"]) == ("killed", "export", None)
    assert "killed in export of step 30" in as_text(found)
    assert "start it again with --resume" in as_text(found)


@pytest.mark.parametrize(
    ("words", "state", "said"),
    [
        (["ended"], "ended", "ended"),
        (["stopped", "signal"], "stopped", "signal; --resume goes on"),
        (["failed", "a-server-died"], "failed", "a-server-died; --resume goes on"),
        (["refused", "other-data"], "refused", "other-data\n"),
    ],
)
def test_how_a_run_ended_is_told(process: Process, tmp_path: Path, words: list[str], state: str, said: str) -> None:
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/latest").write_text("step_20")
    process.end(*words)
    found = status(tmp_path / "run")
    assert found["state"] == state
    # config.toml says 30 steps: it is of the last start that was accepted
    assert found["num_steps"] == (30 if state == "refused" else 40)
    assert found["checkpoint"] == str(tmp_path / "run/checkpoints/step_20")
    assert re.search(rf": {state} \d.*{said}", as_text(found), re.DOTALL)


def test_an_ending_says_what_it_was() -> None:
    assert _ending(None, EXIT_DONE) == ("ended", "")
    assert _ending(None, EXIT_STOPPED) == ("stopped", "")
    assert _ending(StopRequested("stopped by SIGTERM"), EXIT_DONE) == ("stopped", "stopped by SIGTERM")
    assert _ending(ValueError("other prompts"), EXIT_DONE) == ("refused", "other prompts")
    assert _ending(Fault("the disk is full"), EXIT_DONE) == ("failed", "the disk is full")
    assert _ending(MemoryError(), EXIT_DONE) == ("failed", "MemoryError")


def test_a_process_with_the_same_id_that_came_later_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", 3)
    now = time.time()
    monkeypatch.setattr(importlib.import_module("megatron_rl.report.status"), "time", SimpleNamespace(time=lambda: now))
    beat = {"time": now - 1e6, "host": socket.gethostname(), "pid": os.getpid(), "step": 3, "phase": "train"}
    (tmp_path / "run/heartbeat.json").write_text(json.dumps({**beat, "state": "running", "phase_seconds": 1.0}))
    assert status(tmp_path / "run")["state"] == "killed"
    # Only the heartbeats of a run on another machine can be seen, not its processes.
    beat |= {"host": "elsewhere", "state": "running", "phase_seconds": 1.0}
    (tmp_path / "run/heartbeat.json").write_text(json.dumps(beat))
    assert status(tmp_path / "run")["state"] == "silent"
    (tmp_path / "run/heartbeat.json").write_text(json.dumps(beat | {"time": now - 20}))
    found = status(tmp_path / "run")
    assert found["state"] == "running"
    assert found["phase_seconds"] == 21.0


def test_alarms_are_found_again_in_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a gradient norm of 30 after others of 1 is an alarm, but not with train.grad_norm_alarm = 100."""
    folder = make_run(tmp_path / "run", 1)
    norms = [1.0] * 12 + [30.0]
    rows = [{"step": i, "grad_norm": n, "step_seconds": 2.0, "reward": 0.5} for i, n in enumerate(norms)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (alarm,) = status(folder)["alarms"]
    assert alarm == {"step": 12, "message": "the gradient norm 30 is far above the usual 1"}
    assert main(["status", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "alarm, step 12: the gradient norm 30" in said
    assert "step 12: reward 0.500, gradient norm 30, 2 s a step" in said
    assert max(map(len, said.splitlines())) <= 120
    text = (folder / "config.toml").read_text().replace("[train]", "[train]\ngrad_norm_alarm = 100")
    (folder / "config.toml").write_text(text)
    assert status(folder)["alarms"] == []


def test_several_runs_as_json_and_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", 3)
    make_run(tmp_path / "b", 5)
    assert main(["status", "--json", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert [run["num_done"] for run in json.loads(capsys.readouterr().out)] == [3, 5]
    assert main(["status", str(tmp_path)]) == 2
    assert "has neither heartbeat.json nor config.toml, so no run has begun there" in capsys.readouterr().err


def test_status_needs_no_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3)
    script = (
        "import sys\nfrom megatron_rl.cli import main\nassert main(['status', sys.argv[1]]) == 0\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 of 3 steps done" in done.stdout


def test_times_are_told_in_units_that_fit() -> None:
    assert [duration(s) for s in (5, 89, 90, 5000, 6000)] == ["5 s", "89 s", "2 min", "83 min", "1.7 h"]


# -- the page that renews itself -------------------------------------------------------------------------------------


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Follower]:
    folder = make_run(tmp_path / "run", 3)
    made = Follower([folder], lambda version: render(page_data(read_runs([folder]), 1, []) | {"version": version}))
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    made.close()
    thread.join()


def get(url: str, host: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=240) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_page_is_made_anew_when_the_run_has_another_step(follower: Follower, tmp_path: Path) -> None:
    version = get(follower.url + "version")[1]
    code, page = get(follower.url)
    assert code == 200
    assert json.dumps(version)[1:-1] in page
    assert "connect-src 'self'" in page
    assert get(follower.url + "version")[1] == version
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "grad_norm": 1.0, "reward": 0.123456}) + "\n")
    newer = get(follower.url + "version")[1]
    assert newer != version
    assert '["steps","3 of 3"]' in page
    assert '["steps","4 of 3"]' in get(follower.url)[1]


def test_the_page_is_for_this_machine_alone(follower: Follower) -> None:
    assert follower.url.startswith("http://127.0.0.1:")
    assert get(follower.url, host="somewhere.example:80")[0] == 403
    assert get(follower.url + "config.toml")[0] == 404
    with pytest.raises(ValueError, match=f"--port {follower.port} cannot be used"):
        Follower([], str, follower.port)


def test_a_page_that_is_written_asks_nobody(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    assert "connect-src" not in render(page_data(read_runs([folder]), 1, []))


def test_a_run_without_a_step_is_waited_for(follower: Follower, tmp_path: Path) -> None:
    (tmp_path / "run/metrics.jsonl").write_text("")
    code, said = get(follower.url)
    assert code == 503
    assert "has no step yet" in said
