"""This module is the last layer as the trainer needs it: log-probs and entropies of chosen tokens, in place of logits
of all tokens.

Megatron's GPTModel hands its last hidden states to an `output_processor` and returns what that returns. The output
layer stays megatron's: its weight is built, sharded, saved and reduced as ever, only its product is computed elsewhere.

Legend: T packed tokens, Ts of them on this rank, M loss tokens, H hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl import device
from megatron_rl.model.hooks import run_pre_hooks
from megatron_rl.model.logprobs import logprobs_and_entropy, shard_of_vocabulary

device.import_megatron()

from megatron.core import tensor_parallel  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRequest:
    """Says what one forward pass asks of the head.

    index: int64 [M], packed positions whose next token is scored. targets: int64 [M], those tokens.
    temperature: divides the logits.
    """

    index: Tensor
    targets: Tensor
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Is GPTModel's `output_processor` on the last pipeline stage; its `output_processor_context` is a HeadRequest.

    logit_dtype: see `logprobs_and_entropy`.
    """

    vocab_size: int
    norm_head: bool
    logit_dtype: torch.dtype | None = None

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: HeadRequest,
        config: Any,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Score the targets: hidden_states [Ts, 1, H] -> log-probs and entropies, both [M].

        output_weight: the embedding's weight, in place of the head's, for a model whose embedding is tied to the head.

        The ranks that share the vocabulary each compute a part of the hidden states' gradient. Both ways to hand them
        the hidden states add the parts up in backward: the gather by a reduce-scatter, the copy by an all-reduce.
        """
        group = output_layer.tp_group
        run_pre_hooks(output_layer)
        weight = output_layer.weight if output_weight is None else output_weight
        if config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=group)
        hidden = hidden.squeeze(1).index_select(0, context.index)
        if self.norm_head:
            hidden = hidden / column_norm(weight, self.vocab_size, group).to(hidden.dtype)
        return logprobs_and_entropy(
            hidden,
            weight,
            context.targets,
            self.vocab_size,
            group=group,
            temperature=context.temperature,
            logit_dtype=self.logit_dtype,
        )


def column_norm(weight: Tensor, vocab_size: int, group: Any) -> Tensor:
    """Return the norm for `norm_head`: [H], ||W||_2 over the vocabulary axis + 1e-7, detached and without padded rows.

    Dividing the hidden states by it gives the logits of W / norm without a second copy of W.
    """
    _, size = shard_of_vocabulary(weight, vocab_size, group)
    rows = weight.detach()[:size]
    squares = (rows if rows.dtype == torch.float64 else rows.float()).square().sum(dim=0)
    if group.size() > 1:
        dist.all_reduce(squares, group=group)
    return squares.sqrt() + 1e-7
