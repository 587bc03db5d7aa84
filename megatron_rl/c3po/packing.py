"""This module packs the micro-batches of a synchronous step. Every data-parallel rank runs the same number, none above
the token cap.

With expert parallelism across data-parallel ranks each micro-batch is a barrier, so a step costs the sum over
micro-batches of the maximum over ranks. A *row* is what all ranks run between two barriers: one bin of sequences per
rank. Rows may cost differently as long as the bins of each are alike, and a row in itself costs nothing.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_rl.families import Architecture

MicroBatches = tuple[tuple[tuple[int, ...], ...], ...]
Rows = list[list[tuple[int, ...]]]

# A row's target as a share of the cost it could hold at most. At 1 every bin would have to reach the target and the
# token cap at once, which indivisible sequences do not; the lower the share, the evener the bins and the more rows.
TARGET_SHARES = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9)
# Plans whose costs differ by less are equal: the one with fewer micro-batches is taken.
NEAR_EQUAL = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Computes the forward cost of a sequence of n tokens: linear * n + quadratic * n^2, in multiply-adds times two."""

    linear: float
    quadratic: float

    def __call__(self, num_tokens: int) -> float:
        return self.linear * num_tokens + self.quadratic * num_tokens * num_tokens


def cost_model(model: Architecture) -> CostModel:
    """Return the cost model of an architecture: 2 FLOPs per active weight and token; causal attention, 2 * layers *
    heads * head_dim * n^2."""
    inactive = (model.num_experts - model.num_experts_per_tok) * 3 * model.hidden_size * model.moe_intermediate_size
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    active = model.num_parameters() - model.num_moe_layers * inactive - embedding
    width = model.num_attention_heads * model.head_dim
    return CostModel(linear=2.0 * active, quadratic=2.0 * model.num_hidden_layers * width)


