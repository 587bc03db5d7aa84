"""Tests the arithmetic of context parallelism: which rank holds which positions and loss tokens."""

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro_batches import micro_batch

from megatron_rl.families import Rotary
from megatron_rl.model import zigzag
from megatron_rl.model.packing import pack
from megatron_rl.rotary import frequencies
from megatron_rl.train.step.batch import TrainSequence, size_of

STALE_BEFORE = 9  # tokens at these positions were sampled by older weights
sizes = st.integers(1, 6)


@given(sizes, st.integers(1, 200))
def test_merge_is_the_inverse_of_taking_each_ranks_positions(size: int, length: int) -> None:
    padded = zigzag.padded_length(length, size)
    assert length <= padded < length + 2 * size
    whole = np.random.default_rng(length).random(padded)
    parts = [whole[held] for held in zigzag.held_positions(padded, size)]
    assert {len(part) for part in parts} == {padded // size}
    assert np.array_equal(zigzag.merge(parts), whole)


@given(sizes, st.integers(1, 20))
def test_every_rank_has_equally_much_causal_attention_to_compute(size: int, chunk: int) -> None:
    keys_seen = {int((held + 1).sum()) for held in zigzag.held_positions(2 * size * chunk, size)}
    assert len(keys_seen) == 1


def test_a_rank_holds_an_early_and_a_late_chunk() -> None:
    assert zigzag.held_positions(8, 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]


@given(sizes, st.integers(1, 4), st.lists(st.integers(2, 40), max_size=5), st.randoms(use_true_random=False))
def test_the_ranks_of_a_context_parallel_group_have_every_token_and_loss_token_once(
    size: int, multiple_of: int, lengths: list[int], chance: random.Random
) -> None:
    # Every value below tells the sequence and the position that it belongs to.
    sequences = []
    for number, length in enumerate(lengths):
        positions = np.array(sorted(chance.sample(range(1, length), chance.randint(0, length - 1))), np.int32)
        name = 1000.0 * (number + 1) + positions
        sequences.append(
            TrainSequence(
                token_ids=(1000 * (number + 1) + np.arange(length)).astype(np.int32),
                loss_positions=positions,
                weight=number + 1.0,
                advantages=-name,
                rollout_logprobs=name.astype(np.float32),
                num_stale_tokens=int((positions < STALE_BEFORE).sum()),
            )
        )
    tokens, loss_tokens = [], []
    for rank in range(size):
        batch = micro_batch(sequences, multiple_of, rank, size)
        ids, padding = batch.token_ids[0], batch.padding_mask[0]
        assert len(ids) > 0
        assert len(ids) % multiple_of == 0
        assert batch.size == size_of(sequences, multiple_of, rank, size)
        assert (batch.size.num_tokens, batch.size.num_places) == (int((~padding).sum()), len(ids))
        assert batch.packed.positions is not None
        assert torch.equal(ids[~padding] % 1000, batch.packed.positions[~padding])
        assert torch.equal(ids[batch.loss_index] + 1, batch.targets)
        assert torch.equal(batch.rollout_logprobs, batch.targets.float())
        assert torch.equal(batch.response_of, batch.targets // 1000 - 1)
        assert torch.equal(batch.fresh, batch.targets % 1000 >= STALE_BEFORE)
        assert batch.response_tokens.tolist() == [len(s.loss_positions) for s in sequences]
        assert torch.equal(batch.weights, batch.targets.float().div(1000, rounding_mode="floor"))
        assert torch.equal(batch.advantages, -batch.targets.float())
        tokens += ids[~padding].tolist()
        loss_tokens += batch.targets.tolist()
    assert sorted(tokens) == [int(i) for s in sequences for i in s.token_ids]
    assert sorted(loss_tokens) == [int(i) for s in sequences for i in s.token_ids[s.loss_positions]]


def test_attention_rows_hold_exactly_what_a_token_may_see() -> None:
    lengths, size = [8, 12, 8], 2
    packed = [
        pack(lengths, frequencies(Rotary(), 8), torch.float32, torch.device("cpu"), rank, size) for rank in range(size)
    ]
    held = [np.concatenate([zigzag.held_positions(n, size)[rank] for n in lengths]) for rank in range(size)]
    number = np.concatenate([[i] * (n // size) for i, n in enumerate(lengths)])
    joined = [(int(i), int(p)) for rank in range(size) for i, p in zip(number, held[rank], strict=True)]
    for rank in range(size):
        seen = {}
        for bucket in packed[rank].buckets:
            for queries, keys in zip(bucket.queries.tolist(), bucket.keys.tolist(), strict=True):
                for place, query in enumerate(queries):
                    seen[query] = [joined[k] for k in keys[: len(keys) - len(queries) + place + 1]]
        expected = {t: [(int(number[t]), p) for p in range(held[rank][t] + 1)] for t in range(len(number))}
        assert seen == expected
