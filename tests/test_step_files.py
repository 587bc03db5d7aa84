"""Tests the files of a step, written beside training: whole, in order, bounded, and before the step's checkpoint."""

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_zero import config_of
from until import wait_until

from megatron_rl.errors import Fault
from megatron_rl.train.run.step_files import StepFiles


@pytest.fixture
def files(tmp_path: Path) -> Iterator[StepFiles]:
    made = StepFiles(config_of(tmp_path))
    yield made
    made.close()


class Held:
    """Gives two lines, the second only when `may_end` is set."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def __iter__(self) -> Iterator[str]:
        yield "first\n"
        assert self.may_end.wait(240)
        yield "last\n"


def failing(error: Exception) -> Iterator[str]:
    yield "first\n"
    raise error


def test_a_file_is_there_when_it_is_whole_and_whoever_begins_it_goes_on(files: StepFiles, tmp_path: Path) -> None:
    path, held = tmp_path / "run/rollouts/step_000000.jsonl", Held()
    files.write(path, held, "lost")
    files.check()
    assert not path.exists()
    held.may_end.set()
    assert files.settle() is None
    assert path.read_text() == "first\nlast\n"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_third_file_waits_for_the_first(files: StepFiles, tmp_path: Path) -> None:
    """Check the wait, so that files hold in memory what two steps have at most."""
    helds = [Held() for _ in range(3)]
    for held, name in zip(helds[:2], "ab", strict=True):
        files.write(tmp_path / name, held, "lost")
    third = threading.Thread(target=files.write, args=(tmp_path / "c", helds[2], "lost"))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    helds[0].may_end.set()
    third.join(240)
    assert not third.is_alive()
    assert (tmp_path / "a").exists()
    for held in helds:
        held.may_end.set()
    assert files.settle() is None
    assert all((tmp_path / name).read_text() == "first\nlast\n" for name in "abc")


def test_closing_writes_what_is_left(tmp_path: Path) -> None:
    files = StepFiles(config_of(tmp_path))
    files.write(tmp_path / "a", ["1\n"] * 1000, "lost")
    files.write(tmp_path / "b", ["2\n"], "lost")
    files.close()
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("1\n" * 1000, "2\n")


def test_a_full_disk_keeps_the_file_that_was_there_and_is_told_once(files: StepFiles, tmp_path: Path) -> None:
    path = tmp_path / "tokens/step_000000.jsonl"
    files.write(path, ["before\n"], "lost")
    files.write(path, failing(OSError(errno.ENOSPC, "No space left on device")), "the responses are not written")
    fault = files.settle()
    assert isinstance(fault, Fault)
    assert "No space left on device" in str(fault)
    assert "the responses are not written. Make room and --resume" in str(fault)
    assert path.read_text() == "before\n"
    assert files.settle() is None


def test_the_next_step_hears_of_what_failed_and_a_mistake_of_ours_stays_one(files: StepFiles, tmp_path: Path) -> None:
    files.write(tmp_path / "a", failing(OSError(errno.EIO, "Input/output error")), "lost")
    with pytest.raises(Fault, match="Input/output error"):
        wait_until(files.check, "the next step hears of it")
    files.write(tmp_path / "a", failing(KeyError("position")), "lost")
    with pytest.raises(KeyError, match="position"):
        files.settle()


def test_lines_are_made_in_a_share_of_the_time_until_somebody_waits_for_them(files: StepFiles, tmp_path: Path) -> None:
    """Check that lines take a share of the time until `settle`: training's thread waits while a line is made."""
    spent: list[float] = []

    def busy() -> Iterator[str]:
        for _ in range(60):
            began = time.thread_time()
            while time.thread_time() < began + 0.01:
                pass
            spent.append(time.thread_time() - began)
            yield "line\n"

    began = time.perf_counter()
    files.write(tmp_path / "a", busy(), "lost")
    wait_until(lambda: len(spent) >= 20, "twenty lines are made", pause=0.01)
    assert sum(spent[:20]) < 0.4 * (time.perf_counter() - began)
    files.settle()
    assert len(spent) == 60
