"""This module computes log-probabilities and entropies straight from hidden states: the matrix of logits never exists.

At 24,576 tokens and 126,464 vocabulary entries that matrix is 12.4 GB in fp32, and autograd keeps several of its size.
Here logits live for one chunk of tokens at a time. Forward keeps two numbers per token, the log-sum-exp and the
entropy; backward computes the logits of each chunk once more.

Legend: M tokens, C tokens of a chunk, H hidden size, Vp vocabulary entries of this rank, V those of them that are not
padding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.device import compiled

# The size of a chunk's logits. With fewer tokens the products wait for the weight, and for its gradient in fp32, on
# their way through memory: on a CPU twice the 265 tokens that this is at the real vocabulary gain 1 to 2 % on 2 cores.
# A GPU has 80 times the arithmetic for 20 times the memory's speed.
CHUNK_BYTES = {"cpu": 128 * 2**20, "gpu": 512 * 2**20}
_CACHED_BYTES = 2 * 2**20


def logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    group: Any = None,
    temperature: float = 1.0,
    logit_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log p(target) and H = -sum p log p of p = softmax(hidden @ weight.T / temperature), both [M], in nats.

    Both are fp32 (fp64 for fp64) whatever the inputs are, and differentiable in hidden and weight. With a group of more
    than one rank the gradient of `hidden` is this rank's part of a sum over the ranks, as behind any column-parallel
    layer: whoever hands `hidden` to the ranks adds it up.

    hidden: [M, H], the same on every rank. weight: [Vp, H], this rank's consecutive rows of the vocabulary; rows beyond
    `vocab_size` are padding, without probability. targets: int64 [M], global ids. logit_dtype: hidden @ weight.T is
    rounded to it; None: not at all. The gradient is that of the unrounded sums.
    """
    first_id, size = shard_of_vocabulary(weight, vocab_size, group)
    row_bytes = max(1, size) * _wide(hidden.dtype).itemsize
    limit = chunk_tokens or max(16, CHUNK_BYTES["gpu" if hidden.is_cuda else "cpu"] // row_bytes)
    logprobs, entropy = _FusedHead.apply(
        hidden, weight, targets - first_id, size, 1.0 / temperature, logit_dtype, limit, group
    )
    return logprobs, entropy


def shard_of_vocabulary(weight: Tensor, vocab_size: int, group: Any) -> tuple[int, int]:
    """Return the global id of this rank's first row, and how many of its rows are not padding."""
    first_id = (group.rank() if group is not None else 0) * len(weight)
    return first_id, max(0, min(len(weight), vocab_size - first_id))


class _FusedHead(torch.autograd.Function):
    """Computes the head chunk by chunk, forward and backward. `local` are the targets minus this rank's first id,
    `size` is V. scale multiplies the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        local: Tensor,
        size: int,
        scale: float,
        logit_dtype: torch.dtype | None,
        limit: int,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        rows, wide = _operand(weight[:size]), _wide(hidden.dtype)
        sums = hidden.new_zeros((4, len(hidden)), dtype=wide)
        sums[0].fill_(float("-inf"))
        chunks = _chunks(len(hidden), limit, size)
        logits = _buffer(chunks, hidden, size, wide)
        found = hidden.new_empty((len(logits), 4), dtype=wide)
        for part in chunks:
            z = _logits(_operand(hidden[part]), rows, logit_dtype, out=logits[: part.stop - part.start])
            sums[:, part] = _over_rows(chunk_sums, z, [local[part]], out=found[: len(z)], scale=scale).T
        if group is not None and group.size() > 1:
            sums = _sum_over_ranks(sums, group)
        peak, total, weighted, target = sums
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, local, peak + log_total, entropy)
        ctx.size, ctx.scale, ctx.logit_dtype, ctx.limit = size, scale, logit_dtype, limit
        ctx.set_materialize_grads(False)  # whether the entropy has a gradient is known without a look at its values
        # The difference of two logits first: it is exact where they are close, which their log-sum-exp is not.
        return target - peak - log_total, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, local, log_sum_exp, entropy = ctx.saved_tensors
        rows, wide = _operand(weight[: ctx.size]), _wide(hidden.dtype)
        grad_logprob, grad_entropy = (None if g is None else g.to(wide) for g in grads)
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(entropy)
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=rows.dtype)
        # A frozen head has none, nor the memory and the product for it.
        grad_weight = weight.new_zeros(weight.shape, dtype=wide) if ctx.needs_input_grad[1] else None
        chunks = _chunks(len(hidden), ctx.limit, ctx.size)
        logits = _buffer(chunks, hidden, ctx.size, wide)
        per_token = [local, log_sum_exp, entropy, grad_logprob, grad_entropy]
        dz: Tensor | None
        for part in chunks:
            dz = None  # that of the chunk before need not be there beside this one's
            h = _operand(hidden[part])
            z = _logits(h, rows, ctx.logit_dtype, out=logits[: len(h)])
            of_chunk = [None if x is None else x[part] for x in per_token]
            dz = _over_rows(logit_gradient, z, of_chunk, out=z, scale=ctx.scale, dtype=h.dtype)
            _multiply(dz, rows, out=grad_hidden[part])
            if grad_weight is not None:
                _multiply(dz.T, h, out=grad_weight[: ctx.size], add=True)
        of_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden.to(hidden.dtype), of_weight, None, None, None, None, None, None


def _logits(hidden: Tensor, rows: Tensor, dtype: torch.dtype | None, out: Tensor) -> Tensor:
    """Compute logits: hidden [C, H], rows [V, H] -> [C, V], in `out`, rounded to `dtype` if there is one."""
    z = _multiply(hidden, rows.T, out=out)
    return z if dtype is None else z.copy_(z.to(dtype))


@compiled
def chunk_sums(z: Tensor, local: Tensor, *, scale: float) -> Tensor:
    """Return four numbers of each token's logits, which are scale * z with z [C, V], as [C, 4]: their peak,

    sum e^(z - peak),   sum e^(z - peak) (z - peak),   z at the target (0 where another rank has it).
    """
    z = z if scale == 1.0 else z * scale
    here = (local >= 0) & (local < z.shape[1])
    target = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    peak = z.amax(dim=-1)
    z = z - peak[:, None]
    exps = z.exp()
    return torch.stack([peak, exps.sum(dim=-1), (exps * z).sum(dim=-1), torch.where(here, target, 0.0)], dim=-1)


@compiled
def logit_gradient(
    z: Tensor,
    local: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    *,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient s (g (1[y] - p) - e p (log p + H)) of z [C, V], in `dtype`. The logits are s z; s is
    `scale`.

    It follows from d log p(y)/dz = 1[y] - p and dH/dz = -p (log p + H). g and e are the gradients of the log-prob and
    the entropy; no e means zero.
    """
    logp = (z if scale == 1.0 else z * scale) - log_sum_exp[:, None]
    factor = -grad_logprob[:, None]
    if grad_entropy is not None:
        factor = factor - grad_entropy[:, None] * (logp + entropy[:, None])
    ids = torch.arange(z.shape[1], device=z.device, dtype=torch.int32)
    gradient = factor * logp.exp() + torch.where(ids == local.int()[:, None], grad_logprob[:, None], 0.0)
    return (gradient if scale == 1.0 else gradient * scale).to(dtype)


def _over_rows(
    function: Callable[..., Tensor], z: Tensor, per_token: Sequence[Tensor | None], out: Tensor, **options: Any
) -> Tensor:
    """Compute function(z, *per_token, **options) for logits z [C, V] and tensors [C].

    On a GPU this is one piece, of which torch makes a kernel that goes over z without temporaries. Elsewhere it takes
    some rows at a time and writes into `out`, which may be z: temporaries then stay in the processor's caches.
    """
    if z.is_cuda:
        return function(z, *per_token, **options)
    at_once = max(1, _CACHED_BYTES // max(1, z[0].nbytes))
    for start in range(0, len(z), at_once):
        rows = slice(start, start + at_once)
        out[rows] = function(z[rows], *(None if x is None else x[rows] for x in per_token), **options)
    return out


def _sum_over_ranks(sums: Tensor, group: Any) -> Tensor:
    """Combine the sums of all ranks, [4, M], see `chunk_sums`: the peak of all ranks, and their sums relative to it.

    This runs once for all tokens and not once per chunk: the collectives of a chunk would wait for each other.
    """
    peak, total, weighted, target = sums
    highest = peak.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    # A rank that has only padding has the peak -inf; 0 * -inf would not be a number.
    shift = (peak - highest).clamp_min(torch.finfo(peak.dtype).min)
    summed = torch.stack([total * shift.exp(), (weighted + total * shift) * shift.exp(), target])
    dist.all_reduce(summed, group=group)
    return torch.cat([highest[None], summed])


def _chunks(num_tokens: int, limit: int, size: int) -> list[slice]:
    """Divide the tokens into parts of about the same length, at most `limit`; none on a rank that has no vocabulary
    (`size` 0)."""
    if not size or not num_tokens:
        return []
    length = -(-num_tokens // -(-num_tokens // limit))
    return [slice(start, min(start + length, num_tokens)) for start in range(0, num_tokens, length)]


def _buffer(chunks: list[slice], like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Allocate room for the longest chunk, used for all of them: on a CPU the first touch of memory costs more than
    maths."""
    longest = max((part.stop - part.start for part in chunks), default=0)
    return like.new_empty((longest, size), dtype=dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(x: Tensor) -> Tensor:
    """Return a tensor as an operand of products. A CPU has no product of bf16 matrices that ends in fp32, so there bf16
    is widened."""
    return x if x.is_cuda else x.to(_wide(x.dtype))


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Write a @ b into `out`, or add it to `out`; it is accumulated and stored in the dtype of `out`."""
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    return torch.addmm(out, a, b, out=out, **wider) if add else torch.mm(a, b, out=out, **wider)
