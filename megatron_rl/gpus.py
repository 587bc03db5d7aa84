"""This module decides which GPUs this process may use, and which rank or server has which. Training ranks, servers,
checks and plans ask here.

It does without torch, since it decides before torch is imported. `device.on_cuda` says what torch can use in the end.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the second is of later versions of torch


def visible_gpus(environment: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> list[str]:
    """List the GPUs that this process may use, by names that CUDA_VISIBLE_DEVICES takes; none on a CPU.

    Training rank r of this machine has the r-th. Containers may show any of the machine's device nodes, /dev/nvidia3
    alone for instance; CUDA counts those that it can open, from 0. `MEGATRON_RL_DEVICE=cpu` means none.
    """
    environment = os.environ if environment is None else environment
    if environment.get("MEGATRON_RL_DEVICE") == "cpu":
        return []
    nodes = [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    num_nodes = sum(os.access(path, os.R_OK | os.W_OK) for path in nodes)
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None or not num_nodes:
        return [str(i) for i in range(num_nodes)]
    return _named(named, num_nodes)


def _named(text: str, num_nodes: int) -> list[str]:
    """Read CUDA_VISIBLE_DEVICES as CUDA does: up to the first entry that is no device, and nothing where one comes
    twice.

    The first entry decides whether names (GPU-..., MIG-...) or numbers are read. A MIG instance is a device of its own.
    """
    found: list[str] = []
    kind = text[:4]
    for entry in text.split(","):
        if kind in ("GPU-", "MIG-"):
            name = entry if entry.startswith(kind) else None
        else:
            number = re.match(r"\+?([0-9]+)", entry.strip())
            name = None if number is None else str(int(number[1]))
        if name is None:
            break
        if name in found:
            return []
        found.append(name)
    if kind in ("GPU-", "MIG-"):
        return found
    beyond = next((i for i, name in enumerate(found) if int(name) >= num_nodes), len(found))
    return found[:beyond]


def gpu_shares(gpus: Sequence[str], num_servers: int, gpus_each: int = 1) -> list[list[str]]:
    """Divide the GPUs of a machine among its servers: equally many each, none shared; [] for each on a CPU.

    gpus_each: the GPUs that a server needs. ValueError when there are too few.
    """
    size = len(gpus) // num_servers
    if gpus and size < gpus_each:
        needs = "one" if gpus_each == 1 else f"{gpus_each} (--tp-size in rollout.sglang_arguments)"
        raise ValueError(
            f"rollout.servers = {num_servers} on a machine with {len(gpus)} GPUs; each needs {needs}, set fewer"
        )
    return [list(gpus[i * size : (i + 1) * size]) for i in range(num_servers)]


def opened_rank(server: int, tensor_rank: int, num_servers: int, num_gpus: int) -> int:
    """Find the training rank of this machine that sits on the same GPU as a rank of a server, by `gpu_shares`. On a CPU
    (num_gpus 0) it is the first."""
    return server * (num_gpus // num_servers) + tensor_rank if num_gpus else 0


def chosen_backend(backend: str, engine: str, trains_on_gpu: bool, beside: bool) -> str:
    """Choose the backend that `sync.backend` means in this run. ValueError for NCCL without GPUs.

    beside: a server is on rank 0's machine. Then it may be on rank 0's GPU, where NCCL would refuse it.
    """
    if backend == "auto":
        return "nccl" if trains_on_gpu and engine == "sglang" and not beside else "gloo"
    if backend == "nccl" and not trains_on_gpu:
        raise ValueError("sync.backend 'nccl' needs a run that trains on GPUs, this one does not; set 'auto' or 'gloo'")
    return backend


def expandable_segments(environment: Mapping[str, str] | None = None) -> str | None:
    """Name the variable that makes torch's allocator use expandable segments, or None."""
    environment = os.environ if environment is None else environment
    for name in _ALLOCATOR_VARIABLES:
        for option in environment.get(name, "").split(","):
            key, _, value = option.partition(":")
            if key.strip() == "expandable_segments" and value.strip().lower() == "true":
                return name
    return None


def without_expandable_segments(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to change so that torch's allocator uses no expandable segments."""
    changed = {}
    for name in _ALLOCATOR_VARIABLES:
        options = environment.get(name, "").split(",")
        kept = [option for option in options if option.partition(":")[0].strip() != "expandable_segments"]
        if kept != options:
            changed[name] = ",".join(kept)
    return changed
