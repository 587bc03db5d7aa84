"""Rates out of what a real run took: its metrics.jsonl, and the lengths in its rollouts/.

The run is simulated with the lengths that it had, which gives every phase the waves and every step the micro-batches that
it had; what each of these took is then a matter of least squares.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from megatron_rl.c3po.packing import CostModel
from megatron_rl.config.schema import ClusterSection, RlConfig
from megatron_rl.simulation.cluster import Cluster, Step
from megatron_rl.simulation.rates import Rates
from megatron_rl.train.metrics import read_metrics

SETTLED = 5  # the first steps warm up the machine
_ROUNDS = 10
_ANY_RATES = Rates(decode=((1, 1.0),), train_flops=1.0)


class Replay:
    """The groups that a run generated, in the order of their prompts. ValueError for a run that lacks rollouts."""

    def __init__(self, run_dir: Path) -> None:
        self.rows = read_metrics(run_dir / "metrics.jsonl")
        if len(self.rows) <= 2 * SETTLED:
            raise ValueError(f"{run_dir} has {len(self.rows)} steps; calibrate with a run of more than {2 * SETTLED}")
        found: dict[int, list[int]] = defaultdict(list)
        prompt_tokens = []
        for row in self.rows:
            path = run_dir / "rollouts" / f"step_{row['step']:06d}.jsonl"
            if not path.is_file():
                raise ValueError(f"{path} is missing; calibrate with a run whose rollouts are all there")
            for sample in map(json.loads, path.read_text().splitlines()):
                if set(sample["policy_versions"]) == {str(row["step"])}:  # others were carried into this step
                    found[sample["position"]].append(sample["num_tokens"])
        self.groups = [np.array(found[position]) for position in sorted(found)]
        self._next = 0

    def take(self, num_groups: int) -> np.ndarray:
        groups = self.groups[self._next : self._next + num_groups]
        if len(groups) < num_groups:
            raise ValueError("the run's groups are not those that its configuration makes it sample; is it whole?")
        self._next += num_groups
        return np.stack(groups)


def calibrate(run_dir: Path, config: RlConfig, cluster: ClusterSection, cost: CostModel, prompt_tokens: int) -> Rates:
    """By least squares without negative terms, over the steps after the first few."""
    replay = Replay(run_dir)
    simulated = Cluster(config, cluster, cost, _ANY_RATES, replay.take, prompt_tokens, num_packed=10**9)
    steps = [step for step, _ in zip(simulated, replay.rows, strict=False)]
    steps, rows = steps[SETTLED:], replay.rows[SETTLED:]
    fixed, per_running, per_response = _rollout_terms(steps, [row["rollout_seconds"] for row in rows])
    passes = 4.0 if config.model.recompute else 3.0
    per_flop, per_micro_batch, per_step = _train_terms(steps, [row["train_seconds"] for row in rows])
    slots = config.rollout.max_running_requests
    ranks = cluster.training_ranks / config.parallel.layout(cluster.training_ranks).data
    known = ("rollout_seconds", "train_seconds", "update_weights_seconds")
    rest = [row["step_seconds"] - sum(row[name] for name in known) for row in rows]
    return Rates(
        decode=tuple((n, n / (fixed + per_running * n)) for n in (1, max(2, slots))),
        response_seconds=per_response,
        train_flops=passes / (per_flop * ranks),
        micro_batch_seconds=per_micro_batch,
        optimizer_seconds=per_step,
        sync_seconds=float(np.mean([row["update_weights_seconds"] for row in rows])),
        step_seconds=max(0.0, float(np.mean(rest))),
    )


def _rollout_terms(steps: Sequence[Step], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Seconds of an iteration, of a response in it, and of a response beside it. A phase waits for the slowest engine
    of each wave, and which that is follows from these numbers, so both are found in turn."""
    terms = np.array([1e-3, 1e-4, 0.0])
    for _ in range(_ROUNDS):
        table = []
        for step in steps:
            total = np.zeros(3)
            for wave in step.waves:
                parts = np.stack([wave.iterations, wave.tokens, wave.responses], 1)
                total += parts[np.argmax(parts @ terms)]
            table.append(total)
        terms, _ = nnls(np.array(table), np.array(seconds))
    return float(terms[0]), float(terms[1]), float(terms[2])


def _train_terms(steps: Sequence[Step], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Seconds of a FLOP of the slowest ranks, of a micro-batch, and of an optimizer step."""
    table = [
        (sum(cost for cost, _ in step.packed), sum(rows for _, rows in step.packed), len(step.packed)) for step in steps
    ]
    scale = np.array([np.mean([row[0] for row in table]) or 1.0, 1.0, 1.0])  # FLOPs are many
    terms, _ = nnls(np.array(table) / scale, np.array(seconds))
    return tuple(float(term) for term in terms / scale)  # type: ignore[return-value]
