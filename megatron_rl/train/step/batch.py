"""Defines the sequences to train on, and makes the tensors of one micro-batch of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_rl.device import send
from megatron_rl.model import zigzag
from megatron_rl.model.packing import PackedSequences, pack
from megatron_rl.rotary import Frequencies
from megatron_rl.train.step.token_traces import TracedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """Holds one sequence and its loss tokens.

    token_ids: int32 [n].
    loss_positions: int32 [m], positions (at least 1) of the tokens that carry loss.
    weight: multiplies every loss token.
    rollout_logprobs: float32 [m], as the server reported them; NaN where there are none.
    num_stale_tokens: of so many first loss tokens the sampler had other weights than the optimizer step starts from.
    routed_experts: uint8 [n - 1, layers, topk], the experts to use at every position but the last, which predicts
        nothing; None leaves them to the routers.
    advantages: float64 [m]; None is 0, for cross-entropy and where log-probs alone are asked for.
    traced_as: the sample (`Plan.traced`) under which the log-probs of its loss tokens are kept; None keeps none.
    traced_from: loss tokens that this sample has in sequences before it.
    """

    token_ids: np.ndarray
    loss_positions: np.ndarray
    weight: float
    rollout_logprobs: np.ndarray
    num_stale_tokens: int
    advantages: np.ndarray | None = None
    routed_experts: np.ndarray | None = None
    traced_as: int | None = None
    traced_from: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Holds what is known of a rank's part of a micro-batch before it is made.

    num_tokens: without padding. num_places: with padding. traced: whether one of its sequences is traced.
    """

    num_tokens: int
    num_places: int
    traced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Holds one context-parallel rank's part of a micro-batch: its tokens, and the loss tokens that they predict.

    Legend: T packed tokens of this rank, M loss tokens, S sequences of the micro-batch.

    fresh: sampled by the weights that the optimizer step starts from. loss_index: the position before each loss token.
    response_of: each loss token's sequence. response_tokens: loss tokens of each whole sequence. old_logprobs,
    ref_logprobs: under the weights that a phase started from and under the reference policy, where the trainer worked
    them out (`Trainer.with_old_logprobs`), else None. traced: those of its loss tokens that are traced; None for none.
    """

    token_ids: Tensor  # int64 [1, T]
    packed: PackedSequences
    padding_mask: Tensor  # bool [1, T], True at padding
    loss_index: Tensor  # int64 [M]
    targets: Tensor  # int64 [M]
    weights: Tensor  # [M]
    advantages: Tensor  # [M]
    rollout_logprobs: Tensor  # [M]
    fresh: Tensor  # bool [M]
    response_of: Tensor  # int64 [M]
    response_tokens: Tensor  # [S]
    old_logprobs: Tensor | None = None  # [M]
    ref_logprobs: Tensor | None = None  # [M]
    traced: TracedTokens | None = None

    @property
    def size(self) -> Size:
        """The size of this micro-batch. The device is asked, and waited for."""
        num_tokens = int((~self.padding_mask).sum())
        return Size(num_tokens=num_tokens, num_places=self.token_ids.numel(), traced=self.traced is not None)


def make_micro_batch(
    sequences: Sequence[TrainSequence],
    *,
    multiple_of: int,
    rotary: Frequencies,
    dtype: torch.dtype,
    device: torch.device,
    context_rank: int = 0,
    context_size: int = 1,
) -> MicroBatch:
    """Pack a context-parallel rank's part of each sequence (model/zigzag.py).

    A rank has the loss tokens whose predicting position it holds, sequence by sequence in the order of
    `loss_positions`. Padding up to a `multiple_of` tokens on each rank (sequence parallelism) is a sequence of its own.

    No sequences at all give a micro-batch of padding without loss: a rank that has nothing left still takes part in
    every collective.

    Routed experts go into `packed`; padding and last tokens have none.
    """
    part = _part_of(sequences, multiple_of, context_rank, context_size)
    mine = part.mine
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    counts = [len(s.loss_positions) for s in sequences]

    def per_token(arrays: Iterable[np.ndarray], kind: torch.dtype) -> Tensor:
        """Return this rank's part of each sequence's values by loss token, end to end."""
        parts = [array[kept] for array, kept in zip(arrays, mine, strict=True)]
        return send(torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0)).to(kind), device)

    packed = pack(part.lengths, rotary, dtype, device, context_rank, context_size)
    packed.routed_experts = None if part.routed is None else send(torch.from_numpy(part.routed), device)
    return MicroBatch(
        token_ids=send(torch.from_numpy(part.token_ids)[None], device),
        packed=packed,
        padding_mask=send(torch.from_numpy(part.padding)[None], device),
        loss_index=send(torch.from_numpy(part.loss_index), device),
        targets=per_token((s.token_ids[s.loss_positions] for s in sequences), torch.int64),
        weights=per_token((np.full(n, s.weight) for n, s in zip(counts, sequences, strict=True)), wide),
        advantages=per_token((_advantages(s) for s in sequences), wide),
        rollout_logprobs=per_token((s.rollout_logprobs for s in sequences), wide),
        fresh=per_token(
            (np.arange(n) >= s.num_stale_tokens for n, s in zip(counts, sequences, strict=True)), torch.bool
        ),
        response_of=per_token((np.full(n, i) for i, n in enumerate(counts)), torch.int64),
        response_tokens=send(torch.tensor(counts, dtype=wide), device),
        traced=_traced(sequences, mine, device),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Holds a context-parallel rank's tokens of a micro-batch, end to end.

    lengths: of the sequences and their padding, over all ranks. token_ids, padding: [num_tokens]. routed: experts of
    each token. loss_index: positions that predict a loss token. mine: of each sequence, which loss tokens are here.
    """

    lengths: list[int]
    token_ids: np.ndarray
    padding: np.ndarray
    routed: np.ndarray | None
    loss_index: np.ndarray
    mine: list[np.ndarray]


