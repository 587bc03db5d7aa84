"""Tests tools/gpu_trial: wheels travel in pieces, and a part that fails does not stop the others."""

import ast
import csv
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from argparse import Namespace
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import parallel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from parallel import run_ranks

from megatron_rl.errors import Fault

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tools/gpu_trial"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_trial_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


wheels, parts = load("wheels"), load("parts")


# Wheels --------------------------------------------------------------------------------------------------------------


def make_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    members |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as file:
        for member, content in (members | {f"{info}/RECORD": record.encode()}).items():
            file.writestr(member, content)
    return path


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 60_000), min_size=1, max_size=8),
    piece_bytes=st.integers(20_000, 60_000),  # 8 wheels in many parts have a manifest of more than 9,000
    data=st.data(),
)
def test_pieces_are_small_and_bring_every_byte_in_whatever_order_they_come(
    sizes: list[int], piece_bytes: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    contents = {f"w{i}.whl": os.urandom(size) for i, size in enumerate(sizes)}
    files = []
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        files.append((f"{name}==1", "", folder / name))
    wheels.laid_out(files, folder / "all", piece_bytes)
    numbers = sorted(int(path.name) for path in (folder / "all").iterdir())
    assert numbers == list(range(1, len(numbers) + 1))
    for path in (folder / "all").iterdir():
        assert sum(file.stat().st_size for file in path.iterdir()) <= piece_bytes
    installed: dict[str, bytes] = {}

    def note(found: list, store: Path) -> None:
        for wheel in found:
            installed[wheel.file] = b"".join((store / "parts" / part.file).read_bytes() for part in wheel.parts)
            assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)

    carried, waiting = folder / "carried", set(numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheels, "install", note)
        for number in data.draw(st.permutations(numbers)):
            assert not installed
            carried.mkdir()
            (folder / "all" / str(number)).rename(carried / str(number))
            waiting.discard(number)
            assert set(wheels.unpack(carried, folder / "store")) == waiting
            (carried / str(number)).rename(folder / "all" / str(number))
            carried.rmdir()
    assert installed == contents


def test_a_piece_and_the_working_tree_travel_together_in_64_mib(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    with tarfile.open(tmp_path / "tree.tar", "w") as archive:
        for name in tracked:
            archive.add(ROOT / name, name)
    room = wheels.room_beside_the_tree()
    assert 50e6 < room < 64 * 2**20 - (tmp_path / "tree.tar").stat().st_size


def test_wheels_are_installed_with_what_their_pth_files_say(tmp_path: Path) -> None:
    pth = b"import sys, os, first; sys.path.insert(0, os.path.join(first.__path__[0], 'inner'))"
    first = {"first/__init__.py": b"", "first/inner/hidden.py": b"VALUE = 7", "first.pth": pth}
    second = {"second.py": b"x = '" + os.urandom(9000).hex().encode() + b"'"}
    made = [make_wheel(tmp_path, "first", first), make_wheel(tmp_path, "second", second)]
    wheels.laid_out([(path.name, "", path) for path in made], tmp_path / "q", 8000)
    assert wheels.unpack(tmp_path / "q", tmp_path / "store") == []
    code = "import hidden, second; print(hidden.VALUE, len(second.x))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "store/site")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "18000"]


def test_a_damaged_part_and_pieces_of_two_fetches_are_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "one", {"one.py": os.urandom(9000)})
    for name in ("q", "other"):
        wheels.laid_out([("one==1.0", name, wheel)], tmp_path / name, 6000)
    part = next((tmp_path / "q/1").glob("*.part1"))
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=f"{part.name} is not the file that the manifest names"):
        wheels.unpack(tmp_path / "q", tmp_path / "store")
    content[100] ^= 1
    part.write_bytes(content)
    (tmp_path / "q/2/manifest.json").write_bytes((tmp_path / "other/2/manifest.json").read_bytes())
    with pytest.raises(ValueError, match="were not fetched together"):
        wheels.unpack(tmp_path / "q", tmp_path / "store")
    with pytest.raises(ValueError, match="has no piece; carry one"):
        wheels.unpack(tmp_path / "nothing", tmp_path / "store")


def test_what_is_left_out_of_a_wheel_is_left_out_of_its_record(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "one", {"one/a.so": b"a", "one/b.so": b"b", "one/x/c.py": b"c"})
    wheels.stripped(wheel, ["one/a.so", "one/x/*"])
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        recorded = [row[0] for row in csv.reader(io.StringIO(file.read("one-1.0.dist-info/RECORD").decode()))]
    assert names == recorded
    assert [name for name in names if "dist-info" not in name] == ["one/b.so"]
    with pytest.raises(ValueError, match="nothing in one-1.0-py3-none-any.whl fits one/z"):
        wheels.stripped(wheel, ["one/z"])


