"""Tests a run's checkpoints on two real ranks: written beside training, on full disks, damaged, or killed midway."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from parallel import run_ranks
from small_disk import NO_MOUNT, small_disk
from tiny_model import write_tiny_model

from megatron_rl.checkpoint.checksums import Checksum, checksum_on_disk, damage, write_checksums

WORKER = "checkpoint_worker.py"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict, dict]]:
    """Run all scenarios in one start of two expert-parallel ranks, and yield each rank's report."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = str(write_tiny_model(folder / "model"))
    with pytest.raises(AssertionError, match=r"ranks ended with \[-9\]"):
        run_ranks(1, {"model": model, "scenarios": ["killed_while_writing"]}, folder / "one", worker=WORKER)
    scenarios = [
        "after_the_kill",
        "optimizer_state",
        "beside_training",
        "one_at_a_time",
        "kept",
        "file_that_cannot_grow",
        "damaged",
        "hostile",
    ]
    spec = {"model": model, "parallel": {"expert": 2}, "killed": str(folder / "one/killed")}
    with small_disk(folder / "disk", 16 * 2**20) as mounted:
        scenarios += ["full_disk"] if mounted else []
        spec |= {"small_disk": str(folder / "disk"), "scenarios": scenarios}
        run_ranks(2, spec, folder / "two", worker=WORKER)
    first, second = (json.loads((folder / f"two/report-{rank}.json").read_text()) for rank in range(2))
    yield first, second


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(reports: tuple[dict, dict]) -> None:
    for report in (found["after_the_kill"] for found in reports):
        assert report["before"] == [".step_2.partial", "latest", "step_1"]
        assert report["after"] == ["latest", "step_1"]
        assert (report["driver"], report["carried"]) == ({"step": 1}, True)


def test_what_is_written_beside_training_is_what_was_there_when_it_began(reports: tuple[dict, dict]) -> None:
    for report in (found["beside_training"] for found in reports):
        assert report["trained"]
        assert not report["whole too early"]
        assert {"megatron/__0_0.distcp", "megatron/__1_0.distcp", "driver.json"} <= set(report["files"])
        assert report["same"]
        assert report["latest"] == "step_1"


def test_the_first_of_the_ranks_that_share_parameters_holds_what_megatron_would_gather(
    reports: tuple[dict, dict],
) -> None:
    first, second = (report["optimizer_state"] for report in reports)
    assert first["different"] == second["different"] == []
    # Dense parameters are shared by both ranks, experts by none: of each the weight and two moments.
    num_dense, num_experts = 1 + 3 * 4 + 2 + 2 * (1 + 2) + 1 + 1, 2 * 3 * 2
    assert first["counts"] == [3 * num_dense, 3 * num_experts]
    assert second["counts"] == [0, 3 * num_experts]


def test_one_checkpoint_is_written_at_a_time(reports: tuple[dict, dict]) -> None:
    for report in (found["one_at_a_time"] for found in reports):
        assert report["names"] == ["latest", "step_1", "step_2"]
        assert report["driver"] == {"step": 2}
    assert "step 2: waiting until the checkpoint of step 1 is written" in reports[0]["one_at_a_time"]["said"][0]


def test_the_newest_and_every_nth_checkpoint_stay(reports: tuple[dict, dict]) -> None:
    # Steps 2 to 8 were saved. The last two and the multiples of three stay.
    assert reports[0]["kept"]["names"] == ["latest", "step_3", "step_6", "step_7", "step_8"]


def test_a_write_that_fails_on_one_rank_is_known_to_all(reports: tuple[dict, dict]) -> None:
    for report in (found["file_that_cannot_grow"] for found in reports):
        assert report["names"] == ["latest", "step_1"]
        assert report["failed"] == 1
        assert "limited/step_3 was not written: rank 1: [Errno 27] File too large (" in report["raised"]
        assert report["at last"] == "step_3"
    assert len(reports[0]["file_that_cannot_grow"]["warned"]) == 1


def test_a_full_disk_costs_no_more_than_the_checkpoint_that_did_not_fit(reports: tuple[dict, dict]) -> None:
    if "full_disk" not in reports[0]:
        pytest.skip(NO_MOUNT)
    said = reports[0]["full_disk"]["too little"]  # rank 0's alone is shown
    found = re.search(r"disk/step_2 was .* too little room \(([\d,]+) bytes are needed, ([\d,]+) are free", said)
    assert found
    needed, free = (int(group.replace(",", "")) for group in found.groups())
    assert 0 < free < needed
    for report in (both["full_disk"] for both in reports):
        assert re.search(r"step_3 was .*\[Errno 28\] No space left on device \([\d,]+ bytes", report["filled"])
        assert report["names"] == ["hog", "latest", "step_1"]
        assert report["restored"] == {"step": 1}


