"""`megatron-rl plan`: what a configuration means on so many GPUs, before anything is started. Needs neither torch nor a
GPU, and of the model only config.json."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.c3po.budget import apportion
from megatron_rl.config.bailing import BailingConfig, load_bailing_config
from megatron_rl.config.kinds import kind_of
from megatron_rl.config.load import load_config, read_values
from megatron_rl.config.schema import RlConfig, RunConfig, SftConfig
from megatron_rl.layout import Layout
from megatron_rl.memory import rank_bytes, server_bytes
from megatron_rl.preflight import problems

SLURM = "examples/ring_lite/slurm"


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the plan of a configuration, as text or JSON. Returns the exit code: 2 when something does not divide or
    fit."""
    kind = "sft" if kind_of(read_values(arguments.config, arguments.set)) is SftConfig else "train"
    config = load_config(SftConfig if kind == "sft" else RlConfig, arguments.config, arguments.set)
    nodes, gpus, serving = arguments.nodes, arguments.gpus_per_node, arguments.serving_nodes
    if gpus < 1 or nodes <= serving or serving < 0:
        raise ValueError(f"--nodes {nodes} x --gpus-per-node {gpus} less --serving-nodes {serving} leaves no training")
    bailing = load_bailing_config(config.model.path)
    layout = config.parallel.layout(gpus * (nodes - serving))
    found = list(problems(config, bailing, layout.world_size))
    plan: dict[str, Any] = {"run_dir": str(config.run_dir), "layout": asdict(layout), "model": _model(bailing)}
    if not found:
        plan["layout"] |= {"data": layout.data, "layers_per_stage": layout.layers_per_stage(bailing.num_hidden_layers)}
        if isinstance(config, RlConfig):
            plan["budget"] = _budget(config, layout)
        plan["memory"] = memory = _memory(config, bailing, layout, gpus, colocated=not serving)
        limit = round(arguments.gpu_memory_gb * 2**30)
        for name in ("training_gpu", "serving_gpu"):
            needed = memory.get(name, {}).get("total", 0)
            if limit and needed > limit:
                found.append(
                    f"a {name.replace('_', ' ')} needs about {needed / 2**30:.1f} GiB and has "
                    f"{arguments.gpu_memory_gb:g} (--gpu-memory-gb): {_remedy(name, config)}"
                )
    plan["launch"] = _launch(kind, arguments)
    plan["problems"] = found
    sys.stdout.write(json.dumps(plan, indent=2) + "\n" if arguments.json else _as_text(plan))
    for problem in found:
        sys.stderr.write(f"megatron-rl plan: {problem}\n")
    return 2 if found else 0


def _model(bailing: BailingConfig) -> dict[str, int]:
    idle = bailing.num_experts - bailing.num_experts_per_tok
    num_moe = sum(bailing.is_moe_layer(i) for i in range(bailing.num_hidden_layers))
    active = bailing.num_parameters() - num_moe * idle * 3 * bailing.hidden_size * bailing.moe_intermediate_size
    return {"parameters": bailing.num_parameters(), "active_parameters": active}