def test_the_lists_name_one_version_of_each_and_the_projects_own_are_those_that_are_tested() -> None:
    lists = tomllib.loads((FOLDER / "wheels.toml").read_text())
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for question in lists["questions"]:
        requirements, leave_out = wheels.asked_for(question)
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", requirement) for requirement in requirements)
        named = {requirement.partition("==")[0] for names in lists["wheels"].values() for requirement in names}
        assert named >= leave_out.keys()
    for requirement in lists["wheels"]["base"]:
        name, _, version = requirement.partition("==")
        assert pinned[name] == version
    with pytest.raises(ValueError, match="no question is called 'speeed'"):
        wheels.asked_for("speeed")


def test_all_that_the_project_requires_is_carried_or_known_to_be_there() -> None:
    lists = tomllib.loads((FOLDER / "wheels.toml").read_text())
    carried = {requirement.partition("==")[0] for requirement in lists["wheels"]["base"]}
    there, unused = (set(lists["not_carried"][key]) for key in ("there", "unused"))
    assignments = (node for node in ast.parse((ROOT / "setup.py").read_text()).body if isinstance(node, ast.Assign))
    (own,) = (ast.literal_eval(node.value) for node in assignments if ast.unparse(node.targets[0]) == "INSTALL")
    required = set()
    for text in [*own, *(text for name in carried for text in requires(name) or [])]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.12", "extra": ""}):
            required.add(canonicalize_name(requirement.name))
    assert required - carried == there | unused
    assert carried <= required


def test_wheels_that_cannot_be_had_are_all_named_and_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "asked_for", lambda _: (["gone==1", "here==1.0", "lost==2"], {}))

    def download(requirement: str, folder: Path) -> str:
        if requirement != "here==1.0":
            return f"no {requirement}"
        folder.mkdir()
        make_wheel(folder, "here", {})
        return ""

    monkeypatch.setattr(wheels, "download", download)
    (tmp_path / "q/1").mkdir(parents=True)
    with pytest.raises(Fault, match=r"gone==1: no gone==1\nlost==2: no lost==2"):
        wheels.fetch("q", tmp_path / "q")
    assert (tmp_path / "q/1").exists()


# Parts ---------------------------------------------------------------------------------------------------------------


def make_trial(seconds: float = 100.0, dry: bool = False) -> "parts.Trial":
    return parts.Trial("question", Namespace(dry=dry, commit="abc", seconds=seconds, only=[]))


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    trial = make_trial()

    def fail(_: float) -> None:
        raise parts.PartFailed("too slow", {"seconds": 3})

    assert trial.part("first", 50, lambda seconds: {"given": seconds}) == {"given": 50}
    assert not trial.has_failed
    assert trial.part("second", 50, fail) is None
    assert trial.part("third", 50, lambda _: 1 / 0) is None
    trial.part("fourth", 1000, lambda seconds: seconds < 100)
    assert trial.has_failed
    written = json.loads((tmp_path / "question.json").read_text())
    assert written["parts"]["second"] | {"seconds": 0} == {"failed": "too slow", "found": {"seconds": 3}, "seconds": 0}
    assert written["parts"]["third"]["failed"] == "ZeroDivisionError: division by zero"
    assert written["parts"]["fourth"]["found"] is True
    assert (written["commit"], written["dry"]) == ("abc", False)
    assert parts.end(trial) == 1


def test_parts_for_which_there_is_no_time_or_no_point_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    trial = make_trial(seconds=40)
    ran = []
    trial.part("long", 60, ran.append)
    assert "were left" in trial.found["parts"]["long"]["left_out"]
    trial.part("short", 20, ran.append)
    assert ran == [20]
    trial.part("decisive", 20, lambda _: 1 / 0, decides=True)
    trial.part("after", 20, ran.append)
    assert trial.found["parts"]["after"] == {"left_out": "decisive failed"}
    assert trial.has_failed


def test_a_dry_trial_and_its_parts_have_four_times_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    trial = make_trial(seconds=40, dry=True)
    assert 150 < trial.seconds_left <= 160
    assert trial.part("short", 20, lambda seconds: seconds) == 80


