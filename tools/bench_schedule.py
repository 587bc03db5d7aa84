"""Compare the cost of planned micro-batches with a proven lower bound, on recorded response lengths.

    python tools/bench_schedule.py LENGTHS [--seeds 20]

LENGTHS has one length per line. Each is capped at 32,768; every seed shuffles them all by `random.Random(seed)` and
takes the first N. The cost of a sample is the forward FLOPs of Ling-lite, that of a plan the sum over micro-batches of
the maximum over ranks. Prints one JSON object: per case and planner the cost over `packing.lower_bound` and over the
ideal (all cost divided evenly by the ranks), CPU seconds of planning, and micro-batches per rank. Planning is one
thread, and CPU time does not count what other processes take. `longest_first` is the reference: one pass over the
fewest bins, without rows in view.
"""

import argparse
import heapq
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.c3po.packing import CostModel, MicroBatches, barrier_cost, lower_bound, pack_micro_batches

ROOT = Path(__file__).resolve().parent.parent
COST = CostModel(linear=2 * 2.494e9, quadratic=2 * 28 * 2048)
TOKEN_CAP = 32_768
# (samples, data-parallel ranks)
CASES = ((4096, 8), (8192, 256))


def longest_first(lengths: Sequence[int], num_ranks: int, token_cap: int, cost: CostModel) -> MicroBatches:
    """Put each sequence, longest first, into the cheapest bin with room; bins of like cost share a micro-batch."""
    count = max(1, -(-sum(lengths) // (token_cap * num_ranks)))
    while True:
        heap: list[tuple[float, int, int, tuple[int, ...]]] = [(0.0, b, 0, ()) for b in range(count * num_ranks)]
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            full = []
            while heap and heap[0][2] + lengths[i] > token_cap:
                full.append(heapq.heappop(heap))
            if not heap:
                break
            load, b, tokens, members = heap[0]
            heapq.heapreplace(heap, (load + cost(lengths[i]), b, tokens + lengths[i], (*members, i)))
            for entry in full:
                heapq.heappush(heap, entry)
        else:
            bins = [members for *_, members in sorted(heap, reverse=True)]
            return tuple(tuple(bins[rank::num_ranks]) for rank in range(num_ranks))
        count += 1


PLANNERS: dict[str, Callable[[Sequence[int], int, int, CostModel], MicroBatches]] = {
    "megatron_rl": pack_micro_batches,
    "longest_first": longest_first,
}


def check(plan: MicroBatches, lengths: Sequence[int]) -> None:
    placed = sorted(i for rank in plan for micro_batch in rank for i in micro_batch)
    assert placed == list(range(len(lengths))), "not every sequence is placed once"
    assert len({len(rank) for rank in plan}) == 1, "the ranks have different numbers of micro-batches"
    assert all(sum(lengths[i] for i in micro_batch) <= TOKEN_CAP for rank in plan for micro_batch in rank), "over cap"


def bench(recorded: Sequence[int], num_samples: int, num_ranks: int, num_seeds: int) -> dict[str, Any]:
    bound_over_ideal: list[float] = []
    measured: dict[str, dict[str, list[float]]] = {
        name: {"over_bound": [], "over_ideal": [], "planning_cpu_seconds": [], "micro_batches_per_rank": []}
        for name in PLANNERS
    }
    for seed in range(num_seeds):
        lengths = list(recorded)
        random.Random(seed).shuffle(lengths)
        del lengths[num_samples:]
        bound = lower_bound(lengths, num_ranks, TOKEN_CAP, COST)
        ideal = sum(map(COST, lengths)) / num_ranks
        bound_over_ideal.append(bound / ideal)
        for name, planner in PLANNERS.items():
            started = time.process_time()
            plan = planner(lengths, num_ranks, TOKEN_CAP, COST)
            seconds = time.process_time() - started
            check(plan, lengths)
            reached = barrier_cost(plan, lengths, COST)
            measured[name]["over_bound"].append(reached / bound)
            measured[name]["over_ideal"].append(reached / ideal)
            measured[name]["planning_cpu_seconds"].append(seconds)
            measured[name]["micro_batches_per_rank"].append(len(plan[0]))
    return {
        "num_samples": num_samples,
        "num_ranks": num_ranks,
        "bound_over_ideal": summary(bound_over_ideal),
        "planners": {
            name: {key: summary(values) for key, values in columns.items()} for name, columns in measured.items()
        },
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(statistics.mean(values), 5), "max": round(max(values), 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=Path, metavar="LENGTHS", help="a file with one response length per line")
    parser.add_argument("--seeds", type=int, default=20, help="number of shuffles (default: 20)")
    arguments = parser.parse_args()
    if not arguments.lengths.is_file():
        parser.error(f"{arguments.lengths} does not exist; give a file with one response length per line")
    recorded = [min(int(line), TOKEN_CAP) for line in arguments.lengths.read_text(encoding="utf-8").split()]
    needed = max(num_samples for num_samples, _ in CASES)
    if len(recorded) < needed:
        parser.error(f"{arguments.lengths} has {len(recorded)} lengths; {needed} are needed")
    cases = [bench(recorded, num_samples, num_ranks, arguments.seeds) for num_samples, num_ranks in CASES]
    result = {"lengths": str(arguments.lengths), "token_cap": TOKEN_CAP, "seeds": arguments.seeds, "cases": cases}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
