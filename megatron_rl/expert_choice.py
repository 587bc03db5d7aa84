"""This module chooses experts among groups, for trainer and embedded server.

Legend: t tokens, E experts, k of which a token chooses.
"""

import torch
from torch import Tensor


def top_experts(scores: Tensor, topk: int, n_group: int, topk_group: int) -> tuple[Tensor, Tensor]:
    """Choose each token's largest scores, of [t, E], in its best groups of experts. Return scores and experts, [t, k]
    each.

    The best are `topk_group` of the `n_group` groups of consecutive experts: those whose two largest scores have the
    largest sum.
    """
    if n_group > 1:
        groups = scores.unflatten(-1, (n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
        left_out = torch.ones(groups.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, best, False)
        scores = groups.masked_fill(left_out.unsqueeze(-1), float("-inf")).flatten(-2)
    return scores.topk(topk, dim=-1)
