"""Tests that files, links and directories appear whole or not at all."""

import errno
import itertools
import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_rl.files import link_directory, naming, whole_file


def test_a_file_that_fails_half_way_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    path.write_text("before")
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write("half")
        file.flush()
        assert path.read_text() == "before"
        raise RuntimeError
    assert [found.name for found in tmp_path.iterdir()] == ["latest"]
    assert path.read_text() == "before"
    with whole_file(path, is_durable=True) as file:
        file.write("after é")
    assert path.read_bytes() == b"after \xc3\xa9"
    assert [found.name for found in tmp_path.iterdir()] == ["latest"]


def test_what_a_killed_process_left_is_not_written_through(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / ".keys.json.partial").symlink_to(elsewhere)
    with whole_file(tmp_path / "keys.json", mode=0o600) as file:
        file.write("secret")
        assert stat.S_IMODE((tmp_path / ".keys.json.partial").stat().st_mode) == 0o600, "before anything is in it"
    assert elsewhere.read_text() == "mine"
    assert (tmp_path / "keys.json").read_text() == "secret"
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600


def test_a_link_that_is_replaced_leads_somewhere_at_any_time(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    link = tmp_path / "hf"
    link_directory(tmp_path / "a", link)
    seen, problems, done = set(), [], threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                seen.add((link / "name").read_text())
            except OSError as error:
                problems.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for number in itertools.count():  # until the other thread has had its turn, too
            link_directory(tmp_path / "ab"[number % 2], link)
            if number >= 2000 and number % 2 and len(seen) == 2:
                break
    finally:
        done.set()
        thread.join()
    assert not problems
    assert seen == {"a", "b"}
    assert os.readlink(link) == "b"


def test_a_link_is_right_where_its_folder_goes_by_another_name(tmp_path: Path) -> None:
    (tmp_path / "disk/run/epochs/epoch_2").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(tmp_path / "disk/run")
    link_directory(tmp_path / "disk/run/epochs/epoch_2", tmp_path / "runs/mine/hf")
    assert (tmp_path / "disk/run/hf").resolve() == tmp_path / "disk/run/epochs/epoch_2"


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Make the kernel refuse writes beyond this size, as on a full disk. Python ignores the signal for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_names_its_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(OSError) as error, no_file_above(10), whole_file(path) as file:
        file.write("x" * 100_000)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    assert str(path) in str(error.value)
    assert [one.name for one in tmp_path.iterdir()] == ["results.json"] and path.read_text() == "old"


def test_an_error_of_something_else_is_not_said_to_be_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError) as error, naming(tmp_path):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert error.value.filename is None


def test_an_error_that_names_its_file_keeps_the_name(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, naming(tmp_path):
        open(tmp_path / "none").close()
    assert error.value.filename == str(tmp_path / "none")
