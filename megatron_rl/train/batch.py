"""Sequences to train on, and the tensors of one micro-batch made of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_rl.model.packing import PackedSequences, pack


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """One sequence and its loss tokens.

    token_ids: int32 [n].
    loss_positions: int32 [m], positions (at least 1) of the tokens that carry loss.
    weight: multiplies every loss token.
    advantage: of the whole response; unused by cross-entropy.
    old_logprobs: float32 [m], of the behaviour policy; NaN where the current weights are the behaviour policy.
    rollout_logprobs: float32 [m], as the server reported them; NaN where there are none.
    """

    token_ids: np.ndarray
    loss_positions: np.ndarray
    weight: float
    advantage: float
    old_logprobs: np.ndarray
    rollout_logprobs: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Legend: T packed tokens, M loss tokens. `loss_index` points at the position before each loss token."""

    token_ids: Tensor  # int64 [1, T]
    packed: PackedSequences
    padding_mask: Tensor  # bool [1, T], True at padding
    loss_index: Tensor  # int64 [M]
    targets: Tensor  # int64 [M]
    weights: Tensor  # [M]
    advantages: Tensor  # [M]
    old_logprobs: Tensor  # [M]
    rollout_logprobs: Tensor  # [M]


def make_micro_batch(
    sequences: Sequence[TrainSequence],
    *,
    multiple_of: int,
    head_dim: int,
    rope_theta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> MicroBatch:
    """Pack sequences; padding up to `multiple_of` tokens (sequence parallelism) is a sequence of its own.

    No sequences at all give a micro-batch of padding without loss: a rank that has nothing left still takes part in
    every collective.
    """
    lengths = [len(s.token_ids) for s in sequences]
    num_real = sum(lengths)
    num_padding = -num_real % multiple_of if num_real else multiple_of
    if num_padding:
        lengths.append(num_padding)
    token_ids = np.zeros(num_real + num_padding, dtype=np.int64)
    starts = np.cumsum([0, *lengths])
    for start, sequence in zip(starts, sequences, strict=False):
        token_ids[start : start + len(sequence.token_ids)] = sequence.token_ids

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    counts = [len(s.loss_positions) for s in sequences]

    def per_token(arrays: list[np.ndarray], kind: torch.dtype) -> Tensor:
        joined = np.concatenate(arrays) if arrays else np.zeros(0)
        return torch.from_numpy(joined).to(device, kind)

    positions = [start + s.loss_positions for start, s in zip(starts, sequences, strict=False)]
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids)[None].to(device),
        packed=pack(lengths, head_dim, rope_theta, dtype, device),
        # Megatron's load-balancing loss divides by the tokens that are not padding: where there is nothing else, the
        # padding counts as tokens.
        padding_mask=(torch.arange(len(token_ids)) >= (num_real or len(token_ids)))[None].to(device),
        loss_index=per_token([p - 1 for p in positions], torch.int64),
        targets=per_token([token_ids[p] for p in positions], torch.int64),
        weights=per_token([np.full(n, s.weight) for n, s in zip(counts, sequences, strict=True)], wide),
        advantages=per_token([np.full(n, s.advantage) for n, s in zip(counts, sequences, strict=True)], wide),
        old_logprobs=per_token([s.old_logprobs for s in sequences], wide),
        rollout_logprobs=per_token([s.rollout_logprobs for s in sequences], wide),
    )
