"""The router with its load-balance loss as a sum over tokens, whatever ranks the tokens of a micro-batch lie on."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_rl.device import import_megatron

import_megatron()

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402


class Router(TopKRouter):
    """megatron-core's top-k router; the load-balance loss is our own.

    The loss of a layer and a micro-batch of T tokens, padding left out, is

        B = E * sum_i F_i P_i,   F_i = share of the T * topk choices that fell on expert i,
                                 P_i = mean over tokens of the probability of expert i before top-k, of E experts

    and what enters the gradient is coefficient * T * B (train/trainer.py divides by the tokens of the step). A rank
    adds the terms of its own tokens; the counts behind F are of all tensor- and context-parallel ranks, which share
    the micro-batch, so the sum over these ranks is T * B.

    Megatron's own gives that times the number of these ranks: with a padding mask it takes a rank's number of tokens
    from counts that its all-reduce has overwritten with those of all ranks. And without a token it is not a number.
    """

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """scores_for_aux_loss, routing_map: [tokens, E], zero at padding. Returns `probs` with the loss attached."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not coefficient:
            return probs
        counts = routing_map.sum(dim=0)
        dist.all_reduce(counts, group=self.tp_cp_group)
        num_choices = counts.sum().clamp(min=1)
        total = self.num_experts * (scores_for_aux_loss.sum(dim=0) * counts).sum() / num_choices
        attached: Any = MoEAuxLossAutoScaler.apply(probs, coefficient * total)
        return attached
