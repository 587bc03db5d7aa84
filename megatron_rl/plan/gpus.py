"""What the GPUs of a plan hold: those that train, with the servers that share them, and those that serve alone."""

from typing import Any

from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.schema import RlConfig, RunConfig
from megatron_rl.families import Architecture
from megatron_rl.plan.servers import plan_servers


def gpu_bytes(
    training: dict[str, int], config: RunConfig, architecture: Architecture, cluster: ClusterSection
) -> tuple[dict[str, dict[str, int]], dict[str, Any], list[str]]:
    """Bytes by part of the fullest training GPU, of a GPU with a server where these are others, or the same while
    servers generate where these give their memory back to the trainer, and of embedded servers on the host; the servers
    in numbers; and what speaks against them. training: what the fullest training rank holds."""
    colocated = not cluster.serving_nodes
    memory = {"training_gpu": dict(training)}
    if not isinstance(config, RlConfig) or (colocated and config.rollout.urls):
        return memory, {}, []
    # Servers start when the trainer has its state, and before it has seen a token.
    stays = ("weights",) if config.train.offload_while_generating else ("weights", "gradients", "optimizer")
    state = {part: training[part] for part in stays} if colocated else {}
    # On nodes of their own job.sh starts as many as there are GPUs for.
    rollout = config.rollout if colocated else config.rollout.model_copy(update={"servers": 0})
    taken = sum(state.values())
    parts, numbers, against = plan_servers(rollout, config.model.dtype, architecture, cluster, taken_bytes=taken)
    if colocated and not numbers["gpus_each"]:
        memory["host"] = parts
    elif colocated and not config.rollout.release_memory:
        memory["training_gpu"] |= parts
    elif numbers["gpus_each"]:
        memory["serving_gpu"] = state | parts
    return memory, numbers, against
