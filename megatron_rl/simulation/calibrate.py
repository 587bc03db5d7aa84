"""This module computes rates from what a real run took: its metrics.jsonl, and the lengths in its rollouts/.

The run is simulated with the lengths that it had, which gives every phase the waves and every step the micro-batches
that it had; what each of these took then follows by least squares.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from megatron_rl.c3po.advantage import all_equal
from megatron_rl.c3po.packing import CostModel
from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.schema import RlConfig
from megatron_rl.parsing import bounded_lines, parse_json
from megatron_rl.simulation.cluster import Cluster, Step, forward_passes
from megatron_rl.simulation.rates import Rates
from megatron_rl.simulation.workload import Groups
from megatron_rl.train.run.metrics import read_metrics

SETTLED = 5  # the first steps warm up the machine
_ROUNDS = 10
_ANY_RATES = Rates(decode=((1, 1.0),), train_flops=1.0)


class Replay:
    """Holds the groups that a run generated, in the order of their prompts. ValueError for a run that lacks rollouts,
    or that left responses unfinished."""

    def __init__(self, run_dir: Path, config: RlConfig) -> None:
        if config.rollout.partial:
            raise ValueError(f"{run_dir} has partial rollouts, whose lengths are cut off; calibrate with another run")
        self.rows = read_metrics(run_dir / "metrics.jsonl")
        if not self.rows:
            raise ValueError(f"{run_dir} has no metrics.jsonl with steps; is it the directory of a run of train?")
        lengths: dict[int, list[int]] = defaultdict(list)
        rewards: dict[int, list[float]] = defaultdict(list)
        for row in self.rows:
            path = run_dir / "rollouts" / f"step_{row['step']:06d}.jsonl"
            if not path.is_file():
                raise ValueError(f"{path} is missing; calibrate with a run whose rollouts are all there")
            with path.open("rb") as file:
                for sample in map(parse_json, bounded_lines(file, path)):
                    if "segments" in sample:
                        raise ValueError(f"{path} has trajectories of agents; calibrate with a run of single turns")
                    if set(sample["policy_versions"]) == {str(row["step"])}:  # others were carried into this step
                        lengths[sample["position"]].append(sample["num_tokens"])
                        rewards[sample["position"]].append(sample["reward"])
        self.groups = [np.array(lengths[position]) for position in sorted(lengths)]
        self._kept = np.array([not all_equal(rewards[position]) for position in sorted(lengths)])
        self._next = 0

    @property
    def prompt_tokens(self) -> float:
        """The mean prompt length over the samples that were trained."""
        tokens = sum(row["num_forward_tokens"] - sum(row["num_loss_tokens_by_step"]) for row in self.rows)
        return tokens / sum(row["num_trained_samples"] for row in self.rows)

    @property
    def uniform_share(self) -> float:
        """The share of groups whose rewards are all equal."""
        return 1.0 - float(self._kept.mean())

    def take(self, num_groups: int) -> Groups:
        part = slice(self._next, self._next + num_groups)
        groups, kept = self.groups[part], self._kept[part]
        if len(groups) < num_groups:
            raise ValueError(
                "the run has fewer groups than its configuration makes it sample; calibrate with one that is whole and "
                "of this version"
            )
        self._next += num_groups
        return Groups(np.stack(groups), kept)


def replay(run_dir: Path, config: RlConfig, cluster: ClusterSection, cost: CostModel, rates: Rates) -> list[Step]:
    """Return the steps that a run would have taken at these rates, with the lengths that it had."""
    had = Replay(run_dir, config)
    simulated = Cluster(config, cluster, cost, rates, had.take, had.prompt_tokens, num_packed=None)
    return simulated.run(len(had.rows))


def calibrate(run_dir: Path, config: RlConfig, cluster: ClusterSection, cost: CostModel) -> Rates:
    """Fit the rates by least squares without negative terms, over the steps after the first few."""
    steps = replay(run_dir, config, cluster, cost, _ANY_RATES)[SETTLED:]
    rows = read_metrics(run_dir / "metrics.jsonl")[SETTLED:]
    if len(rows) <= SETTLED:
        raise ValueError(f"{run_dir} has {len(rows) + SETTLED} steps; calibrate with a run of more than {2 * SETTLED}")
    fixed, per_running, per_response = _rollout_terms(steps, [row["rollout_seconds"] for row in rows])
    per_flop, per_micro_batch, per_step = _train_terms(steps, [row["train_seconds"] for row in rows])
    layout = config.parallel.layout(cluster.training_ranks)
    slots = max(2, config.rollout.max_running_requests)
    # Least squares may find a cost of zero, which this run does not measure; a rate must be finite all the same.
    per_flop, fixed = max(per_flop, 1e-20), max(fixed, 1e-9)
    known = ("rollout_seconds", "train_seconds", "update_weights_seconds")
    rest = np.mean([row["step_seconds"] - sum(row[name] for name in known) for row in rows])
    return Rates(
        decode=tuple((n, _rounded(n / (fixed + per_running * n))) for n in (1, slots)),
        engine_gpus=config.rollout.sglang_gpus if config.rollout.engine == "sglang" else 0,
        response_seconds=_rounded(per_response),
        train_flops=_rounded(forward_passes(config) / (per_flop * layout.world_size / layout.data)),
        micro_batch_seconds=_rounded(per_micro_batch),
        optimizer_seconds=_rounded(per_step),
        sync_seconds=_rounded(np.mean([row["update_weights_seconds"] for row in rows])),
        step_seconds=_rounded(max(0.0, rest)),
    )


def _rounded(rate: float | np.floating) -> float:
    """Round a rate to as many digits as are worth reading."""
    return float(f"{rate:.4g}")


def _rollout_terms(steps: Sequence[Step], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Fit the seconds of an iteration, of a response in it, and of a response beside it. A phase waits for the slowest
    engine of each wave. Which one that is follows from these numbers, so both are found in turn."""
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
    """Fit the seconds of a FLOP of the slowest ranks, of a micro-batch, and of an optimizer step."""
    table = [
        (sum(one.barrier_flops for one in step.trained), sum(one.num_rows for one in step.trained), len(step.trained))
        for step in steps
    ]
    scale = np.array([np.mean([row[0] for row in table]) or 1.0, 1.0, 1.0])  # FLOPs are many
    terms, _ = nnls(np.array(table) / scale, np.array(seconds))
    return tuple(float(term) for term in terms / scale)  # type: ignore[return-value]
