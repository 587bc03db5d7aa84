"""Tests the waiting of the device module for free GPU memory. Nothing here needs a GPU."""

import pytest

from megatron_rl.device import wait_until_free
from megatron_rl.errors import Fault


@pytest.mark.parametrize(
    ("readings", "needed", "expected"),
    [([None], 5, None), ([1, 2, 7, 7], 5, None), ([7, 7], 5, None), ([4] * 99, 5, "training needs"), ([1], 0, None)],
)
def test_training_waits_until_what_servers_released_is_there(
    readings: list[int | None], needed: int, expected: str | None
) -> None:
    left = iter(readings)
    asked = []

    def free_bytes() -> int | None:
        asked.append(next(left, 1))
        return asked[-1]

    if expected is None:
        wait_until_free(needed, 5.0, free_bytes)
        assert asked[: len(readings)] == readings
    else:
        with pytest.raises(Fault, match=expected):
            wait_until_free(needed, 0.3, free_bytes)
