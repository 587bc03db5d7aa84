"""Computes the norm of many gradients at once, and scales them, for megatron's clipping.

megatron-core 0.19.2 itself uses the functions of Transformer Engine or apex as soon as one is installed. Without them
it runs a kernel for each parameter, and the host waits for the norm (utils.py, local_multi_tensor_*).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.device import import_megatron

import_megatron()

from megatron.core.optimizer import clip_grads  # noqa: E402


def install() -> None:
    """Make megatron use the functions of this module, whatever is installed."""
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = l2_norm, scale


def l2_norm(chunk_size: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """Return the norm of all tensors of the list together, fp32 [1] on their device."""
    (tensors,) = lists
    return torch.stack(torch._foreach_norm(tensors)).norm().float()[None], None


def scale(chunk_size: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Set the second list to the first one times `factor`; megatron gives the same list twice."""
    sources, destinations = lists
    if any(a is not b for a, b in zip(sources, destinations, strict=True)):
        torch._foreach_copy_(destinations, sources)
    torch._foreach_mul_(destinations, factor)
