"""This module is the router: auxiliary losses as sums over tokens, whatever ranks these lie on, and router replay (R3).

Replay trains on the experts that the server chose. Megatron's own (transformer/moe/router_replay.py) keeps one target
and one queue for recomputation per router in a process-global list, and a mode that the caller has to switch between
forward and backward passes; with several micro-batches in flight on a pipeline stage and recomputation nobody outside
the schedule can. Here the experts travel with the micro-batch, in its `PackedSequences`: a layer hands its router their
slice whenever it runs, and a recomputed layer runs with the same `PackedSequences`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.device import import_megatron
from megatron_rl.expert_choice import top_experts
from megatron_rl.model.layers import OutputNorm

import_megatron()

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402


@dataclass(frozen=True, slots=True)
class Choice:
    """Takes the place of top-k where megatron's routing function calls its replay object.

    It replays experts, and chooses among groups: Megatron itself adds up each one's best topk / group_topk scores,
    where the released models and servers add up two (expert_choice.py).

    experts: [t, topk] of the tokens that the router sees, distinct; -1 where the router chooses for itself, None where
    it always does. The probabilities are the router's own of these experts either way, and the gradient flows through
    them; what it does to them after top-k (softmax or renormalisation) it does here too.
    router: whose counts go up.
    """

    experts: Tensor | None
    router: "Router"

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Choose the experts. scores: [t, E]. Return the chosen experts' scores and the experts, [t, topk] each."""
        if num_groups and group_topk:
            best, own = top_experts(scores, topk, num_groups, group_topk)
        else:
            best, own = default_compute_topk(scores, topk)
        if self.experts is None:
            return best, own
        given = self.experts >= 0
        chosen = torch.where(given, self.experts.long(), own)
        agreed = (chosen.unsqueeze(2) == own.unsqueeze(1)).any(2)
        self.router.num_replayed += given.sum()
        self.router.num_replaced += (given & ~agreed).sum()
        return scores.gather(1, chosen), chosen


class Router(TopKRouter):
    """Is megatron-core's top-k router, with auxiliary losses and a replay of experts of our own.

    For a layer and a micro-batch of T tokens, without padding, with router logits x the losses are

        B = E * sum_i F_i P_i,   F_i = share of the T * topk choices that fell on expert i,
                                 P_i = mean over tokens of the probability of expert i before top-k, of E experts
        Z = mean over tokens of (log sum_i exp x_i)^2

    and what enters the gradient is T * (a_bal B + a_z Z) (train/step/trainer.py divides by the tokens of the step). A
    rank adds the terms of its own tokens; the counts behind F are of all tensor- and context-parallel ranks, which
    share the micro-batch, so the sums over these ranks are T * B and T * Z.

    F counts what the router would choose, under replay too: the loss should balance the router. With sigmoids the
    probability of an expert is its share of their sum, and F counts the largest ones, whatever biases and groups make
    of the choice. Megatron does the same, and the models of that kind were trained with it.

    Megatron's own B is that times the number of these ranks: with a padding mask it takes a rank's number of tokens
    from counts that its all-reduce has overwritten with those of all ranks. Without any token it is not a number.

    load_balance_loss, z_loss: the sums T * B and T * Z of this rank's terms, over micro-batches, until somebody sets
    them back to 0. A loss whose coefficient is 0 is not computed.
    num_replayed, num_replaced: likewise, choices that were replayed, and those of them that were not its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen_expert_bias = True
        self.load_balance_loss: Tensor | float = 0.0
        self.z_loss: Tensor | float = 0.0
        self.num_replayed: Tensor | int = 0
        self.num_replaced: Tensor | int = 0

    def keep_bias_in_float32(self) -> None:
        """Turn the bias, which a bf16 model has converted, back to float32 before anything is read into it."""
        self._maintain_float32_expert_bias()

    def replay(self, experts: Tensor | None) -> None:
        """Use these experts from now on: [T, topk] of this context-parallel rank's tokens, see `Choice`. None: the
        router's own.

        Under sequence parallelism a router sees the part of them that its tensor-parallel rank holds.
        """
        if experts is not None and self.config.sequence_parallel:
            experts = experts.chunk(self.tp_group.size())[self.tp_group.rank()]
        has_groups = self.config.moe_router_group_topk is not None
        self.router_replay = Choice(experts, self) if has_groups or experts is not None else None

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Return `probs` with the balance loss attached. scores_for_aux_loss, routing_map: [tokens, E], zero at
        padding."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not coefficient:
            return probs
        counts = routing_map.sum(dim=0)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        num_choices = counts.sum().clamp(min=1)
        loss = self.num_experts * (scores_for_aux_loss.sum(dim=0) * counts).sum() / num_choices
        self.load_balance_loss += loss.detach()
        attached: Any = MoEAuxLossAutoScaler.apply(probs, coefficient * loss)
        return attached

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count nothing: the bias stays as it is. Megatron's own method counts tokens for its update, and for that
        torch compiles it in every process."""

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return `logits` with the z loss attached. logits: [tokens, E]; padding_mask: [tokens], true at padding."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not torch.is_grad_enabled():
            return logits
        of_tokens = logits.logsumexp(dim=-1).square()
        loss = (of_tokens if padding_mask is None else of_tokens.masked_fill(padding_mask, 0.0)).sum()
        self.z_loss += loss.detach()
        attached: Any = MoEAuxLossAutoScaler.apply(logits, coefficient * loss)
        return attached


class Layer(TransformerLayer):
    """Is Megatron's layer. Its router gets the experts of the micro-batch that is to pass. Where its norms are
    `OutputNorm`s they take part in what it adds up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.input_layernorm, OutputNorm):
            self.self_attn_bda = lambda *_: self.input_layernorm.add
            self.mlp_bda = lambda *_: self.pre_mlp_layernorm.add

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_moe_layer:
            routed = kwargs["packed_seq_params"].routed_experts
            self.mlp.router.replay(None if routed is None else routed[:, self.layer_number - 1])
        return super().forward(*args, **kwargs)
