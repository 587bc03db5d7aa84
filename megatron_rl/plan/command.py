"""The command: one plan for a file of any kind. Needs neither torch nor a GPU, and of the model only config.json."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_rl.config.bailing import BailingConfig, load_bailing_config, read_bailing_config
from megatron_rl.config.kinds import kind_of
from megatron_rl.config.load import load_config, read_values
from megatron_rl.config.schema import ClusterSection, CommandConfig, RunConfig, ServedModelSection, ServingSection
from megatron_rl.plan.serving import plan_serving
from megatron_rl.plan.text import as_text
from megatron_rl.plan.training import plan_training


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the plan of a configuration, as text or JSON. Returns the exit code: 2 when something does not divide or
    fit."""
    kind = kind_of(read_values(arguments.config, arguments.set))
    config = load_config(kind, arguments.config, arguments.set)
    assert isinstance(config, CommandConfig)
    cluster = _cluster(config.cluster or ClusterSection(), arguments)
    bailing, shape = _shape(config.model)  # type: ignore[attr-defined]  # every kind has a model
    plan: dict[str, Any] = {"run_dir": str(config.run_dir)} if hasattr(config, "run_dir") else {}
    plan |= {"cluster": cluster.model_dump(), "model": _model(bailing)} | ({"shape": str(shape)} if shape else {})
    if isinstance(config, RunConfig):
        found = plan_training(config, bailing, cluster, arguments.config, arguments.set)
    else:
        found = plan_serving(config, bailing, cluster, arguments.config, arguments.set)
    plan |= found
    sys.stdout.write(json.dumps(plan, indent=2) + "\n" if arguments.json else as_text(plan))
    for problem in plan["problems"]:
        sys.stderr.write(f"megatron-rl plan: {problem}\n")
    return 2 if plan["problems"] else 0


def _cluster(named: ClusterSection, arguments: argparse.Namespace) -> ClusterSection:
    """What the file says, where no option says otherwise. ValueError when nothing is left to train on."""
    asked = {name: getattr(arguments, name) for name in ClusterSection.model_fields}
    if asked["nodes"] is not None and asked["serving_nodes"] is None:
        asked["serving_nodes"] = 0  # those of the file are of its own nodes
    values = named.model_dump() | {name: value for name, value in asked.items() if value is not None}
    nodes, gpus, serving = values["nodes"], values["gpus_per_node"], values["serving_nodes"]
    if gpus < 1 or nodes <= serving or serving < 0:
        raise ValueError(f"--nodes {nodes} x --gpus-per-node {gpus} less --serving-nodes {serving} leaves no training")
    return ClusterSection.model_construct(**values)


def _shape(model: ServingSection) -> tuple[BailingConfig, Path | None]:
    """Of model.path, or while that has no config.json of model.shape, which then comes second."""
    if isinstance(model, ServedModelSection) and (model.shape is None or (model.path / "config.json").is_file()):
        return load_bailing_config(model.path), None
    shape = model.shape
    if shape is None:
        raise ValueError("model.shape is not set, which says for a plan what the candidates look like")
    path = shape / "config.json" if shape.is_dir() else shape
    if not path.is_file():
        raise ValueError(f"model.shape {shape} is neither a config.json nor a folder that has one")
    return read_bailing_config(path), path


def _model(bailing: BailingConfig) -> dict[str, int]:
    idle = bailing.num_experts - bailing.num_experts_per_tok
    num_moe = sum(bailing.is_moe_layer(i) for i in range(bailing.num_hidden_layers))
    active = bailing.num_parameters() - num_moe * idle * 3 * bailing.hidden_size * bailing.moe_intermediate_size
    return {"parameters": bailing.num_parameters(), "active_parameters": active}
