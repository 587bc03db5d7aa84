"""This module plans commands that only sample, on one machine: `megatron-rl rollout`, `select` and `evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.schema import CommandConfig, SamplingConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.families import Architecture
from megatron_rl.plan.servers import over_limit, plan_servers, serving_remedy
from megatron_rl.preflight.checks import serving_problems


def plan_serving(
    config: CommandConfig, architecture: Architecture, cluster: ClusterSection, path: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """Plan a command that samples from servers. path, overrides: those of the configuration, as they were given.
    ValueError for more than one node."""
    assert isinstance(config, SamplingConfig | SelectConfig | EvaluateConfig)
    if cluster.nodes > 1:
        raise ValueError(f"this command runs on one machine, got --nodes {cluster.nodes}; ask for 1")
    model = config.model if isinstance(config, EvaluateConfig) else config.serving
    found = list(serving_problems(config.rollout, model, architecture))
    parts, servers, against = plan_servers(config.rollout, model.dtype, architecture, cluster, updates=False)
    memory = {"serving_gpu" if servers["gpus_each"] else "host": parts | {"total": sum(parts.values())}}
    found += against + over_limit(memory, cluster, {"serving_gpu": serving_remedy(config.rollout)})
    return {
        "responses": _responses(config),
        "servers": servers,
        "memory": memory,
        "launch": [_command(config, path, overrides)],
        "problems": found,
    }


def plan_teacher(config: SamplingConfig, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Plan `megatron-rl rollout` with an endpoint that answers: nothing is served here."""
    return {"responses": _responses(config), "launch": [_command(config, path, overrides)], "problems": []}


def _command(config: CommandConfig, path: Path, overrides: Sequence[str]) -> str:
    options = "".join(f" --set '{override}'" for override in overrides)
    if isinstance(config, EvaluateConfig):
        return f"megatron-rl evaluate {path} --output runs/evaluation{options}"
    return f"megatron-rl {'select' if isinstance(config, SelectConfig) else 'rollout'} {path}{options}"


def _responses(config: SamplingConfig | SelectConfig | EvaluateConfig) -> dict[str, Any]:
    if isinstance(config, EvaluateConfig):
        return _of_benchmarks(config)
    if isinstance(config, SelectConfig):
        prompts, samples = config.prompts, config.rollout.samples_per_prompt
        return {"prompts": prompts, "samples": samples, "total": prompts * samples, "of": "each candidate"}
    prompts, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    return {"prompts": prompts, "samples": samples, "total": prompts * samples}


def _of_benchmarks(config: EvaluateConfig) -> dict[str, Any]:
    """Count the prompts and responses of each benchmark. prompts: None where the data are not here yet and nothing says
    how many are taken."""
    found = {}
    for name, section in config.benchmarks.items():
        prompts = section.prompts
        if section.path.is_file():
            rows = sum(1 for row in section.path.read_bytes().splitlines() if row.strip())
            prompts = min(prompts or rows, rows)
        found[name] = {"prompts": prompts, "samples": section.samples, "total": prompts and prompts * section.samples}
    return {"benchmarks": found, "total": sum(one["total"] or 0 for one in found.values())}
