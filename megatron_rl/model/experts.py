"""This module runs all experts of a rank as two grouped matrix products, by torch's own kernel. The weights' gradients
are computed by quack's if asked for.

megatron-core's local experts run one after the other: two small products for each, and the host has to know how many
tokens each one gets. Its grouped ones need Transformer Engine. Here megatron's module still owns the parameters, expert
by expert, so that names, checkpoints, optimizer and export are the same; only the products are others.

Legend: T tokens of this rank, each with K choices out of its E experts; P rows of the products, one expert's behind
another's; H hidden size.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.device import compiled, import_megatron
from megatron_rl.model.hooks import run_pre_hooks

import_megatron()

from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher  # noqa: E402

log = logging.getLogger(__name__)

# The weights' gradient sums over the rows of each expert. Kernels want some, and those in multiples of 16 bytes.
_ALIGNED_BYTES = 16


class GroupedExperts(SequentialMLP):
    """Computes SwiGLU experts without bias: the sum over choices of down(silu(gate x) * up x * p), where p is the
    router's probability.

    With adapters (model/lora.py) the weights are frozen, and each product is the sum of theirs and of two narrow ones
    of all adapters.

    ready: called with each parameter whose gradient is there, except the first of each kind, for which autograd calls
    megatron's DDP; None where there is no DDP.
    add_product: quack's `gemm_add_inplace`; None leaves gradients to torch.
    """

    ready: Callable[[Tensor], None] | None = None
    weights: "tuple[Product, Product] | None" = None

    def __init__(self, *args: Any, add_product: Callable[..., None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_product = add_product
        self.linears = tuple(x for expert in self.local_experts for x in (expert.linear_fc1, expert.linear_fc2))

    def forward(self, hidden: Tensor, expert_of: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Run the experts: hidden [T, H], expert_of int64 and probs [T, K] -> [T, H], and no bias.

        With megatron's other dispatchers tokens come sorted by expert and once for each choice: then expert_of is [E],
        the number of each expert's tokens, and probs is [T].
        """
        ups, downs = self._weights()
        if expert_of.dim() == 1:
            numbers = torch.arange(self.num_local_experts, device=hidden.device)
            counts = expert_of.to(hidden.device)
            expert_of = torch.repeat_interleave(numbers, counts, output_size=len(hidden))[:, None]
            probs = probs[:, None]
        rows = rows_of(expert_of, self.num_local_experts, _ALIGNED_BYTES // hidden.dtype.itemsize, ups.is_reversed)
        gate_and_up = ups.product(_Spread.apply(hidden, *rows[:2]), rows.ends)
        # A row without a token has the probability 0, so it adds nothing to the output or to the weights' gradients.
        row_probs = probs.new_zeros(len(rows.token)).index_put((rows.of_choice.flatten(),), probs.flatten())
        activated = weighted_bias_swiglu_impl(gate_and_up, None, row_probs[:, None])
        output = downs.product(activated, rows.ends)
        return _Collect.apply(output, *rows[:2]), None

    def lay_frozen_weights_together(self) -> None:
        """Move frozen weights side by side in memory, so that their stack is a view and no copy. The last expert comes
        first, as in megatron's buffers, which hold the adapters."""
        for linears in (self.linears[::2], self.linears[1::2]):
            weights = [linear.weight for linear in linears]
            together = weights[0].new_empty(len(weights), *weights[0].shape)
            for weight, place in zip(reversed(weights), together, strict=True):
                weight.data = place.copy_(weight.data)

    def _weights(self) -> tuple["Product", "Product"]:
        """Return both products, of the weights as they lie in megatron's buffers. It waits for weights that are still
        to come (see `hooks`)."""
        for linear in self.linears:
            run_pre_hooks(linear)
        if self.weights is None:
            self.weights = self._products()
        return self.weights

    def _products(self) -> tuple["Product", "Product"]:
        """Make the products of gate and up and of down, of trained weights or of frozen ones and their adapters."""
        pairs = self.linears[::2], self.linears[1::2]
        is_adapted = getattr(self.linears[0], "lora_a", None) is not None
        kinds = ("lora_a", "lora_b") if is_adapted else ("weight",)
        trained = [[getattr(linear, kind) for linear in linears] for linears in pairs for kind in kinds]
        weights = [[linear.weight for linear in linears] for linears in pairs]
        sums = [[parameter.main_grad for parameter in same] for same in trained] if self.ready else []
        is_reversed = min(map(distance, [*weights, *trained, *sums])) < 0
        found = [Weights(same, is_reversed, self.ready, self.add_product) for same in trained]
        if is_adapted:
            ups, downs = (Weights(same, is_reversed) for same in weights)
            up_a, up_b, down_a, down_b = found
            return AdaptedWeights(ups, up_a, up_b, pairs[0][0]), AdaptedWeights(downs, down_a, down_b, pairs[1][0])
        if self.add_product and not all(weights.adds_products for weights in found):
            log.warning(
                "model.expert_weight_gradient = 'quack' leaves a layer to torch: its experts do not lie evenly in "
                "megatron's buffer of gradients"
            )
        return found[0], found[1]


class GroupedLayer(MoELayer):
    """Is Megatron's layer of GroupedExperts. Where a rank has all experts, the host waits for nothing in it."""

    def __init__(self, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        if pg_collection.ep.size() == pg_collection.expt_tp.size() == 1:
            self.token_dispatcher = _LocalDispatcher(
                self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=pg_collection
            )


class _LocalDispatcher(MoEAlltoAllTokenDispatcher):
    """Dispatches tokens on a rank that has all experts: they go there as they are, with the numbers of their experts.

    Megatron's own sorts them by expert, and waits for the number of each expert's to sort them once more.
    """

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten the tokens and find their experts: hidden_states [..., H]; routing_map bool and probs [T, E] ->
        [T, H], [T, K]."""
        self._shape = hidden_states.shape
        # All of a token's choices are 1, everything else is 0.
        self._expert_of = routing_map.float().topk(self.config.moe_router_topk, dim=1, sorted=False).indices
        return hidden_states.flatten(0, -2), probs.gather(1, self._expert_of)

    def token_dispatch(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, probs

    def dispatch_postprocess(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return hidden, self._expert_of, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.view(self._shape)


class Rows(NamedTuple):
    """Says which row of grouped products belongs to which token and expert. An expert's rows are consecutive, and their
    number is a multiple of some number.

    of_choice: int64 [T, K], the row of each choice. token: int64 [P], the token of each row; a row without one has any.
    ends: int32 [E], the row behind each expert's last, in the order of rows.
    """

    of_choice: Tensor
    token: Tensor
    ends: Tensor


def rows_of(expert_of: Tensor, num_experts: int, multiple: int, reverse: bool = False) -> Rows:
    """Give every choice of an expert a row, each expert's tokens in their order.

    expert_of: int64 [T, K] on the device; nothing waits for its values. multiple: every expert has so many rows, or
    twice as many, and so on. reverse: the last expert has the first rows.

    In this example the second of four tokens chooses expert 0, the others expert 1, and rows come in pairs. P is the
    most that can be needed:

        row      0 1   2 3 4 5   6 7
        expert   0 0   1 1 1 1   none
        token    1 -   0 2 3 -   - -

    >>> expert_of = torch.tensor([[1], [0], [1], [1]])
    >>> rows = rows_of(expert_of, num_experts=2, multiple=2)
    >>> rows.of_choice.tolist()
    [[2], [0], [3], [4]]
    >>> rows.token.tolist()
    [1, 0, 0, 2, 3, 0, 0, 0]
    >>> rows.ends.tolist()
    [2, 6]

    In reverse expert 1 has rows 0 to 3, and expert 0 the two behind them:

    >>> rows = rows_of(expert_of, num_experts=2, multiple=2, reverse=True)
    >>> rows.of_choice.tolist(), rows.ends.tolist()
    ([[0], [4], [1], [2]], [4, 6])
    """
    num_tokens, num_choices = expert_of.shape
    # [E, T], 1 where the token has chosen the expert. By expert and then by token: torch adds up along a first
    # dimension 50 times slower (H200, 8,192 tokens).
    chosen = expert_of.new_zeros(num_experts, num_tokens, dtype=torch.int32).scatter_(0, expert_of.T, 1)
    num_until = chosen.cumsum(1, dtype=torch.int32)  # of the expert's tokens, up to this one and with it
    num_rows = (chosen.sum(1).clamp(min=1) + multiple - 1) // multiple * multiple  # [E]
    ends = (num_rows.flip(0) if reverse else num_rows).cumsum(0)
    starts = (ends.flip(0) if reverse else ends) - num_rows  # [E], by expert again
    of_choice = starts[expert_of] + num_until.gather(0, expert_of.T).T - 1
    token_of_choice = torch.arange(num_tokens, device=expert_of.device)[:, None].expand(-1, num_choices)
    token = expert_of.new_zeros(expert_of.numel() + num_experts * multiple)
    token.index_copy_(0, of_choice.flatten(), token_of_choice.flatten())
    return Rows(of_choice, token, ends.to(torch.int32))


def _spread(x: Tensor, token: Tensor) -> Tensor:
    """Copy each token to its rows: x [T, H] -> [P, H]. Without any tokens the rows are zeros."""
    return x.index_select(0, token) if len(x) else x.new_zeros(len(token), x.shape[1])


@compiled
def _collect(x: Tensor, of_choice: Tensor) -> Tensor:
    """Sum rows over the choices of a token: x [P, H] -> [T, H], in fp32 and then rounded."""
    found = x.index_select(0, of_choice.flatten())
    if of_choice.shape[1] == 1:
        return found
    return found.unflatten(0, of_choice.shape).sum(dim=1, dtype=torch.float32).to(x.dtype)


class _Spread(torch.autograd.Function):
    """Copies tokens to rows, and sums a token's rows in the backward pass; `_Collect` is the other way round. Torch's
    own gradient of either adds atomically, in the dtype of the tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, of_choice: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(of_choice)
        return _spread(x, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _collect(grads[0], ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, of_choice: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _collect(x, of_choice)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _spread(grads[0], ctx.saved_tensors[0]), None, None


def distance(weights: Sequence[Tensor]) -> int:
    """Return the number of elements from one parameter to the next, all of one shape, where they lie evenly in one
    storage; else 0.

    Megatron's parameter buffer (distributed/param_and_grad_buffer.py) has the last parameter first, so there it is
    below 0.

    >>> buffer = torch.zeros(64)
    >>> expert_1, other, expert_0 = buffer[:16], buffer[16:48], buffer[48:]
    >>> distance([expert_0, expert_1])
    -48
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


def _view(weights: Sequence[Tensor], step: int) -> Tensor:
    """Return a view [E, ...] of parameters that lie `step` elements apart."""
    first = weights[0].detach()
    return first.as_strided((len(weights), *first.shape), (step, *first.stride()))


class Weights:
    """Multiplies rows by the weights of their experts, parameters of one shape, in one grouped product.

    is_reversed: the last of the experts comes first, as in the buffers that megatron lays parameters and their fp32
    gradients (`main_grad`) out in. Where weights lie evenly there, their stack is a view; else (a bucket of the buffer
    may end between them) it is a copy. A gradient goes one of three ways:

        main_grads lie evenly, with add_product   each product is added to them in fp32, without a tensor of its own
        weights and main_grads lie evenly         all are added to them at once
        else                                      autograd gives each parameter its own

    Four tokens in four rows, the first of expert 0 and the others of expert 1, whose weights make sums of the four
    numbers of a row, ten and a hundred times:

    >>> experts = [torch.full((4, 4), 10.0), torch.full((4, 4), 100.0)]
    >>> tokens = torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0], [4, 0, 0, 0]])
    >>> Weights(experts, is_reversed=False).product(tokens, torch.tensor([1, 4], dtype=torch.int32))[:, 0].tolist()
    [10.0, 200.0, 300.0, 400.0]

    With the last expert first, the rows of expert 1 come first:

    >>> Weights(experts, is_reversed=True).product(tokens, torch.tensor([3, 4], dtype=torch.int32))[:, 0].tolist()
    [100.0, 200.0, 300.0, 40.0]
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        is_reversed: bool,
        ready: Callable[[Tensor], None] | None = None,
        add_product: Callable[..., None] | None = None,
    ) -> None:
        """Hold the weights of the experts. weights: by expert. ready, add_product: see GroupedExperts."""
        self.is_reversed = is_reversed
        self._ordered = tuple(weights[::-1] if is_reversed else weights)
        # The number of elements from one weight to the next; 0 when they are not evenly spaced in this order.
        self._step = max(0, distance(self._ordered))
        self._main_step = max(0, distance([weight.main_grad for weight in self._ordered])) if ready else 0
        self._ready, self._add_product = ready, add_product

    @property
    def adds_products(self) -> bool:
        """Tell whether `add_product` adds up gradients: there is such a function, and the gradients lie evenly."""
        return bool(self._add_product and self._main_step)

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        """Multiply x [P, in], each expert's rows up to its `ends`, by its weight [out, in] -> [P, out]."""
        if self.adds_products:
            return _Product.apply(self, self._ordered[0], x, ends)
        return F.grouped_mm(x, self.stacked().mT, offs=ends)

    def stacked(self) -> Tensor:
        """Stack all weights [E, ...], for autograd. Their gradients go to megatron's all at once, or to each
        parameter."""
        if self._step and self._main_step:
            return _View.apply(self, self._ordered[0])
        return _Stack.apply(self._step, *self._ordered)

    def values(self) -> Tensor:
        """Stack all weights [E, ...], without a gradient: a view where it can be one."""
        return _view(self._ordered, self._step) if self._step else torch.stack([w.detach() for w in self._ordered])

    def add(self, gradient: Tensor) -> None:
        """Add the gradients [E, ...] of all weights to megatron's."""
        first, count = self._ordered[0], len(self._ordered)
        _add(first.main_grad.as_strided((count, first.numel()), (self._main_step, 1)), gradient.reshape(count, -1))
        self._tell_megatron()

    def add_product(self, gradient: Tensor, x: Tensor, ends: Tensor) -> None:
        """Add each expert's product [out, in] of gradient [P, out] and x [P, in] to megatron's gradient, in fp32."""
        assert self._add_product is not None
        first, count = self._ordered[0].main_grad, len(self._ordered)
        total = first.as_strided((count, *first.shape), (self._main_step, *first.stride()))
        # Tuning is off: it would try every kernel again for every number of rows.
        self._add_product(gradient.mT, x, total, cu_seqlens_k=F.pad(ends, (1, 0)), tuned=False)
        self._tell_megatron()

    def _tell_megatron(self) -> None:
        """Tell megatron's DDP that the gradients of all weights are there, and that it has none to add."""
        self._ordered[0].grad_added_to_main_grad = True  # its hook adds nothing, until the next step
        assert self._ready is not None
        for weight in self._ordered[1:]:
            self._ready(weight)