def _budget(config: RlConfig, layout: Layout) -> dict[str, Any]:
    """phase_tokens: Phi of all optimizer steps of a phase. filling_mean_tokens: the mean length at which the first
    phase's responses are just enough. min_micro_batches: of a rank in one optimizer step, prompts not counted."""
    responses = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    found: dict[str, Any] = {"responses_of_first_phase": responses}
    if not chosen_algorithm(config.algorithm).uses_budget:
        return found
    budgets = config.phase_budgets(layout.world_size)
    per_rank = -(-budgets[0] // layout.data)
    if config.budget.domains:
        found["domain_tokens"] = apportion(budgets[0], config.budget.domains)
    return found | {
        "tokens": config.budget.tokens,
        "scope": config.budget.scope,
        "step_tokens": budgets[0],
        "optimizer_steps": len(budgets),
        "phase_tokens": sum(budgets),
        "filling_mean_tokens": sum(budgets) / responses,
        "min_responses": -(-sum(budgets) // config.rollout.max_response_tokens),
        "tokens_per_data_rank": per_rank,
        "min_micro_batches": -(-per_rank // config.micro_batch_cap),
    }


def _memory(
    config: RunConfig, bailing: BailingConfig, layout: Layout, gpus_per_node: int, colocated: bool
) -> dict[str, Any]:
    """Estimated bytes of the fullest training GPU, and of a GPU with a server where these are others."""
    fullest = max(rank_bytes(config, bailing, layout), key=lambda rank: rank.total)
    training = asdict(fullest)
    found = {"training_gpu": training}
    if isinstance(config, RlConfig) and (not colocated or not config.rollout.urls):
        # SGLang divides a server over as many GPUs as it is told to; embedded ones are on the node, wherever.
        share: float = config.rollout.sglang_tensor_size
        if config.rollout.engine == "embedded":
            share = gpus_per_node / max(1, config.rollout.servers)
        weights, cache = (round(n / share) for n in server_bytes(config.rollout, config.model.dtype, bailing))
        target = training if colocated else found.setdefault("serving_gpu", {})
        target |= {"server_weights": weights, "server_cache": cache}
    return {name: parts | {"total": sum(parts.values())} for name, parts in found.items()}


def _remedy(name: str, config: RunConfig) -> str:
    if name == "serving_gpu":
        return (
            "lower rollout.max_running_requests, or divide a server over GPUs (--tp-size in rollout.sglang_arguments)"
        )
    recompute = "" if config.model.recompute else "model.recompute = true, "
    return f"set {recompute}more [parallel], a smaller train.micro_batch_tokens, or more GPUs"


def _launch(kind: str, arguments: argparse.Namespace) -> list[str]:
    nodes, gpus, serving = arguments.nodes, arguments.gpus_per_node, arguments.serving_nodes
    overrides = "".join(f" --set '{override}'" for override in arguments.set)
    script = "separate" if serving else kind
    slurm = f"sbatch --nodes={nodes} --gpus-per-node={gpus} {SLURM}/{script}.sbatch {arguments.config}{overrides}"
    if serving:
        return [f"SERVING_NODES={serving} {slurm}"]
    if nodes == 1:
        return [f"megatron-rl {kind} {arguments.config}{overrides} --nproc {gpus}", slurm]
    torchrun = f"torchrun --nnodes {nodes} --nproc_per_node {gpus} --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29500"
    return [f"{torchrun} -m megatron_rl.cli {kind} {arguments.config}{overrides} --resume", slurm]


def _as_text(plan: dict[str, Any]) -> str:
    layout, model = plan["layout"], plan["model"]
    sizes = ", ".join(f"{name} {size}" for name, size in layout.items() if name != "layers_per_stage")
    lines = [
        f"model     {model['parameters']:,} parameters, {model['active_parameters']:,} of them active",
        f"layout    {sizes}",
    ]
    if "layers_per_stage" in layout:
        lines.append(f"          layers per stage {', '.join(map(str, layout['layers_per_stage']))}")
    if budget := plan.get("budget"):
        if "tokens" in budget:
            product = f" x {layout['world_size']} = {budget['step_tokens']:,}" if budget["scope"] == "per_gpu" else ""
            lines += [
                f"budget    {budget['tokens']:,}{product} tokens per optimizer step",
                *[f"          of them {n:,} of {domain}" for domain, n in budget.get("domain_tokens", {}).items()],
                f"          {budget['optimizer_steps']} optimizer step(s) per phase",
                f"          {budget['tokens_per_data_rank']:,} per data-parallel rank, in "
                f"{budget['min_micro_batches']} micro-batches or more",
                f"          filled by the first phase's {budget['responses_of_first_phase']:,} responses at a mean of "
                f"{budget['filling_mean_tokens']:,.1f} tokens; by {budget['min_responses']:,} of the longest",
            ]
        else:
            lines.append(f"budget    none; {budget['responses_of_first_phase']:,} responses per phase")
    for name, parts in plan.get("memory", {}).items():
        told = ", ".join(f"{part.replace('_', ' ')} {n / 2**30:.2f}" for part, n in parts.items() if part != "total")
        lines.append(f"memory    {parts['total'] / 2**30:.1f} GiB on the fullest {name.replace('_', ' ')}, estimated:")
        lines.append(f"          {told}")
    lines += [f"launch    {plan['launch'][0]}", *(f"          {line}" for line in plan["launch"][1:])]
    return "\n".join(lines) + "\n"