def pack_micro_batches(
    lengths: Sequence[int], num_ranks: int, token_cap: int, cost: CostModel, *, multiple_of: int = 1
) -> MicroBatches:
    """Pack sequences into micro-batches. `result[rank][i]` has the positions in `lengths` that data-parallel rank
    `rank` runs in its i-th micro-batch.

    Several plans are made and the cheapest is taken, or one of fewer rows that costs as good as the same. One plan goes
    longest first over all rows at once, which is best when sequences are few. The others go row by row, each up to a
    target cost, so that what a long sequence forces its row to cost is used by all bins of that row.

    The number of micro-batches per rank is a multiple of `multiple_of` (interleaved pipeline schedules need one of the
    pipeline size). What is missing is filled up with empty ones, and with fewer sequences than ranks some are empty
    too: every rank takes part in every row. ValueError when one sequence alone is over the cap.
    """
    for length in lengths:
        if length > token_cap:
            raise ValueError(
                f"a sequence of {length} tokens is over the micro-batch cap of {token_cap}; "
                "raise train.micro_batch_tokens or lower rollout.max_response_tokens"
            )
    pool = _Pool.of(lengths, cost)
    plans = [_all_rows_at_once(pool, num_ranks, token_cap)]
    plans += [_row_by_row(pool.copy(), num_ranks, token_cap, share) for share in TARGET_SHARES]
    for rows in plans:
        num_rows = max(1, -(-len(rows) // multiple_of)) * multiple_of
        rows.extend([()] * num_ranks for _ in range(num_rows - len(rows)))
    costs = [barrier_cost(tuple(zip(*rows, strict=True)), lengths, cost) for rows in plans]
    limit = min(costs) * (1.0 + NEAR_EQUAL)
    _, _, chosen = min((len(p), c, p) for p, c in zip(plans, costs, strict=True) if c <= limit)
    return _assign(chosen, num_ranks, lengths, cost)


@dataclass(slots=True, kw_only=True)
class _Pool:
    """Holds the sequences that are not yet placed, shortest first: three parallel lists, and the sum of the second."""

    positions: list[int]
    tokens: list[int]
    costs: list[float]
    num_tokens: int

    @classmethod
    def of(cls, lengths: Sequence[int], cost: CostModel) -> "_Pool":
        positions = sorted(range(len(lengths)), key=lambda i: (lengths[i], -i))
        tokens = [int(lengths[i]) for i in positions]
        return cls(positions=positions, tokens=tokens, costs=[cost(n) for n in tokens], num_tokens=sum(tokens))

    def copy(self) -> "_Pool":
        return replace(self, positions=self.positions[:], tokens=self.tokens[:], costs=self.costs[:])

    def take_longest(self, max_tokens: int, max_cost: float) -> tuple[int, int, float] | None:
        """Take the longest sequence within both limits out of the pool. Return its position, tokens and cost."""
        at = min(bisect_right(self.tokens, max_tokens), bisect_right(self.costs, max_cost)) - 1
        if at < 0:
            return None
        self.num_tokens -= self.tokens[at]
        return self.positions.pop(at), self.tokens.pop(at), self.costs.pop(at)

    def highest_cost(self, max_tokens: int) -> float:
        """Return the highest cost that `max_tokens` tokens can have: that of the longest sequences, the last one in
        part."""
        total = 0.0
        for tokens, cost in zip(reversed(self.tokens), reversed(self.costs), strict=True):
            if tokens >= max_tokens:
                return total + cost * max_tokens / tokens
            total += cost
            max_tokens -= tokens
        return total


def _all_rows_at_once(pool: _Pool, num_ranks: int, token_cap: int) -> Rows:
    """Put each sequence, longest first, into the cheapest bin that still has room. Use the fewest rows that this can
    fill; bins of like cost then share a row."""
    forced = _forced_rows(pool.tokens[::-1], num_ranks, token_cap)
    count = max(-(-pool.num_tokens // (token_cap * num_ranks)), int(forced.max(initial=0)))
    while (bins := _longest_first(pool, count * num_ranks, token_cap)) is None:
        count += 1
    return [bins[row * num_ranks : (row + 1) * num_ranks] for row in range(count)]


def _longest_first(pool: _Pool, num_bins: int, token_cap: int) -> list[tuple[int, ...]] | None:
    """Fill bins with the longest sequences first. Return them costliest first, or None when a sequence found no
    room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, b, token_cap) for b in range(num_bins)]
    for at in reversed(range(len(pool.positions))):
        tokens = pool.tokens[at]
        full = []
        while heap and heap[0][2] < tokens:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, b, room = heap[0]
        heapq.heapreplace(heap, (load + pool.costs[at], b, room - tokens))
        bins[b].append(pool.positions[at])
        for entry in full:
            heapq.heappush(heap, entry)
    return [tuple(bins[b]) for _, b, _ in sorted(heap, key=lambda entry: -entry[0])]


def _row_by_row(pool: _Pool, num_ranks: int, token_cap: int, share: float) -> Rows:
    """Empty the pool row by row. The target cost of a row is about the highest that all its bins can reach. The first
    rest that fits one row is divided evenly over it. Every row takes at least the longest sequence left, so this
    ends."""
    rows: Rows = []
    while pool.positions:
        if pool.num_tokens <= num_ranks * token_cap:
            rest = pool.copy()
            row = _fill(rest, num_ranks, token_cap, math.inf)
            if not rest.positions:
                return [*rows, row]
        target = share * pool.highest_cost(num_ranks * token_cap) / num_ranks
        rows.append(_fill(pool, num_ranks, token_cap, max(target, pool.costs[-1])))
    return rows


def _fill(pool: _Pool, num_bins: int, token_cap: int, target: float) -> list[tuple[int, ...]]:
    """Fill one row. The cheapest bin takes the longest sequence that keeps it within cap and target, until no bin can
    take one."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, b, token_cap) for b in range(num_bins)]
    while heap:
        load, b, room = heap[0]
        taken = pool.take_longest(room, target - load)
        if taken is None:
            heapq.heappop(heap)
        else:
            position, tokens, cost = taken
            bins[b].append(position)
            heapq.heapreplace(heap, (load + cost, b, room - tokens))
    return [tuple(members) for members in bins]


def _assign(rows: Rows, num_ranks: int, lengths: Sequence[int], cost: CostModel) -> MicroBatches:
    """Assign the bins of each row to ranks, the costliest to the rank with the least cost so far. With barriers this
    makes no difference. Without expert parallelism there are none, and the step takes as long as the rank with the
    most."""
    totals = [0.0] * num_ranks
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    for row in rows:
        loads = [sum(cost(lengths[i]) for i in members) for members in row]
        costliest_first = sorted(range(num_ranks), key=lambda b: -loads[b])
        idlest_first = sorted(range(num_ranks), key=lambda r: totals[r])
        for b, rank in zip(costliest_first, idlest_first, strict=True):
            ranks[rank].append(row[b])
            totals[rank] += loads[b]
    return tuple(tuple(rank) for rank in ranks)


def _forced_rows(longest_first: Sequence[int] | np.ndarray, num_ranks: int, token_cap: int) -> np.ndarray:
    """Return, at [i], how many rows the i + 1 longest sequences occupy at least: ceil((i + 1) / (D * floor(cap /
    x_i)))."""
    tokens = np.asarray(longest_first, dtype=np.int64)
    return np.arange(len(tokens)) // (num_ranks * (token_cap // tokens)) + 1


def barrier_cost(micro_batches: MicroBatches, lengths: Sequence[int], cost: CostModel) -> float:
    """Return the sum over micro-batches of the maximum cost over ranks."""
    return sum(
        max(sum(cost(lengths[i]) for i in rank_bins) for rank_bins in row) for row in zip(*micro_batches, strict=True)
    )


def lower_bound(lengths: Sequence[int], num_ranks: int, token_cap: int, cost: CostModel) -> float:
    """Return a lower bound of `barrier_cost` for every placement under the token cap, with any number of rows.

    Let C be the cost of all sequences, D the number of ranks, M_1 >= M_2 >= ... the costs of the rows of any placement
    (the maximum over their bins), costliest first, and x_1 >= x_2 >= ... the lengths.

    1. Ideal. A row of cost M holds at most D * M, so sum_j M_j >= C / D.
    2. Indivisible sequences. A row with m of the i longest has a bin with ceil(m / D) of them and costs at least that
       often cost(x_i). Summed over rows, sum_j M_j >= ceil(i / D) * cost(x_i) for every i.
    3. Forced rows. A bin holds at most floor(cap / x_i) sequences of length x_i or more, a row D times as many. There
       are at least i of them, so they occupy at least rows_i = ceil(i / (D * floor(cap / x_i))) rows, each of which
       costs cost(x_i) or more. Hence M_j >= t_j := max of cost(x_i) over i with rows_i >= j. (For x_i > cap / 2 this is
       the cost of sequence number (j - 1) * D + 1.)
    4. What forced rows leave over. The j costliest rows cost t_1 + ... + t_j or more. They hold at most j * D * cap
       tokens, and since cost(n) / n grows with n, at most K_j := the cost of the longest sequences that fill as many
       tokens, the last in part. The others hold at least C - K_j and by 1. cost at least (C - K_j) / D. So for every j

           sum_j M_j >= t_1 + ... + t_j + (C - K_j) / D

    The bound is the largest of 1., of 2. over all i, and of 4. over all j with a t_j.
    """
    if not lengths:
        return 0.0
    tokens = np.sort(np.asarray(lengths, dtype=np.int64))[::-1]
    costs = np.array([cost(int(n)) for n in tokens])
    rows = _forced_rows(tokens, num_ranks, token_cap)
    j = np.arange(1, rows.max() + 1)
    # The first sequence that forces j rows is the longest and costliest one to do so.
    forced = np.cumsum(costs[np.searchsorted(np.maximum.accumulate(rows), j)])
    held_tokens, held_cost = np.cumsum([0, *tokens]), np.cumsum([0.0, *costs])
    most_held = np.interp(j * num_ranks * token_cap, held_tokens, held_cost)
    total = held_cost[-1]
    indivisible = (np.arange(len(tokens)) // num_ranks + 1) * costs
    return float(max(total / num_ranks, indivisible.max(), (forced + (total - most_held) / num_ranks).max()))
