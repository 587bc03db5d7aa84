"""Skips where there is no Chromium; with MEGATRON_RL_NEED_BROWSER=1 that is a failure."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import NAMES, Chromium, executable

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    if executable() is None:
        told = f"none of {', '.join(NAMES)} is installed: make install-browser"
        assert os.environ.get("MEGATRON_RL_NEED_BROWSER") != "1", told
        pytest.skip(told)
    chromium = Chromium()
    yield chromium
    chromium.close()
