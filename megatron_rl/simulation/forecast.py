"""This module says in numbers what a run would take: it sums up the steps of a simulated cluster."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rl.c3po.packing import cost_model
from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.schema import RlConfig
from megatron_rl.families import Architecture
from megatron_rl.simulation.cluster import Cluster, Step
from megatron_rl.simulation.rates import Rates
from megatron_rl.simulation.workload import Workload

# The first steps know nothing of lengths yet, and have nothing unfinished.
SETTLING_STEPS = 5
PARTS = ("rollout", "train", "sync", "switch", "host", "other")


def forecast(
    config: RlConfig,
    architecture: Architecture,
    cluster: ClusterSection,
    rates: Rates,
    workload: Workload,
    num_steps: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the `summary` of `num_steps` steps after the settling ones. ValueError for what cannot be simulated."""
    config.parallel.layout(cluster.training_ranks).check(architecture)
    lengths = workload.draw(config.rollout.samples_per_prompt, seed)
    simulated = Cluster(config, cluster, cost_model(architecture), rates, lengths.take, workload.prompt_tokens)
    simulated.run(SETTLING_STEPS)
    return summary(simulated.run(num_steps), cluster)


def summary(steps: Sequence[Step], cluster: ClusterSection) -> dict[str, Any]:
    """Return means over the steps; "variation" is the standard deviation over the mean.

    tokens_per_second: tokens that carry loss, by the seconds of the whole step. generated_tokens_per_second: the same
    for all that were sampled. waves: None with partial rollouts. host: seconds by part. idle: shares of all GPU-seconds
    by cause, see `Cluster`; busy is the rest.
    """
    seconds = np.array([step.seconds for step in steps])
    trained = np.array([step.num_loss_tokens for step in steps])
    generated = np.array([step.num_generated_tokens for step in steps])
    num_gpus = cluster.nodes * cluster.gpus_per_node
    idle = {cause: float(np.mean([step.idle[cause] for step in steps])) for cause in steps[0].idle}
    waves = [len(step.waves) for step in steps if step.waves]
    return {
        "num_gpus": num_gpus,
        "num_steps": len(steps),
        "step_seconds": _spread(seconds),
        **{f"{part}_seconds": _spread([getattr(step, f"{part}_seconds") for step in steps]) for part in PARTS},
        "num_loss_tokens": _spread(trained),
        "num_generated_tokens": _spread(generated),
        "num_carried": float(np.mean([step.num_carried for step in steps])),
        "host": {part: float(np.mean([step.host[part] for step in steps])) for part in steps[0].host},
        "waves": float(np.mean(waves)) if waves else None,
        "tokens_per_second": _spread(trained / seconds),
        "generated_tokens_per_second": _spread(generated / seconds),
        "tokens_per_second_per_gpu": float(np.mean(trained / seconds)) / num_gpus,
        "idle": idle,
        "busy": 1.0 - sum(idle.values()),
    }


def _spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    mean = float(np.mean(values))
    return {"mean": mean, "variation": float(np.std(values)) / mean if mean else 0.0}
