"""This module estimates what the GPUs of a plan hold: those that train, with the servers that share them, and those
that serve alone."""

from typing import Any

from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.distillation import DistillationSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.schema import RlConfig, RunConfig
from megatron_rl.families import Architecture
from megatron_rl.plan.servers import plan_servers
from megatron_rl.plan.shape import teacher_shape


def gpu_bytes(
    training: dict[str, int], config: RunConfig, architecture: Architecture, cluster: ClusterSection
) -> tuple[dict[str, dict[str, int]], dict[str, Any], list[str]]:
    """Return estimated bytes by place and part, the servers in numbers, and what speaks against them.

    The places are the fullest training GPU, a GPU with a server, and the host with its embedded servers. A GPU with a
    server is one of another node, or the training GPU while servers generate, where these give their memory back to the
    trainer. training: what the fullest training rank holds.
    """
    memory: dict[str, dict[str, int]] = {"training_gpu": dict(training), "host": {}}
    if not isinstance(config, RlConfig):
        return memory, {}, []
    colocated = not cluster.serving_nodes
    # Servers start when the trainer has its state, and before it has seen a token.
    stays = ("weights",) if config.train.offload_while_generating else ("weights", "gradients", "optimizer")
    state = {part: training[part] for part in stays}
    taken = sum(state.values())  # of a training GPU
    numbers: dict[str, Any] = {}
    found: list[str] = []
    if not colocated or not config.rollout.urls:
        # On nodes of their own job.sh starts as many as there are GPUs for.
        rollout = config.rollout if colocated else config.rollout.model_copy(update={"servers": 0})
        parts, numbers, found = plan_servers(
            rollout, config.model.dtype, architecture, cluster, taken_bytes=taken if colocated else 0
        )
        if not numbers["gpus_each"]:
            memory["host"] |= parts if colocated else {}
        elif not colocated:
            memory["serving_gpu"] = parts
        else:
            taken += sum(parts.values())
            if config.rollout.release_memory:
                memory["serving_gpu"] = state | parts
            else:
                memory["training_gpu"] |= parts
    if config.distillation is not None and not config.distillation.urls:
        found += _add_teacher(memory, config.distillation, config.rollout, taken, cluster)
    return memory, numbers, found


def _add_teacher(
    memory: dict[str, dict[str, int]],
    teacher: DistillationSection,
    rollout: RolloutSection,
    taken_bytes: int,
    cluster: ClusterSection,
) -> list[str]:
    """Add the teacher's servers to what training nodes hold, and list what speaks against them. They are started last
    and keep their memory throughout. taken_bytes: those of a training GPU before."""
    served = teacher.as_rollout(rollout)
    shape = teacher_shape(teacher)
    parts, numbers, found = plan_servers(served, teacher.dtype, shape, cluster, taken_bytes, updates=False)
    places = [name for name in memory if name != "host"] if numbers["gpus_each"] else ["host"]
    for name in places:
        if name != "serving_gpu" or not cluster.serving_nodes:  # those are other machines
            memory[name] |= {f"teacher_{part}": size for part, size in parts.items()}
    return [f"distillation: {problem}" for problem in found]