def time_begins_with(file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the time of commands begin when there is this file. Return the code by which a command makes it."""

    class Waiting(subprocess.Popen):
        def communicate(self, *arguments: Any, **more: Any) -> Any:
            while not file.exists() and self.poll() is None:
                time.sleep(0.02)
            return super().communicate(*arguments, **more)

    monkeypatch.setattr(subprocess, "Popen", Waiting)
    return f"import pathlib, time; pathlib.Path({str(file)!r}).touch()"


def test_a_command_that_is_late_is_interrupted_then_killed_and_what_it_said_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(parts, "GRACE_SECONDS", 300.0)
    trial = make_trial()
    begun = time_begins_with(tmp_path / "begun", monkeypatch)
    polite = f'try:\n {begun}; time.sleep(1000)\nexcept KeyboardInterrupt: print(\'{{"so": "far"}}\')'
    assert parts.run_json(trial, "polite", [sys.executable, "-c", polite], 1) == {"so": "far"}
    assert (tmp_path / "question.log").read_text() == '--- polite\n{"so": "far"}\n\n'
    (tmp_path / "begun").unlink()
    deaf = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {begun}; time.sleep(1000)"
    started = time.monotonic()
    monkeypatch.setattr(parts, "GRACE_SECONDS", 0.5)
    with pytest.raises(parts.PartFailed, match="not done after 1 s"):
        parts.run(trial, "deaf", [sys.executable, "-c", deaf], 1)
    assert time.monotonic() - started < 500
    code = 'print("noise"); print("{"); print("\\"a\\": 1}"); raise SystemExit(3)'
    with pytest.raises(parts.PartFailed, match="ended with code 3") as raised:
        parts.run_json(trial, "code", [sys.executable, "-c", code], 600)
    assert raised.value.found == {"a": 1}


def test_tests_that_fail_or_do_not_exist_fail_their_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    file = tmp_path / "test_it.py"
    file.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    trial = make_trial()
    found = parts.run_tests(trial, "right", [str(file)], 600, only="right")
    assert list(found["passed"]) == ["test_right"]
    with pytest.raises(parts.PartFailed, match="1 passed, 0 skipped, 1 failed") as raised:
        parts.run_tests(trial, "wrong", [str(file)], 600)
    assert "assert 1 == 2" in raised.value.found["failed"]["test_wrong"]
    with pytest.raises(parts.PartFailed, match="0 passed"):
        parts.run_tests(trial, "nothing", [str(file)], 600, only="absent")
    begun = time_begins_with(tmp_path / "begun", monkeypatch)
    monkeypatch.setattr(parts, "GRACE_SECONDS", 300.0)
    file.write_text(f"def test_right(): pass\ndef test_slow():\n    {begun}; time.sleep(1000)\n")
    with pytest.raises(parts.PartFailed, match="1 passed, 0 skipped, 0 failed") as raised:
        parts.run_tests(trial, "late", [str(file)], 1)
    assert list(raised.value.found["passed"]) == ["test_right"]


def test_a_trial_runs_the_parts_that_it_is_asked_for_and_exits_by_how_they_went(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}

    def trial(*options: str) -> tuple[int, dict]:
        command = [sys.executable, FOLDER / "nccl_trial.py", "--commit", "abc", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
        found = json.loads(done.stdout)
        assert json.loads((tmp_path / "nccl.json").read_text()) == found
        return done.returncode, found["parts"]

    # Two real ranks, each with the environment of one that shares a GPU.
    code, found = trial("--dry", "--only", "one_gpu")
    assert (code, list(found)) == (0, ["machine", "one_gpu"]), found
    assert list(found["one_gpu"]["found"]["passed"]) == ["test_two_ranks_on_one_gpu_exchange_what_they_should"]
    assert found["machine"]["found"]["torch"]
    assert trial("--dry", "--only", "one_gpus")[0] == 2
    # Without a GPU nothing is tried, and everything told.
    code, found = trial()
    assert code == 1
    assert "no CUDA device" in found.pop("machine")["failed"]
    assert len(found) == 7
    assert all(part == {"left_out": "machine failed"} for part in found.values())


# Ranks ---------------------------------------------------------------------------------------------------------------


def test_ranks_that_share_a_gpu_are_machines_of_their_own_with_the_first_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, pathlib, sys\n"
        "names = ('LOCAL_RANK', 'NCCL_HOSTID', 'NCCL_SOCKET_IFNAME', 'NCCL_IB_DISABLE', 'MEGATRON_RL_DEVICE')\n"
        "found = {name: os.environ.get(name) for name in names}\n"
        "pathlib.Path(sys.argv[1], f'env-{os.environ[\"RANK\"]}.json').write_text(json.dumps(found))\n"
    )
    monkeypatch.delenv("MEGATRON_RL_DEVICE", raising=False)

    def environments(folder: Path, **options: bool) -> list[dict[str, str]]:
        run_ranks(2, {}, folder, worker=str(worker), **options)
        return [json.loads((folder / f"env-{rank}.json").read_text()) for rank in (0, 1)]

    apart = environments(tmp_path / "cpu")
    assert [found["LOCAL_RANK"] for found in apart] == ["0", "1"]
    assert all(found["NCCL_HOSTID"] is None and found["MEGATRON_RL_DEVICE"] == "cpu" for found in apart)
    monkeypatch.setenv("MEGATRON_RL_RANKS_ON_ONE_GPU", "1")
    assert environments(tmp_path / "asked for a cpu", on_cpu=True) == apart
    together = environments(tmp_path / "gpu")
    assert [found.pop("NCCL_HOSTID") for found in together] == ["rank0", "rank1"]
    expected = {"LOCAL_RANK": "0", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "MEGATRON_RL_DEVICE": None}
    assert together == [expected, expected]


def test_a_rank_that_is_not_done_in_time_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import os, time\ntime.sleep(1000 * int(os.environ['RANK']))\n")
    # The time of the second rank is nearly over when the first one, which has all of it, is done.
    monkeypatch.setattr(parallel, "time", SimpleNamespace(monotonic=iter([0.0, 0.0, 599.0]).__next__))
    with pytest.raises(AssertionError, match=r"ranks ended with \[0, None\]"):
        run_ranks(2, {}, tmp_path / "run", timeout_seconds=600, worker=str(worker))