class Product(Protocol):
    """Multiplies rows by the weights of their experts, see `Weights.product`."""

    is_reversed: bool

    def product(self, x: Tensor, ends: Tensor) -> Tensor: ...


class AdaptedWeights:
    """Multiplies rows by frozen weights and by their adapters: x W^T + scale * (x A^T) B^T, each expert's."""

    def __init__(self, base: Weights, a: Weights, b: Weights, linear: Any) -> None:
        """Hold weights and adapters. linear: the AdaptedLinear of one expert,
        which says whether adapters count, and their scale."""
        self.is_reversed = base.is_reversed
        self._base, self._a, self._b, self._linear = base, a, b, linear

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        output = self._base.product(x, ends)
        if not self._linear.adapts:
            return output
        down = self._a.product(x, ends) * self._linear.scale
        return output + self._b.product(down, ends)


class _Product(torch.autograd.Function):
    """Is torch's grouped product, but the weights' gradient is never a tensor of its own. As in `_View`, autograd knows
    the first of the parameters alone."""

    @staticmethod
    def forward(ctx: Any, weights: Weights, first: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        ctx.weights = weights
        ctx.save_for_backward(x, ends)
        return F.grouped_mm(x, weights.values().mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, ends), gradient = ctx.saved_tensors, grads[0].contiguous()
        values = ctx.weights.values()
        ctx.weights.add_product(gradient, x, ends)
        of_first = values.new_empty(values.shape[1:])  # for megatron's hook, which does not read it
        return None, of_first, F.grouped_mm(gradient, values, offs=ends), None


class _View(torch.autograd.Function):
    """Shows autograd the first of the parameters alone: at every other one it would stop, and call megatron."""

    @staticmethod
    def forward(ctx: Any, weights: Weights, first: Tensor) -> Tensor:
        ctx.weights = weights
        return weights.values()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.weights.add(grads[0])
        return None, grads[0][0]


class _Stack(torch.autograd.Function):
    """Gives each of the parameters its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, step: int, *weights: Tensor) -> Tensor:
        return _view(weights, step) if step else torch.stack(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *grads[0].unbind(0)


@compiled
def _add(total: Tensor, x: Tensor) -> None:
    total.add_(x)
