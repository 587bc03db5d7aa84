"""Finds where the host waits for the device. Without a device it finds calls that would wait."""

import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl import device

_aten = torch.ops.aten
# Sizes or numbers that depend on what a tensor holds.
_ASKING = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.bincount.default,
    _aten.equal.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_METHODS = ("numpy", "tolist", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "__array__")


class _Asks(TorchDispatchMode):
    """Records calls that would wait, in `found`, with the lines they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def note(self, what: str) -> None:
        others = (f"{os.sep}torch{os.sep}", __file__)
        lines = [x for x in traceback.extract_stack() if not any(part in x.filename for part in others)]
        places = (f"{x.filename}:{x.lineno} {x.line}" for x in lines[-4:])
        self.found.append("\n  ".join([what, *places]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASKING:
            self.note(str(func))
        elif func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.note(f"{func} without its size")
        elif func in _INDEXING and _by_truth_values(args):
            self.note(f"{func} by truth values")
        elif func is _aten.lift_fresh.default and args[0].is_floating_point():
            self.note("a number that comes from the host")  # integers are megatron's count of tokens, which stays there
        return func(*args, **kwargs)


def _by_truth_values(args: Any) -> bool:
    """Return whether this indexes by truth values and so waits for their count. A fill with one number does not."""
    truths = any(index is not None and index.dtype == torch.bool for index in args[1])
    return truths and (len(args) < 3 or args[2].numel() != 1)


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """Yield a list that gets the places in the block where the host waits for the device.

    With CUDA, torch reports them. On a CPU they are the calls that would wait if the tensors were on a device; copies
    to a device cannot be seen there.
    """
    if device.on_cuda():
        found: list[str] = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [f"{one.filename}:{one.lineno} {one.message}" for one in said if "synchroniz" in str(one.message)]
        return
    mode = _Asks()
    originals = {name: getattr(Tensor, name) for name in _METHODS}

    def noted(name: str) -> Any:
        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            mode.note(f"Tensor.{name}")
            return originals[name](tensor, *args, **kwargs)

        return method

    for name in _METHODS:
        setattr(Tensor, name, noted(name))
    try:
        with mode:
            yield mode.found
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)
