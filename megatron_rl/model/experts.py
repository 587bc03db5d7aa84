"""All experts of a rank in two grouped matrix products, by torch's own kernel.

megatron-core's local experts run one after the other: two small products for each, and the host has to know how many
tokens each one gets. Its grouped ones want Transformer Engine. Here megatron's module still owns the parameters, expert
by expert, so that names, checkpoints, optimizer and export are the same; only the products are others.

Legend: T tokens of this rank, sorted by expert; E experts of this rank; P rows of the padded tokens; H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.device import import_megatron

import_megatron()

from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402

# The weights' gradient sums over the tokens of each expert, whose rows the kernel wants in multiples of 16 bytes.
_ALIGNED_BYTES = 16


class GroupedExperts(SequentialMLP):
    """SwiGLU experts without bias: down(silu(gate x) * up x * p), p being the router's probability of the token."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """[T, H], [E], [T] -> [T, H], and no bias."""
        hidden = permuted_local_hidden_states
        up, up_reversed = _stacked([expert.linear_fc1.weight for expert in self.local_experts])
        down, down_reversed = _stacked([expert.linear_fc2.weight for expert in self.local_experts])
        assert up_reversed == down_reversed, "both come from one parameter buffer, in one order"
        multiple = _ALIGNED_BYTES // hidden.dtype.itemsize
        rows, ends = padded_rows(tokens_per_expert.to(hidden.device), len(hidden), multiple, up_reversed)
        num_rows = len(hidden) + self.num_local_experts * (multiple - 1)
        gate_and_up = F.grouped_mm(_spread(hidden, rows, num_rows), up.transpose(1, 2), offs=ends)
        gate, linear = gate_and_up.chunk(2, dim=-1)
        activated = F.silu(gate) * linear
        # As megatron does it: the product with fp32 probabilities in fp32, then back.
        activated = (activated * _spread(permuted_probs, rows, num_rows)[:, None]).to(hidden.dtype)
        return F.grouped_mm(activated, down.transpose(1, 2), offs=ends).index_select(0, rows), None


def padded_rows(counts: Tensor, num_tokens: int, multiple: int, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Where tokens that are sorted by expert go so that every expert has a multiple of rows.

    counts: [E], tokens of each expert, on the device; nothing waits for their values. reverse: the last expert first.
    Returns int64 [T], the row of each token, and int32 [E], the row behind each expert's last in the order of rows.
    """
    padded = (counts + multiple - 1) // multiple * multiple
    ends = (padded.flip(0) if reverse else padded).cumsum(0)
    starts = (ends.flip(0) if reverse else ends) - padded
    shift = starts - (counts.cumsum(0) - counts)
    shifts = torch.repeat_interleave(shift, counts, output_size=num_tokens)
    return torch.arange(num_tokens, device=counts.device) + shifts, ends.to(torch.int32)


def _spread(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """x [T, ...] -> [P, ...], zero where no token is."""
    return x.new_zeros(num_rows, *x.shape[1:]).index_copy(0, rows, x)


def _stacked(weights: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Parameters of one shape as one tensor [E, ...], and whether the last comes first.

    Megatron's parameter buffer holds them at equal distances, the last one first, and then this is a view of it;
    otherwise (a bucket may end between them) a copy.
    """
    first, second = weights[0], weights[1]
    step = second.storage_offset() - first.storage_offset()
    even = abs(step) >= first.numel() and all(
        w.is_contiguous()
        and w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and w.storage_offset() == first.storage_offset() + i * step
        for i, w in enumerate(weights)
    )
    return _Stack.apply(abs(step) if even else 0, step < 0 and even, *weights), step < 0 and even


class _Stack(torch.autograd.Function):
    """Gives each of the parameters its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, step: int, reverse: bool, *weights: Tensor) -> Tensor:
        ctx.reverse = reverse
        if not step:
            return torch.stack(weights)
        lowest = weights[-1 if reverse else 0].detach()
        return lowest.as_strided((len(weights), *lowest.shape), (step, *lowest.stride()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        parts = grads[0].unbind(0)
        return None, None, *(parts[::-1] if ctx.reverse else parts)
