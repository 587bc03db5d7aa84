"""Checks of the CUDA path: `make gpu-check`, on a machine with a GPU.

With MEGATRON_RL_GPU_CHECK_ON_CPU=1 they compare the CPU with itself, which shows that the checks run, not that a GPU is
right.
"""

import os
from collections.abc import Iterator

import pytest

if os.environ.get("MEGATRON_RL_GPU_CHECK_ON_CPU") == "1":
    os.environ["MEGATRON_RL_DEVICE"] = "cpu"

from training_runs import TrainingRuns

from megatron_rl import device


def pytest_sessionstart() -> None:
    """End the tests without a GPU: skipped checks would look like passed ones."""
    if not device.on_cuda() and os.environ.get("MEGATRON_RL_GPU_CHECK_ON_CPU") != "1":
        pytest.exit(
            "no CUDA device is visible (or MEGATRON_RL_DEVICE=cpu); set MEGATRON_RL_GPU_CHECK_ON_CPU=1 to compare the "
            "CPU with itself",
            returncode=2,
        )


def pytest_report_header() -> str:
    return f"device under test: {device.device_name()}"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingRuns]:
    found = TrainingRuns(tmp_path_factory.mktemp("runs"))
    yield found
    found.close()
