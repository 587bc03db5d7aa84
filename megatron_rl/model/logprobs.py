"""Log-probabilities and entropies straight from hidden states: the matrix of logits never exists.

At 24,576 tokens and 126,464 vocabulary entries that matrix is 12.4 GB in fp32, and autograd keeps several of its size.
Here logits live for one chunk of tokens at a time. Forward keeps two numbers per token, the log-sum-exp and the
entropy; backward computes the logits of each chunk once more.

Legend: M tokens, C tokens of a chunk, H hidden size, Vp vocabulary entries of this rank, V those of them that are not
padding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Of a chunk's logits. At the real vocabulary this is 265 tokens: with fewer, the products wait for the weight on its
# way through memory; twice as many gain 1 to 2 % on 2 cores.
CHUNK_BYTES = 128 * 2**20


def logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    group: Any = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and H = -sum p log p of p = softmax(hidden @ weight.T / temperature), both [M], in nats.

    Both are fp32 (fp64 for fp64) whatever the inputs are, and differentiable in hidden and weight. With a group of more
    than one rank the gradient of `hidden` is this rank's part of a sum over the ranks, as behind any column-parallel
    layer: whoever hands `hidden` to the ranks adds it up.

    hidden: [M, H], the same on every rank. weight: [Vp, H], this rank's consecutive rows of the vocabulary; rows beyond
    `vocab_size` are padding, without probability. targets: int64 [M], global ids.
    """
    first_id, size = shard_of_vocabulary(weight, vocab_size, group)
    row_bytes = max(1, size) * _wide(hidden.dtype).itemsize
    limit = chunk_tokens or max(16, CHUNK_BYTES // row_bytes)
    logprobs, entropy = _FusedHead.apply(hidden, weight, targets - first_id, size, 1.0 / temperature, limit, group)
    return logprobs, entropy


def shard_of_vocabulary(weight: Tensor, vocab_size: int, group: Any) -> tuple[int, int]:
    """The global id of this rank's first row, and how many of its rows are not padding."""
    first_id = (group.rank() if group is not None else 0) * len(weight)
    return first_id, max(0, min(len(weight), vocab_size - first_id))


class _FusedHead(torch.autograd.Function):
    """`local` are the targets minus this rank's first id, `size` is V, `scale` multiplies the logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, local: Tensor, size: int, scale: float, limit: int, group: Any
    ) -> tuple[Tensor, Tensor]:
        rows, wide = _operand(weight[:size]), _wide(hidden.dtype)
        peak = hidden.new_full((len(hidden),), float("-inf"), dtype=wide)
        sums = hidden.new_zeros((3, len(hidden)), dtype=wide)
        chunks = _chunks(len(hidden), limit, size)
        logits, scratch = _buffers(chunks, hidden, size, wide, 2)
        for part in chunks:
            z = _multiply(_operand(hidden[part]), rows.T, out=logits[: part.stop - part.start])
            if scale != 1.0:
                z.mul_(scale)
            peak[part], sums[:, part] = chunk_sums(z, local[part], scratch[: len(z)])
        if group is not None and group.size() > 1:
            peak, sums = _sum_over_ranks(peak, sums, group)
        total, weighted, target = sums
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, local, peak + log_total, entropy)
        ctx.size, ctx.scale, ctx.limit = size, scale, limit
        ctx.set_materialize_grads(False)  # whether the entropy has a gradient is known without a look at its values
        # The difference of two logits first: it is exact where they are close, which their log-sum-exp is not.
        return target - peak - log_total, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, local, log_sum_exp, entropy = ctx.saved_tensors
        rows, wide = _operand(weight[: ctx.size]), _wide(hidden.dtype)
        grad_logprob, grad_entropy = (None if g is None else g.to(wide) * ctx.scale for g in grads)
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(entropy)
        with_entropy = grad_entropy is not None
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=rows.dtype)
        grad_weight = weight.new_zeros(weight.shape, dtype=wide)
        chunks = _chunks(len(hidden), ctx.limit, ctx.size)
        logits, *scratch = _buffers(chunks, hidden, ctx.size, wide, 2 if with_entropy else 1)
        for part in chunks:
            h = _operand(hidden[part])
            z = _multiply(h, rows.T, out=logits[: len(h)])
            if ctx.scale != 1.0:
                z.mul_(ctx.scale)
            logit_gradient(
                z.sub_(log_sum_exp[part, None]),
                local[part],
                entropy[part],
                grad_logprob[part],
                None if grad_entropy is None else grad_entropy[part],
                scratch[0][: len(h)] if with_entropy else None,
            )
            dz = z.to(h.dtype)
            _multiply(dz, rows, out=grad_hidden[part])
            _multiply(dz.T, h, out=grad_weight[: ctx.size], add=True)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None, None, None


def chunk_sums(z: Tensor, local: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits z [C, V], which it overwrites: the peak max z [C], and as [3, C]

        sum e^(z - peak),   sum e^(z - peak) (z - peak),   z at the target (0 where another rank has it).

    scratch: [C, V].
    """
    column, mine = _column(local, z.shape[1])
    target = torch.where(mine, z.gather(1, column).squeeze(1), z.new_zeros(()))
    peak = z.amax(dim=-1)
    z.sub_(peak[:, None])
    exps = torch.exp(z, out=scratch)
    total = exps.sum(dim=-1)
    return peak, torch.stack([total, exps.mul_(z).sum(dim=-1), target])


def logit_gradient(
    logp: Tensor,
    local: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    scratch: Tensor | None,
) -> None:
    """Turn logp [C, V] into the gradient g (1[y] - p) - e p (log p + H) of the logits, in place.

    From d log p(y)/dz = 1[y] - p and dH/dz = -p (log p + H); g and e are the gradients of the log-prob and the entropy,
    no e means zero. scratch: [C, V], when there is e.
    """
    column, mine = _column(local, logp.shape[1])
    if grad_entropy is None:
        logp.exp_().mul_(-grad_logprob[:, None])
    else:
        factor = torch.mul(logp, -grad_entropy[:, None], out=scratch)
        factor.sub_((grad_logprob + grad_entropy * entropy)[:, None])
        logp.exp_().mul_(factor)
    logp.scatter_add_(1, column, (grad_logprob * mine)[:, None])


def _sum_over_ranks(peak: Tensor, sums: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """The peak of all ranks, and their sums (see `chunk_sums`) relative to it.

    Once for all tokens and not once per chunk: the collectives of a chunk would wait for each other.
    """
    highest = peak.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    # A rank that has only padding has the peak -inf; 0 * -inf would not be a number.
    shift = (peak - highest).clamp_min(torch.finfo(peak.dtype).min)
    total, weighted, target = sums
    sums = torch.stack([total * shift.exp(), (weighted + total * shift) * shift.exp(), target])
    dist.all_reduce(sums, group=group)
    return highest, sums


def _column(local: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where a target stands in this rank's logits, as an index [C, 1] that is always valid, and whether it does [C]."""
    return local.clamp(0, size - 1)[:, None], (local >= 0) & (local < size)


def _chunks(num_tokens: int, limit: int, size: int) -> list[slice]:
    """Parts of about the same length, at most `limit`; none on a rank that has no vocabulary (`size` 0)."""
    if not size or not num_tokens:
        return []
    length = -(-num_tokens // -(-num_tokens // limit))
    return [slice(start, min(start + length, num_tokens)) for start in range(0, num_tokens, length)]


def _buffers(chunks: list[slice], like: Tensor, size: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Room for the longest chunk, used for all of them: on a CPU the first touch of memory costs more than maths."""
    longest = max((part.stop - part.start for part in chunks), default=0)
    return [like.new_empty((longest, size), dtype=dtype) for _ in range(count)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(x: Tensor) -> Tensor:
    """What products are made of. A CPU has no product of bf16 matrices that ends in fp32, so bf16 is widened there."""
    return x if x.is_cuda else x.to(_wide(x.dtype))


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """a @ b into `out`, or added to it, accumulated and stored in the dtype of `out`."""
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    return torch.addmm(out, a, b, out=out, **wider) if add else torch.mm(a, b, out=out, **wider)
