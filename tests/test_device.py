"""What the device module says of memory; nothing here needs a GPU."""

import pytest

from megatron_rl.device import wait_until_free
from megatron_rl.errors import Fault

GIB = 2**30


def test_memory_that_comes_is_waited_for() -> None:
    amounts = iter([1 * GIB, 1 * GIB, 3 * GIB, 0])
    wait_until_free(2 * GIB, "training", 60.0, lambda: next(amounts))
    assert next(amounts) == 0, "it went on asking"


def test_memory_that_does_not_come_is_named() -> None:
    with pytest.raises(Fault, match=r"training needs 2.0 GiB of the GPU, and 1.5 GiB were free after 0 s.*servers"):
        wait_until_free(2 * GIB, "training", 0.0, lambda: 3 * GIB // 2)


def test_a_cpu_has_nothing_to_wait_for() -> None:
    wait_until_free(2**60, "training", 0.0, lambda: None)
