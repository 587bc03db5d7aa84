"""Tests that `--version` says what is installed, and that a missing megatron-core gives one sentence."""

import importlib.machinery
import importlib.metadata
import importlib.util
import subprocess
from pathlib import Path

import pytest

from megatron_rl import __version__, versions
from megatron_rl.cli import main
from megatron_rl.preflight import checks  # noqa: F401  (they register)
from megatron_rl.preflight.registry import CHECKS


def test_version_says_commit_and_the_packages_below(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"megatron-rl {__version__}")
    assert lines[1] == f"torch {importlib.metadata.version('torch')}"
    assert [line.split()[0] for line in lines[1:]] == ["torch", "megatron-core", "sglang"]


def test_what_is_not_installed_is_said(monkeypatch) -> None:
    monkeypatch.setattr(versions, "_SHOWN", ("no-such-package-of-ours",))
    assert versions.describe().endswith("\nno-such-package-of-ours is not installed")


def test_the_commit_is_that_of_the_checkout_or_of_the_wheel(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "megatron_rl"
    package.mkdir()
    monkeypatch.setattr(versions, "__file__", str(package / "versions.py"))
    assert versions.commit() == ""
    (package / versions.COMMIT_FILE).write_text("abc1234\n")
    assert versions.commit() == "abc1234"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert len(versions.commit()) >= 7
    assert head.startswith(versions.commit())


def test_a_missing_megatron_core_is_found_before_a_start(monkeypatch) -> None:
    class Training:
        trains = True

    assert list(CHECKS["megatron"].find(Training())) == []  # type: ignore[arg-type]
    left = importlib.machinery.ModuleSpec("megatron.core", None)  # a folder without files

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: left)
    assert versions.missing_megatron()
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    (problem,) = CHECKS["megatron"].find(Training())  # type: ignore[arg-type]
    assert "megatron-core 0.19.2 is not installed; " in problem
    assert "pip install" in problem
