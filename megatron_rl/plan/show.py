"""This module is the command: it makes one plan for a file of any kind. It needs neither torch nor a GPU, and of the
model only config.json."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.kinds import kind_of
from megatron_rl.config.load import load_config, read_values
from megatron_rl.config.schema import CommandConfig, RolloutPhase, RunConfig, SamplingConfig
from megatron_rl.plan.serving import plan_serving, plan_teacher
from megatron_rl.plan.shape import shape_of
from megatron_rl.plan.text import as_text
from megatron_rl.plan.training import plan_training


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the plan of a configuration, as text or JSON. Return the exit code: 2 when something does not divide or
    fit."""
    kind = kind_of(read_values(arguments.config, arguments.set))
    config = load_config(kind, arguments.config, arguments.set, without_weights=True)
    assert isinstance(config, CommandConfig)
    cluster = _cluster(config.cluster or ClusterSection(), arguments)
    plan: dict[str, Any] = {"run_dir": str(config.run_dir)} if hasattr(config, "run_dir") else {}
    plan |= {"cluster": cluster.model_dump(mode="json")} | _plan(config, cluster, arguments.config, arguments.set)
    if arguments.suggest:
        _suggest(plan, config, cluster)
    sys.stdout.write(json.dumps(plan, indent=2) + "\n" if arguments.json else as_text(plan))
    for problem in plan["problems"]:
        sys.stderr.write(f"megatron-rl plan: {problem}\n")
    return 2 if plan["problems"] else 0


def _suggest(plan: dict[str, Any], config: CommandConfig, cluster: ClusterSection) -> None:
    """Add the fastest layouts that fit to a plan. The plan's problems become those of the first of them."""
    from megatron_rl.plan.suggest import Search, suggest

    if not isinstance(config, RunConfig):
        raise ValueError("--suggest is for what trains; this file is for another command")
    architecture, _ = shape_of(config)
    search = Search(config, architecture, cluster)
    found = suggest(search)
    plan["suggestions"] = [one.as_dict() for one in found]
    for as_it_is in search.evaluated(config):  # none where it does not fit
        plan["as_it_is"] = as_it_is.as_dict()
    if found:
        plan["problems"] = problems_of(found[0].config, cluster)
    else:
        plan["problems"].append(
            f"no layout fits on {cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory_gb:g} GiB, with "
            "recomputation and the optimizer's states in host memory; take more GPUs, or lower "
            "train.micro_batch_tokens and rollout.max_running_requests"
        )


def problems_of(config: CommandConfig, cluster: ClusterSection) -> list[str]:
    """List what speaks against a configuration on such machines."""
    problems: list[str] = _plan(config, cluster, Path("CONFIG"), ())["problems"]
    return problems


def _plan(config: CommandConfig, cluster: ClusterSection, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Make the plan for the kind of configuration. path, overrides: those of the configuration, as they were given."""
    if isinstance(config, SamplingConfig) and config.teacher is not None:
        return plan_teacher(config, path, overrides)
    assert isinstance(config, RunConfig | RolloutPhase | EvaluateConfig)
    architecture, shape = shape_of(config)
    model = {"parameters": architecture.num_parameters(), "active_parameters": architecture.num_active_parameters()}
    found: dict[str, Any] = {"model": model} | ({"shape": str(shape)} if shape else {})
    if isinstance(config, RunConfig):
        return found | plan_training(config, architecture, cluster, path, overrides)
    return found | plan_serving(config, architecture, cluster, path, overrides)


def _cluster(named: ClusterSection, arguments: argparse.Namespace) -> ClusterSection:
    """Return the cluster of the file with what the options change. ValueError when nothing is left to train on."""
    asked = {name: getattr(arguments, name) for name in ClusterSection.model_fields}
    if asked["nodes"] is not None and asked["serving_nodes"] is None:
        asked["serving_nodes"] = 0  # those of the file are of its own nodes
    values = named.model_dump() | {name: value for name, value in asked.items() if value is not None}
    nodes, gpus, serving = values["nodes"], values["gpus_per_node"], values["serving_nodes"]
    if gpus < 1 or nodes <= serving or serving < 0:
        raise ValueError(f"--nodes {nodes} x --gpus-per-node {gpus} less --serving-nodes {serving} leaves no training")
    return ClusterSection.model_construct(**values)
