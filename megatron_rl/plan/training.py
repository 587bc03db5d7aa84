"""This module makes the plan of `megatron-rl train` and `sft`: layout, budget, memory of a GPU, and how to start it on
every node."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.c3po.budget import apportion
from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.layout import Layout
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig, RunConfig, SftConfig
from megatron_rl.families import Architecture
from megatron_rl.memory import host_bytes, rank_bytes
from megatron_rl.plan.gpus import gpu_bytes
from megatron_rl.plan.servers import over_limit, serving_remedy
from megatron_rl.preflight.checks import problems
from megatron_rl.rollout.routing import MAX_EXPERTS, routed_shape, step_routing
from megatron_rl.simulation.cluster import CannotSimulate
from megatron_rl.simulation.forecast import forecast
from megatron_rl.simulation.rates import Rates
from megatron_rl.simulation.workload import assumed

_SIMULATED_STEPS = 40
SLURM = "examples/ring_lite/slurm"


def plan_training(
    config: RunConfig, architecture: Architecture, cluster: ClusterSection, path: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """Plan a command that trains. path, overrides: those of the configuration, as they were given."""
    layout = config.parallel.layout(cluster.training_ranks)
    serves = isinstance(config, RlConfig) and not config.rollout.urls
    found = list(problems(config, architecture, layout.world_size, serves))
    plan: dict[str, Any] = {"layout": asdict(layout)}
    if config.lora is not None:
        plan["lora"] = config.lora.model_dump() | {
            "targets": config.lora.targets_of(architecture),
            "parameters": config.lora.num_parameters(architecture),
        }
    if isinstance(config, RlConfig) and config.rollout.router_replay and architecture.num_experts <= MAX_EXPERTS:
        plan["router_replay"] = asdict(step_routing(config, routed_shape(architecture), layout.world_size))
    if not found:
        plan["layout"] |= {
            "data": layout.data,
            "layers_per_stage": layout.layers_per_stage(architecture.num_hidden_layers),
        }
        if isinstance(config, RlConfig):
            plan["budget"] = _budget(config, layout)
        elif isinstance(config, SftConfig):
            plan["training"] = _training(config, layout)
        plan |= _memory(config, architecture, layout, cluster, found)
        found += over_limit(plan["memory"], cluster, _remedies(config, cluster))
        if isinstance(config, RlConfig) and cluster.rates is not None:
            plan["step"] = _step(config, architecture, cluster, cluster.rates)
    if isinstance(config, RlConfig):
        found += config.sharing_problems(attached=bool(config.rollout.urls or cluster.serving_nodes))
    kind = "sft" if isinstance(config, SftConfig) else "train"
    return plan | {"launch": _launch(kind, cluster, path, overrides), "problems": found}


def _budget(config: RlConfig, layout: Layout) -> dict[str, Any]:
    """Return the budget in numbers. phase_tokens: Phi of all optimizer steps of a phase. filling_mean_tokens: the mean
    length at which the first phase's responses are just enough. min_micro_batches: those of a rank in one optimizer
    step, prompts not counted."""
    responses = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    found: dict[str, Any] = {"responses_of_first_phase": responses}
    if not chosen_algorithm(config.algorithm).uses_budget:
        return found
    budgets = config.phase_budgets(layout.world_size)
    if config.budget.domains:
        found["domain_tokens"] = apportion(budgets[0], config.budget.domains)
    return found | {
        "tokens": config.budget.tokens,
        "scope": config.budget.scope,
        "optimizer_steps": len(budgets),
        "phase_tokens": sum(budgets),
        "filling_mean_tokens": sum(budgets) / responses,
        "min_responses": -(-sum(budgets) // config.rollout.max_response_tokens),
        **_per_rank(budgets[0], config, layout),
    }


def _step(config: RlConfig, architecture: Architecture, cluster: ClusterSection, path: Path) -> dict[str, Any]:
    """Return what the simulator says with these rates; `unknown` has the reason where it cannot simulate."""
    rates = load_config(Rates, path)
    workload = assumed(config, cluster)
    told = {"rates": str(path), "lengths": workload.told, "run_steps": config.train.steps}
    gpus = config.rollout.sglang_gpus if config.rollout.engine == "sglang" else 0
    if gpus and rates.engine_gpus not in (0, gpus):
        told |= {"rates_of_gpus": rates.engine_gpus, "engine_gpus": gpus}
    if config.distillation is not None and "teacher" not in rates.host:
        told["without_teacher"] = True
    try:
        return told | forecast(config, architecture, cluster, rates, workload, _SIMULATED_STEPS)
    except CannotSimulate as error:
        return told | {"unknown": str(error)}


def _training(config: SftConfig, layout: Layout) -> dict[str, Any]:
    """Return the training in numbers. optimizer_steps, warmup_steps: None where they follow from the data. weights:
    those of the files, as shares."""
    steps, total = config.train.steps, sum(config.data.train.values())
    return {
        "optimizer_steps": steps,
        "epochs": config.train.epochs,
        "warmup_steps": config.optimizer.num_warmup_steps(steps) if steps else None,
        "warmup_share": config.optimizer.warmup_share,
        **_per_rank(config.data.batch_tokens, config, layout),
        "weights": {str(path): weight / total for path, weight in config.data.train.items()},
    }


def _per_rank(step_tokens: int, config: RunConfig, layout: Layout) -> dict[str, int]:
    per_rank = -(-step_tokens // layout.data)
    return {
        "step_tokens": step_tokens,
        "tokens_per_data_rank": per_rank,
        "min_micro_batches": -(-per_rank // config.micro_batch_cap),
    }


def _memory(
    config: RunConfig, architecture: Architecture, layout: Layout, cluster: ClusterSection, found: list[str]
) -> dict[str, Any]:
    """Return the estimated bytes of the GPUs (`gpu_bytes`) and of a training node's host memory, and the servers in
    numbers. found: gets what speaks against these."""
    fullest = max(rank_bytes(config, architecture, layout), key=lambda rank: rank.total)
    memory, servers, against = gpu_bytes(asdict(fullest), config, architecture, cluster)
    memory["host"] = host_bytes(config, architecture, layout, cluster.gpus_per_node) | memory["host"]
    found += against
    told = {name: parts | {"total": sum(parts.values())} for name, parts in memory.items()}
    return {"memory": told} | ({"servers": servers} if servers else {})


def _remedies(config: RunConfig, cluster: ClusterSection) -> dict[str, str]:
    """Say what to do where something does not fit, by kind of GPU: only what is not set yet."""
    steps = ["model.recompute = 'full'"] if config.model.recompute != "full" else []
    steps += ["optimizer.offload_fraction = 1"] if config.optimizer.offload_fraction < 1 else []
    remedies = {}
    if isinstance(config, RlConfig):
        colocated = not config.rollout.urls and not cluster.serving_nodes
        if colocated and not config.rollout.release_memory:
            steps.append("rollout.release_memory = true")
        may_offload = colocated and config.rollout.release_memory and not config.train.offload_while_generating
        remedies["serving_gpu"] = serving_remedy(config.rollout, may_offload)
    steps += ["a larger parallel.tensor or parallel.expert", "a smaller train.micro_batch_tokens"]
    return remedies | {"training_gpu": f"set {', '.join(steps)}, or take more GPUs (`plan --suggest` searches)"}


def _launch(kind: str, cluster: ClusterSection, path: Path, overrides: Sequence[str]) -> list[str]:
    nodes, gpus, serving = cluster.nodes, cluster.gpus_per_node, cluster.serving_nodes
    options = "".join(f" --set '{override}'" for override in overrides)
    script = "separate" if serving else kind
    slurm = f"sbatch --nodes={nodes} --gpus-per-node={gpus} {SLURM}/{script}.sbatch {path}{options}"
    if serving:
        return [f"SERVING_NODES={serving} {slurm}"]
    if nodes == 1:
        return [f"megatron-rl {kind} {path}{options} --nproc {gpus}", slurm]
    torchrun = f"torchrun --nnodes {nodes} --nproc_per_node {gpus} --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29500"
    return [f"{torchrun} -m megatron_rl.cli {kind} {path}{options} --resume", slurm]
