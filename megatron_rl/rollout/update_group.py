"""Makes the process group over which a trainer sends weights to generation servers, both ends of it.

The trainer is rank 0, each server (or each rank of a tensor-parallel one) a rank behind it. The group is the one that
SGLang makes in `/init_weights_update_group`: a TCPStore at rank 0, the keys of the group below the prefixes `NAME`,
`NAME/` and the device. It stands beside torch's registry of groups, not in it: it needs no default group, takes no
name away from others, and does not split a communicator that the trainer's default group is bound to.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.rollout.ports import address_towards

BACKENDS = ("gloo", "nccl")


class Waitable(Protocol):
    """Describes a collective that has been started. `wait` raises RuntimeError when a peer is gone or the group's time
    is up."""

    def wait(self) -> object: ...


def join(
    master_address: str,
    master_port: int,
    rank: int,
    world_size: int,
    group_name: str,
    backend: str,
    timeout_seconds: float,
    *,
    device: torch.device | None = None,
    store: dist.TCPStore | None = None,
) -> dist.ProcessGroup:
    """Enter the group. Return once all `world_size` ranks have, so the others must be told before rank 0 calls this.

    rank: 0 is the sender. backend: gloo, or nccl with `device`, this rank's GPU. timeout_seconds: of the rendezvous and
    of every later collective. store: at rank 0 the one of stores.host_store; without it rank 0 makes one on
    `master_port`. Raises RuntimeError or dist.DistError when the others do not come in time, and ValueError for what
    cannot work.
    """
    if not group_name:
        raise ValueError("group_name must not be empty, got ''; give the group any name")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if world_size < 2 or not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size) and world_size at least 2, got {rank} of {world_size}")
    if not 0 < master_port < 65536:
        raise ValueError(f"master_port must be in [1, 65535], got {master_port}; stores.host_store picks a free one")
    if backend == "nccl" and (device is None or device.type == "cpu"):
        raise ValueError(f"backend nccl needs device, the GPU of this rank, got {device}; use gloo on a CPU")
    timeout = timedelta(seconds=timeout_seconds)
    if store is None:
        store = dist.TCPStore(
            master_address, master_port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False
        )
    store.set_timeout(timeout)
    device = torch.device("cpu") if backend == "gloo" else device
    assert device is not None
    prefixed = dist.PrefixStore(f"{group_name}/", dist.PrefixStore(group_name, store))
    group = dist.ProcessGroup(prefixed, rank, world_size)
    own = dist.PrefixStore(f"{device.type}/", prefixed)
    if backend == "gloo":
        kind = dist.ProcessGroup.BackendType.GLOO
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        # It listens at the address that the others reach; by default at that of the machine's name.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(master_address))]
        member = dist.ProcessGroupGloo(own, rank, world_size, options)
    else:
        kind = dist.ProcessGroup.BackendType.NCCL
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = timeout
        with _blocking_wait():
            member = dist.ProcessGroupNCCL(own, rank, world_size, nccl_options)
    group._set_default_backend(kind)
    group._register_backend(device, kind, member)
    return group


def broadcast(group: dist.ProcessGroup, tensor: Tensor) -> Waitable:
    """Start sending `tensor` from rank 0, or receiving into it elsewhere; it must stay as it is until `wait` returns.

    Stands in for `torch.distributed.broadcast`, which takes registered groups only.

    The tensor is contiguous and of the same number of bytes everywhere. Collectives of one group run in the order in
    which they are started.
    """
    return group.broadcast(tensor, 0)


def leave(group: dist.ProcessGroup) -> None:
    """Give the group back; then drop every reference to it: gloo closes its connections with the last one.

    Waits for nobody: what others still have in flight fails there. A process that ends with a gloo group alive ends by
    SIGABRT now and then, from one of gloo's threads.
    """
    if group.name() == "nccl":
        group.abort()  # shutdown waits for what is in flight, which a peer that is gone never ends
    else:
        group.shutdown()


@contextmanager
def _blocking_wait() -> Iterator[None]:
    """Make `wait` of a group that NCCL makes meanwhile block, and raise when the time is up. By default `wait` only
    orders streams, and torch's watchdog ends the whole process: a server that is lost would take the trainer with
    it."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the payload of a bucket: the bytes of the tensors end to end, uint8 [sum of bytes]."""
    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
