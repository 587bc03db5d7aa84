"""Stands in for SGLang's CUDA kernels, of which there is no CPU wheel. SGLang imports names from here and, on a CPU,
calls none of them: they are kernels of paths (speculative decoding, quantisation) that a CPU server does not take."""

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is a CUDA kernel; this server runs on a CPU")

    return missing
