"""Log-probabilities and entropy of a vocabulary that is divided over tensor-parallel ranks.

Legend: T tokens, Vp vocabulary entries of this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelLogProbs(torch.autograd.Function):
    """log p(target) and H = -sum p log p of softmax over all ranks' logits, in the dtype of the logits.

    With p = softmax(z): d log p(y) / dz = 1[y] - p,  dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first_id: int, valid: int, group: Any
    ) -> tuple[Tensor, Tensor]:
        num_tokens, size = logits.shape
        many = group is not None and group.size() > 1
        if valid < size:
            logits = logits.clone()
            logits[:, valid:] = float("-inf")
        peak = logits.max(dim=-1).values
        if many:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - peak[:, None]
        local = targets - first_id
        mine = (local >= 0) & (local < valid)
        rows = torch.arange(num_tokens, device=logits.device)
        target = torch.where(mine, shifted[rows, local.clamp(0, size - 1)], shifted.new_zeros(()))
        probs = shifted.exp()
        # 0 * -inf at padded entries is not a number; they have no probability and no part in the entropy.
        weighted = (probs[:, :valid] * shifted[:, :valid]).sum(dim=-1)
        sums = torch.stack([probs.sum(dim=-1), weighted, target])
        if many:
            dist.all_reduce(sums, group=group)
        total, weighted, target = sums
        log_total = total.log()
        entropy = log_total - weighted / total
        probs.div_(total[:, None])
        ctx.save_for_backward(probs, local, mine, entropy)
        ctx.valid = valid
        return target - log_total, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_logprob, grad_entropy = grads
        probs, local, mine, entropy = ctx.saved_tensors
        grad = probs * -grad_logprob[:, None]
        rows = mine.nonzero().squeeze(1)
        grad[rows, local[rows]] += grad_logprob[rows]
        if grad_entropy.any():
            logp = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
            grad -= grad_entropy[:, None] * probs * (logp + entropy[:, None])
        return grad, None, None, None, None


def vocab_parallel_logprobs(
    logits: Tensor, targets: Tensor, vocab_size: int, group: Any = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` and entropies, both [T], in nats; differentiable in the logits.

    logits: [T, Vp], this rank's consecutive part of the vocabulary, fp32 or fp64; rows beyond `vocab_size` are padding.
    targets: int64 [T], global ids.
    """
    rank = group.rank() if group is not None else 0
    first_id = rank * logits.shape[-1]
    valid = max(0, min(logits.shape[-1], vocab_size - first_id))
    logprobs, entropy = _VocabParallelLogProbs.apply(logits, targets, first_id, valid, group)
    return logprobs, entropy
