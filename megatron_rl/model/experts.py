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
from megatron_rl.model.hooks import run_pre_hooks

import_megatron()

from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher  # noqa: E402

# The weights' gradient sums over the rows of each expert. Kernels want some, and those in multiples of 16 bytes.
_ALIGNED_BYTES = 16


class GroupedExperts(SequentialMLP):
    """SwiGLU experts without bias: down(silu(gate x) * up x * p), p being the router's probability of the token."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """[T, H], [E], [T] -> [T, H], and no bias."""
        hidden = permuted_local_hidden_states
        for expert in self.local_experts:
            run_pre_hooks(expert.linear_fc1)
            run_pre_hooks(expert.linear_fc2)
        ups = [expert.linear_fc1.weight for expert in self.local_experts]
        downs = [expert.linear_fc2.weight for expert in self.local_experts]
        reverse = min(distance(ups), distance(downs)) < 0
        multiple = _ALIGNED_BYTES // hidden.dtype.itemsize
        rows, ends = padded_rows(tokens_per_expert.to(hidden.device), len(hidden), multiple, reverse)
        num_rows = len(hidden) + self.num_local_experts * multiple
        gate_and_up = F.grouped_mm(_spread(hidden, rows, num_rows), stacked(ups, reverse).transpose(1, 2), offs=ends)
        activated = weighted_bias_swiglu_impl(gate_and_up, None, _spread(permuted_probs, rows, num_rows)[:, None])
        output = F.grouped_mm(activated, stacked(downs, reverse).transpose(1, 2), offs=ends)
        return output.index_select(0, rows), None


class GroupedLayer(MoELayer):
    """Megatron's layer of GroupedExperts. Where a rank has all experts, the host waits for nothing in it."""

    def __init__(self, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        if pg_collection.ep.size() == pg_collection.expt_tp.size() == 1:
            self.token_dispatcher = _LocalDispatcher(
                self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=pg_collection
            )


class _LocalDispatcher(MoEAlltoAllTokenDispatcher):
    """Of a rank that has all experts: its tokens, sorted by expert, are the experts' input.

    Megatron's own waits for the number of each expert's tokens, to sort the tokens by expert once more.
    """

    tokens_per_expert: Tensor | None

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """bool [tokens, E] -> [E], each expert's tokens."""
        self.num_out_tokens = len(routing_map) * self.config.moe_router_topk
        return routing_map.sum(dim=0)

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        return tokens_per_expert

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> tuple[Tensor, Any, Tensor]:
        counts, self.tokens_per_expert = self.tokens_per_expert, None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def padded_rows(counts: Tensor, num_tokens: int, multiple: int, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Where tokens that are sorted by expert go so that every expert has a multiple of rows, and at least one multiple.

    counts: [E], tokens of each expert, on the device; nothing waits for their values. reverse: the last expert first.
    Returns int64 [T], the row of each token, and int32 [E], the row behind each expert's last in the order of rows.
    """
    padded = (counts.clamp(min=1) + multiple - 1) // multiple * multiple
    ends = (padded.flip(0) if reverse else padded).cumsum(0)
    starts = (ends.flip(0) if reverse else ends) - padded
    shift = starts - (counts.cumsum(0) - counts)
    shifts = torch.repeat_interleave(shift, counts, output_size=num_tokens)
    return torch.arange(num_tokens, device=counts.device) + shifts, ends.to(torch.int32)


def _spread(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """x [T, ...] -> [P, ...], zero where no token is."""
    return x.new_zeros(num_rows, *x.shape[1:]).index_put((rows,), x)  # index_copy would keep x for its backward pass


def distance(weights: Sequence[Tensor]) -> int:
    """Elements from one parameter to the next, all of one shape, where they lie evenly in one storage; 0 elsewhere.

    Megatron's parameter buffer (distributed/param_and_grad_buffer.py) has the last parameter first: below 0.
    """
    first = weights[0]
    step = weights[1].storage_offset() - first.storage_offset()
    even = abs(step) >= first.numel() and all(
        w.is_contiguous()
        and w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and w.storage_offset() == first.storage_offset() + i * step
        for i, w in enumerate(weights)
    )
    return step if even else 0


def stacked(weights: Sequence[Tensor], reverse: bool) -> Tensor:
    """Parameters of one shape as one tensor [E, ...], the last one first if `reverse`; a view of them where they lie
    evenly in that order, else (a bucket of the buffer may end between them) a copy."""
    ordered = weights[::-1] if reverse else weights
    return _Stack.apply(max(0, distance(ordered)), *ordered)


class _Stack(torch.autograd.Function):
    """Gives each of the parameters its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, step: int, *weights: Tensor) -> Tensor:
        if not step:
            return torch.stack(weights)
        first = weights[0].detach()
        return first.as_strided((len(weights), *first.shape), (step, *first.stride()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *grads[0].unbind(0)
