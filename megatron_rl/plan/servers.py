"""This module plans generation servers: how many there are on a node, and what each takes of a GPU."""

from typing import Any

from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.rollout import GenerationSection
from megatron_rl.families import Architecture
from megatron_rl.memory import server_bytes

GIB = 2**30


def plan_servers(
    rollout: GenerationSection,
    dtype: str,
    architecture: Architecture,
    cluster: ClusterSection,
    taken_bytes: int = 0,
    updates: bool = True,
) -> tuple[dict[str, int], dict[str, Any], list[str]]:
    """Return the bytes on each GPU of servers, the servers in numbers, and what speaks against them. Embedded servers
    take no GPU; then the bytes are those of a node's host memory.

    taken_bytes: what others hold of a GPU before a server starts. updates: new weights come while it serves. With
    --mem-fraction-static SGLang takes that share of what is free when it starts, for weights and cache. Without it, and
    for the embedded server, the cache counted is that of every slot at full length.
    """
    num_servers = rollout.servers_on(cluster.gpus_per_node)
    all_weights, all_slots = server_bytes(rollout, dtype, architecture, updates)
    longest = all_slots // rollout.max_running_requests
    numbers = {
        "per_node": num_servers,
        "gpus_each": 0,
        "idle_gpus": 0,
        "slots": rollout.max_running_requests,
        "full_length_responses": rollout.max_running_requests,
        "max_sequence_tokens": rollout.max_sequence_tokens,
    }
    if rollout.engine == "embedded":
        return {"server_weights": num_servers * all_weights, "server_cache": num_servers * all_slots}, numbers, []
    weights = round(all_weights / rollout.sglang_tensor_size)
    # Each GPU has whole key-value heads, so more GPUs than heads hold some of them twice.
    cache_parts = min(rollout.sglang_tensor_size, architecture.num_key_value_heads)
    cache = round(all_slots / cache_parts)
    share = rollout.sglang_memory_share
    if share is not None and cluster.gpu_memory_gb:
        cache = max(0, round(share * (cluster.gpu_memory_gb * GIB - taken_bytes)) - weights)
    missing = num_servers * rollout.sglang_gpus - cluster.gpus_per_node
    numbers |= {
        "gpus_each": rollout.sglang_gpus,
        "idle_gpus": max(0, -missing),
        "full_length_responses": cache * cache_parts // longest,
    }
    found = []
    if missing > 0 and cluster.gpu_memory_gb:  # without a verdict it may be a machine without GPUs
        found.append(
            f"rollout.servers {num_servers} x --tp-size {rollout.sglang_gpus} is more than the {cluster.gpus_per_node} "
            "GPUs of a node (--gpus-per-node); lower one of them"
        )
    if share is not None and numbers["full_length_responses"] < 1:
        found.append(
            f"--mem-fraction-static {share:g} leaves no cache for one response of {rollout.max_sequence_tokens} tokens "
            "beside the weights; raise it, or divide a server over more GPUs (--tp-size in rollout.sglang_arguments)"
        )
    return {"server_weights": weights, "server_cache": cache}, numbers, found


def over_limit(memory: dict[str, dict[str, int]], cluster: ClusterSection, remedies: dict[str, str]) -> list[str]:
    """List what does not fit on a GPU; nothing without a limit. memory, remedies: by kind of GPU."""
    limit = round(cluster.gpu_memory_gb * GIB)
    return [
        f"a {name.replace('_', ' ')} needs about {memory[name]['total'] / GIB:.1f} GiB and has "
        f"{cluster.gpu_memory_gb:g} (--gpu-memory-gb); {remedy}"
        for name, remedy in remedies.items()
        if limit and name in memory and memory[name]["total"] > limit
    ]


def serving_remedy(rollout: GenerationSection, may_offload: bool = False) -> str:
    """Say what to do where a server does not fit. may_offload: the trainer's states are still there beside it."""
    steps = ["set train.offload_while_generating = true"] if may_offload else []
    if rollout.sglang_memory_share is None:  # else it says how much is taken, whatever may run
        steps.append("lower rollout.max_running_requests")
    steps.append("divide a server over more GPUs (--tp-size in rollout.sglang_arguments)")
    return ", or ".join(steps)
