"""Tests that leftovers of killed runs in shared memory are removed, and nothing else."""

import fcntl
import os
from pathlib import Path

import pytest

from megatron_rl.locks import sole_writer
from megatron_rl.sync.folder import _remove_abandoned

NAME = "megatron_rl-weights-abc"


def test_what_a_killed_run_left_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    for name in (NAME, f"{NAME}d", f"{NAME}e"):
        (tmp_path / name / "weights").mkdir(parents=True)
    (tmp_path / NAME / "lock").touch()
    with (tmp_path / f"{NAME}e" / "lock").open("x") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_abandoned(tmp_path)
    assert os.listdir(tmp_path) == [f"{NAME}e"]


def test_a_link_of_the_folders_name_leads_to_nothing_that_is_touched(tmp_path: Path) -> None:
    ours, shared = tmp_path / "ours", tmp_path / "shm"
    ours.mkdir()
    shared.mkdir()
    (ours / "lock").write_text("precious")
    (shared / NAME).symlink_to(ours)
    _remove_abandoned(shared)
    assert (ours / "lock").read_text() == "precious"


def test_a_lock_that_is_a_link_or_a_fifo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "lock").symlink_to(tmp_path / "file")
    _remove_abandoned(tmp_path)
    assert (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / NAME).is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_or_a_lock_of_another_user_stays(tmp_path: Path) -> None:
    for name in (NAME, f"{NAME}d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").write_text("theirs")
    os.chown(tmp_path / NAME, 12345, 12345)
    os.chown(tmp_path / f"{NAME}d" / "lock", 12345, 12345)
    _remove_abandoned(tmp_path)
    assert {path.read_text() for path in tmp_path.glob("*/lock")} == {"theirs"}
    assert len(list(tmp_path.glob("*/lock"))) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_nothing_is_written_through_a_link_of_another_user(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.symlink_to(tmp_path / "profile")
    os.chown(output, 12345, 12345, follow_symlinks=False)
    expected = r"out.jsonl is a link that another user made \(user id 12345\); remove it, or name another$"
    with pytest.raises(ValueError, match=expected), sole_writer(output, "name another"):
        pass
    assert not (tmp_path / "profile").exists()
