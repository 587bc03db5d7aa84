"""Generation servers of a plan: how many there are on a node, and what each takes of a GPU."""

from typing import Any

from megatron_rl.config.bailing import BailingConfig
from megatron_rl.config.schema import ClusterSection, GenerationSection
from megatron_rl.memory import server_bytes

GIB = 2**30


def plan_servers(
    rollout: GenerationSection,
    dtype: str,
    bailing: BailingConfig,
    cluster: ClusterSection,
    taken_bytes: int = 0,
    updates: bool = True,
) -> tuple[dict[str, int], dict[str, Any], list[str]]:
    """Bytes on each of their GPUs, the servers in numbers, and what speaks against them.

    taken_bytes: of a GPU by others before a server starts. updates: new weights come while it serves. With
    --mem-fraction-static SGLang takes that share of what is free when it starts, for weights and cache; without it, and
    for the embedded server, the cache counted is that of every slot at full length.
    """
    # Embedded servers are on the node, wherever; SGLang divides one over as many GPUs as it is told to.
    num_gpus: float = rollout.sglang_tensor_size
    if rollout.engine == "embedded":
        num_gpus = cluster.gpus_per_node / max(1, rollout.servers)
    all_weights, all_slots = server_bytes(rollout, dtype, bailing, updates)
    weights = round(all_weights / num_gpus)
    # Each GPU has whole key-value heads, so more GPUs than heads hold some of them twice.
    cache_parts = min(num_gpus, bailing.num_key_value_heads) if rollout.engine == "sglang" else num_gpus
    cache = round(all_slots / cache_parts)
    share = rollout.sglang_memory_share if rollout.engine == "sglang" else None
    if share is not None and cluster.gpu_memory_gb:
        cache = max(0, round(share * (cluster.gpu_memory_gb * GIB - taken_bytes)) - weights)
    longest = all_slots // rollout.max_running_requests
    numbers = {
        "per_node": rollout.num_servers,
        "gpus_each": num_gpus,
        "slots": rollout.max_running_requests,
        "full_length_responses": int(cache * cache_parts / longest),
        "max_sequence_tokens": rollout.max_sequence_tokens,
    }
    found = []
    crowded = rollout.engine == "sglang" and rollout.num_servers * num_gpus > cluster.gpus_per_node
    if crowded and cluster.gpu_memory_gb:  # without a verdict it may be a machine without GPUs
        found.append(
            f"rollout.servers {rollout.num_servers} x --tp-size {num_gpus:g} is more than the {cluster.gpus_per_node} "
            "GPUs of a node (--gpus-per-node); lower one of them"
        )
    if share is not None and numbers["full_length_responses"] < 1:
        found.append(
            f"--mem-fraction-static {share:g} leaves no cache for one response of {rollout.max_sequence_tokens} tokens "
            "beside the weights; raise it, or divide a server over GPUs (--tp-size in rollout.sglang_arguments)"
        )
    return {"server_weights": weights, "server_cache": cache}, numbers, found


def over_limit(memory: dict[str, dict[str, int]], cluster: ClusterSection, remedies: dict[str, str]) -> list[str]:
    """What does not fit; nothing without a limit. memory: by kind of GPU, whose remedy is under the same name."""
    limit = round(cluster.gpu_memory_gb * GIB)
    return [
        f"a {name.replace('_', ' ')} needs about {parts['total'] / GIB:.1f} GiB and has "
        f"{cluster.gpu_memory_gb:g} (--gpu-memory-gb): {remedies[name]}"
        for name, parts in memory.items()
        if limit and parts["total"] > limit
    ]


SERVING_REMEDY = (
    "lower rollout.max_running_requests, or divide a server over GPUs (--tp-size in rollout.sglang_arguments)"
)