def _part_of(sequences: Sequence[TrainSequence], multiple_of: int, context_rank: int, context_size: int) -> _Part:
    lengths = [zigzag.padded_length(len(s.token_ids), context_size) for s in sequences]
    if num_padding := _padding_tokens(sum(lengths), multiple_of, context_size):
        lengths.append(num_padding)
    starts = np.cumsum([0, *lengths]) // context_size
    num_tokens = int(starts[-1])
    token_ids, padding = np.zeros(num_tokens, np.int64), np.ones(num_tokens, bool)
    routed = _no_routed_experts(sequences, num_tokens)
    index, mine = [], []
    for start, length, sequence in zip(starts, lengths, sequences, strict=False):
        held = zigzag.held_positions(length, context_size)[context_rank]
        real = held < len(sequence.token_ids)
        here = start + np.flatnonzero(real)
        token_ids[here], padding[here] = sequence.token_ids[held[real]], False
        if routed is not None and sequence.routed_experts is not None:
            known = held < len(sequence.routed_experts)
            routed[start + np.flatnonzero(known)] = sequence.routed_experts[held[known]]
        where = np.full(length, -1)
        where[held] = start + np.arange(len(held))
        predicting = where[sequence.loss_positions - 1]
        mine.append(predicting >= 0)
        index.append(predicting[mine[-1]])
    return _Part(
        lengths=lengths,
        token_ids=token_ids,
        padding=padding,
        routed=routed,
        loss_index=np.concatenate([np.zeros(0, np.int64), *index]),
        mine=mine,
    )


def size_of(sequences: Sequence[TrainSequence], multiple_of: int, context_rank: int, context_size: int) -> Size:
    """Return the size of the micro-batch that `make_micro_batch` makes of these sequences."""
    lengths = [zigzag.padded_length(len(s.token_ids), context_size) for s in sequences]
    held = (zigzag.held_positions(length, context_size)[context_rank] for length in lengths)
    return Size(
        num_tokens=sum(int((own < len(s.token_ids)).sum()) for own, s in zip(held, sequences, strict=True)),
        num_places=(sum(lengths) + _padding_tokens(sum(lengths), multiple_of, context_size)) // context_size,
        traced=any(s.traced_as is not None for s in sequences),
    )


def _traced(
    sequences: Sequence[TrainSequence], mine: Sequence[np.ndarray], device: torch.device
) -> TracedTokens | None:
    """Return the traced loss tokens of a micro-batch on this rank; None without any. mine: bool [m] of each sequence,
    which of its loss tokens this rank has."""
    held = [np.flatnonzero(kept) for kept in mine]
    first = np.cumsum([0, *map(len, held)])
    traced = [
        (s.traced_as, first[i], held[i] + s.traced_from) for i, s in enumerate(sequences) if s.traced_as is not None
    ]
    if not any(len(tokens) for *_, tokens in traced):
        return None
    return TracedTokens(
        index=send(torch.from_numpy(np.concatenate([at + np.arange(len(t)) for _, at, t in traced])), device),
        samples=np.concatenate([np.full(len(tokens), sample) for sample, _, tokens in traced]),
        tokens=np.concatenate([tokens for *_, tokens in traced]),
    )


def _advantages(sequence: TrainSequence) -> np.ndarray:
    """Return the advantages of a sequence's loss tokens, float64 [m]."""
    return np.zeros(len(sequence.loss_positions)) if sequence.advantages is None else sequence.advantages


def _no_routed_experts(sequences: Sequence[TrainSequence], num_tokens: int) -> np.ndarray | None:
    """Return int16 [num_tokens, layers, topk] of -1; None when no sequence has routed experts."""
    given = [s.routed_experts for s in sequences if s.routed_experts is not None]
    return np.full((num_tokens, *given[0].shape[1:]), -1, np.int16) if given else None


def _padding_tokens(num_tokens: int, multiple_of: int, context_size: int) -> int:
    """Return the length of the shortest padded sequence that makes each rank's tokens a positive multiple of
    `multiple_of`."""
    unit = zigzag.padded_length(1, context_size)
    length = 0 if num_tokens else unit
    while (num_tokens + length) // context_size % multiple_of:
        length += unit
    return length
