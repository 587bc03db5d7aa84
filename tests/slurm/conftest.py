"""Skips these tests without a Slurm to start. With MEGATRON_RL_NEED_SLURM=1 a missing one is a failure."""

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if missing := missing_programs():
        told = f"no {', '.join(missing)}: make install-slurm"
        assert os.environ.get("MEGATRON_RL_NEED_SLURM") != "1", told
        pytest.skip(told)
    with Cluster() as cluster:
        yield cluster