def test_a_flipped_bit_is_named_and_the_checkpoint_before_it_is_used(reports: tuple[dict, dict]) -> None:
    for report in (found["damaged"] for found in reports):
        assert report["driver"] == {"step": 2}
        assert report["weights"]
        assert report["names"] == ["latest", "step_1", "step_2", "step_3.damaged"]
        assert report["latest"] == "step_2"
        assert report["saved again"] == "step_3"
    (said,) = reports[0]["damaged"]["said"]
    assert said.startswith("damaged: step_3 (megatron/__1_0.distcp has checksum ")
    assert said.endswith("going on from step_2 instead")


def test_when_all_checkpoints_are_damaged_each_is_named(reports: tuple[dict, dict]) -> None:
    for report in (found["damaged"] for found in reports):
        said = report["nothing left"]
        assert "step_3 (driver.json has checksum" in said
        assert "step_2 (checksums.json is missing)" in said
        assert "step_1 (carried.npz is missing)" in said


# -- checksums -----------------------------------------------------------------------------------------------------


def test_what_a_pickle_of_a_checkpoint_would_run_is_named_on_resume_and_on_load_and_not_run(
    reports: tuple[dict, dict],
) -> None:
    for report in (found["hostile"] for found in reports):
        assert report.pop("ran") is False
        for name, said in report.items():
            assert "/hostile/step_1/megatron/" in said, name
            assert "asks for 'posix.system'" in said, name
        assert report["resume, index"] == report["load, index"]
        assert "/common.pt asks" in report["resume, common.pt"]
        assert ".distcp: common_state/shard_0_1 asks" in report["resume, objects"]
        assert ".distcp: embedding.word_embeddings.weight asks" in report["resume, tensor"]
        assert report["resume, tensor"] == report["load, tensor"]


def test_the_checksum_is_xxh3_of_128_bits(tmp_path: Path) -> None:
    # The algorithm's published value for no input.
    (tmp_path / "empty").touch()
    expected = Checksum(num_bytes=0, xxh3_128="99aa06d3014798d86001c324468d497f")
    assert checksum_on_disk(tmp_path / "empty") == expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        (tmp_path / f"file{number}").write_bytes(bytes(100 * number + 1))
    write_checksums(tmp_path, {f"file{n}": checksum_on_disk(tmp_path / f"file{n}") for n in range(5)})
    return tmp_path


def test_what_differs_from_what_was_written_is_told(folder: Path) -> None:
    (folder / "notes").write_text("somebody's own")
    assert damage(folder) == []
    (folder / "file0").unlink()
    (folder / "file1").write_bytes(bytes(100))
    (folder / "file2").write_bytes(bytes(202))
    (folder / "file3").write_bytes(bytes(300) + b"\x01")
    lines = sorted(damage(folder))
    assert lines[0] == "file0 is missing"
    assert lines[1] == "file1 has 100 bytes; 101 were written"
    assert lines[2] == "file2 has 202 bytes; 201 were written"
    assert lines[3].startswith("file3 has checksum ")
    assert len(lines) == 4


def test_a_pipe_among_the_files_does_not_hold_the_reader(folder: Path) -> None:
    (folder / "file0").unlink()
    os.mkfifo(folder / "file0")
    content = json.loads((folder / "checksums.json").read_text())
    content["file0"]["num_bytes"] = 0
    (folder / "checksums.json").write_text(json.dumps(content))
    assert damage(folder) == ["file0 is not a regular file"]


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
def test_ranks_look_at_every_file_once(folder: Path, num_shares: int) -> None:
    for number in range(5):
        (folder / f"file{number}").unlink()
    found = [line.split()[0] for share in range(num_shares) for line in damage(folder, share, num_shares)]
    assert sorted(found) == [f"file{number}" for number in range(5)]


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"file0": {"num_bytes": 1}}', b"\xff"])
def test_checksums_that_cannot_be_read_are_damage_told_once(folder: Path, content: bytes | None) -> None:
    (folder / "checksums.json").unlink()
    if content is not None:
        (folder / "checksums.json").write_bytes(content)
    (line,) = damage(folder, 0, 2)
    assert line.startswith("checksums.json ")
    assert damage(folder, 1, 2) == []
