"""Tests when an ended server is started again, and what other nodes can ask for, with made-up servers."""

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.rollout import supervisor as module
from megatron_rl.rollout.supervisor import ServerSupervisor, wish
from megatron_rl.train.orchestrator.node_servers import NodeServers

ROLLOUT = RolloutSection(prompts_per_step=1, samples_per_prompt=2, max_response_tokens=64, max_restarts=4)


class Server:
    """Stands in for a server process. It ends when it is told to."""

    def __init__(self, port: int) -> None:
        self.port, self.exit_code, self.url = port or 5, None, f"http://10.0.0.2:{port or 5}"

    def kill(self) -> None:
        self.exit_code = self.exit_code or -9

    stop = kill

    def is_ready(self) -> bool:
        return True

    def last_words(self) -> str:
        return "its last words"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def supervisor_of(wishes: Path | None = None) -> Any:
    """Make a supervisor whose thread is not started: the test does its looks."""
    return ServerSupervisor([Server], ROLLOUT, wishes)  # type: ignore[list-item]


def look(supervisor: Any) -> None:
    supervisor._hear_wishes()
    (kept,) = supervisor._kept
    supervisor._look_after(kept, kept.server.is_ready())


def seconds_until_another(supervisor: Any, clock: SimpleNamespace) -> float:
    """End the server and return the seconds until the next one starts."""
    (kept,) = supervisor._kept
    ended, started = kept.server, clock.seconds
    ended.exit_code = 1
    while kept.server is ended and supervisor.failure is None:
        look(supervisor)
        clock.seconds += 0.25
    return clock.seconds - started


def test_pauses_double_from_the_second_restart_on_and_the_last_one_gives_up(clock: SimpleNamespace) -> None:
    supervisor = supervisor_of()
    waited = [seconds_until_another(supervisor, clock) for _ in range(4)]
    assert waited == pytest.approx([0.0, 0.5, 1.0, 2.0], abs=0.6)
    assert supervisor.failure is None
    seconds_until_another(supervisor, clock)
    assert "it had been restarted 4 times before (rollout.max_restarts): its last words" in str(supervisor.failure)


def test_who_has_served_for_ten_minutes_is_forgiven(clock: SimpleNamespace) -> None:
    supervisor = supervisor_of()
    (kept,) = supervisor._kept
    for _ in range(3):
        seconds_until_another(supervisor, clock)
    assert kept.num_restarts == 3
    look(supervisor)
    clock.seconds += 601
    look(supervisor)
    assert kept.num_restarts == 0
    assert seconds_until_another(supervisor, clock) <= 0.5


def test_a_silent_server_of_another_node_is_started_again_by_its_node(
    clock: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    there = supervisor_of(tmp_path / "restarts")
    (kept,) = there._kept
    hung = kept.server
    # Rank 0, on another node, has servers of its own and knows the url of this one.
    here = NodeServers.__new__(NodeServers)
    here.supervisor, here._wishes = None, tmp_path / "restarts"
    here.replace("http://10.0.0.3:7", "no answer")  # of a third node: not for this one
    here.replace(hung.url, "no answer to /health for 60 s")
    clock.seconds += 3
    look(there)
    assert hung.exit_code == -9
    assert "ending the generation server http://10.0.0.2:5: no answer to /health for 60 s" in caplog.text
    look(there)
    assert kept.server is not hung
    assert [path.name for path in (tmp_path / "restarts").iterdir()] == ["restart_http_10.0.0.3_7"]
    clock.seconds += 3
    look(there)
    assert kept.server.exit_code is None, "one wish is one restart"


def test_a_wish_that_cannot_be_written_is_told_and_nothing_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    here = NodeServers.__new__(NodeServers)
    here.supervisor, here._wishes = None, tmp_path / "file"
    here.replace("http://a:1", "silent")
    assert "the node of http://a:1 cannot be asked to start it again" in caplog.text
    here._wishes = None  # one machine, or servers of others
    here.replace("http://a:1", "silent")
    wish(tmp_path / "restarts", "http://a:1", "silent")
    assert time.time() - (tmp_path / "restarts/restart_http_a_1").stat().st_mtime < 60
