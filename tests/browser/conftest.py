"""Skips these tests without a Chromium. With MEGATRON_RL_NEED_BROWSER=1 a missing one is a failure."""

import os
from collections.abc import Iterator

import pytest
from chromium import NAMES, Chromium, executable


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    if executable() is None:
        told = f"none of {', '.join(NAMES)} is installed: make install-browser"
        assert os.environ.get("MEGATRON_RL_NEED_BROWSER") != "1", told
        pytest.skip(told)
    chromium = Chromium()
    yield chromium
    chromium.close()
