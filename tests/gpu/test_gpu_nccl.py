"""Tests several ranks on one GPU over NCCL: every kind of parallelism, a weight push, and the end of a rank.

They share the GPU as tests/parallel.py says. `MEGATRON_RL_GPU_CHECK_ON_CPU=1` runs the same ranks over gloo.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from parallel import LAYOUTS, ROOT, SHAPE, make_spec, run_ranks, sharing_a_gpu
from test_gpu_training import BFLOAT16, FLOAT32, Tolerance, assert_close, update_difference
from tiny_model import tensors_of, write_tiny_model
from training_runs import GIVEN, Run, TrainingRuns
from weight_receiver import serving

from megatron_rl import device
from megatron_rl.tensor_bytes import checksum

NAMES = ["DP2", "TP2", "EP2", "PP2", "CP2", "TP2xDP2-EP2"]
assert LAYOUTS.keys() >= set(NAMES)
PRECISIONS = {"float32": ("exact", FLOAT32), "bfloat16": ("exact, given", BFLOAT16)}
RUNS = {
    "exact": Run(dtype="float64", on_cpu=True),
    "exact, given": Run(dtype="float64", on_cpu=True, experts=GIVEN),
    **{f"{name} float32": Run(layout=name) for name in NAMES},
    **{f"{name} bfloat16": Run(layout=name, dtype="bfloat16", experts=GIVEN) for name in NAMES},
}
# The watchdog ends a rank that waits for a lost one after this deadline. The margin is what it may take on top.
DEADLINE_SECONDS, MARGIN_SECONDS = 90, 30


@pytest.fixture(scope="module", autouse=True)
def on_one_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_RL_RANKS_ON_ONE_GPU", "1")
        yield


@pytest.fixture(scope="module")
def layouts(on_one_gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingRuns]:
    found = TrainingRuns(tmp_path_factory.mktemp("layouts"), RUNS)
    yield found
    found.close()


def test_two_ranks_on_one_gpu_exchange_what_they_should(tmp_path: Path) -> None:
    """Check a few collectives. This comes first, since it tells in seconds whether NCCL takes the ranks."""
    found = run_ranks(2, {}, tmp_path / "run", worker="collectives_worker.py", timeout_seconds=80)
    for rank in (0, 1):
        assert found[f"sum/{rank}"].tolist() == [1.0, 12.0]  # 0 + 1, 1 + 11
        # Rank r sends r + 1 numbers to rank 0 and 2 - r to rank 1, each 10 r and a place.
        assert found[f"exchanged/{rank}"].tolist() == [[0.0, 10.0, 11.0], [1.0, 2.0, 12.0]][rank]
        assert found[f"neighbour/{rank}"].tolist() == [1.0 - rank]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_several_ranks_is_that_of_one_in_fp64(name: str, dtype: str, layouts: TrainingRuns) -> None:
    exact, tolerance = PRECISIONS[dtype]
    assert isinstance(tolerance, Tolerance)
    found, expected = layouts(f"{name} {dtype}"), layouts(exact)
    assert_close(found, expected, tolerance)
    assert update_difference(found, expected, layouts.start) <= tolerance.update


@contextlib.contextmanager
def receiver(backend: str, folder: Path) -> Iterator[str]:
    """Yield the URL of a stand-in for a server, which is a process of its own on the same GPU."""
    environment = os.environ | (sharing_a_gpu(99) if backend == "nccl" else {})
    command = [sys.executable, str(ROOT / "tests/weight_receiver.py"), backend]
    with (folder / "receiver.log").open("wb") as log, serving(command, env=environment, stderr=log) as url:
        yield url


@pytest.mark.parametrize("name", ["EP2", "PP2"])
def test_weights_reach_a_receiver_bit_for_bit_over_the_update_group(name: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", **SHAPE)
    num_ranks, parallel = LAYOUTS[name]
    backend = device.backend()
    with receiver(backend, tmp_path) as url:
        spec = {"scenario": "received", "model": str(model), "url": url, "backend": backend, "parallel": parallel}
        run_ranks(num_ranks, spec, tmp_path / "run", worker="push_worker.py")
    report = json.loads((tmp_path / "run/report.json").read_text())
    expected = {tensor_name: checksum(tensor) for tensor_name, tensor in tensors_of(model).items()}
    # In buckets of one parameter, then in one bucket over the same group.
    assert [push["version"] for push in report] == ["1", "2"]
    assert all(push["checksums"] == expected for push in report)
    assert report[0]["buckets"] > 10
    assert report[1]["buckets"] == 1


def test_ranks_end_when_one_is_killed_in_a_collective(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", **SHAPE)
    num_ranks, parallel = LAYOUTS["TP2xDP2-EP2"]
    train = {"phase_deadline_seconds": DEADLINE_SECONDS}
    spec = make_spec(model, parallel=parallel, killed_rank=num_ranks - 1, train=train)
    with pytest.raises(AssertionError, match="ranks ended with") as raised:
        run_ranks(num_ranks, spec, tmp_path / "run", timeout_seconds=DEADLINE_SECONDS + 2 * MARGIN_SECONDS)
    seconds = time.time() - float((tmp_path / "run/killed_at").read_text())
    codes = re.search(r"ranks ended with \[(.*)\]", str(raised.value))
    assert codes is not None
    *others, killed = [int(code) for code in codes[1].split(",")]
    assert killed == -9
    assert all(others), others
    assert seconds < DEADLINE_SECONDS + MARGIN_SECONDS
    print(f"the others had ended {seconds:.1f} s later, with {others}")
