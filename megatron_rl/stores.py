"""torch's TCPStores, by which the processes of a group find each other, at one address only.

A plain one listens on every interface of the machine, and serves whoever connects.
"""

import datetime
import os
import socket

import torch.distributed as dist


def host_store(address: str, world_size: int, timeout_seconds: float, port: int = 0) -> dist.TCPStore:
    """Rank 0's store at a port of `address`, which `.port` tells; 0 picks one.

    The port is bound by the store itself, so nobody else can take it between its choice and its use.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=max(64, world_size))
    return dist.TCPStore(
        address,
        listener.getsockname()[1],
        world_size,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def training_store(timeout_seconds: float) -> dist.Store | None:
    """Where the training ranks meet when all are on this machine: on loopback, at MASTER_PORT; gloo's own connections
    stay there too. None where there are other machines, or torchrun has a store that it made itself."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size != int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return None
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if world_size == 1:
        return dist.HashStore()  # no port: a single process cannot collide with another run on this machine
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or "MASTER_PORT" not in os.environ:
        return None
    port = int(os.environ["MASTER_PORT"])
    if rank == 0:
        return host_store("127.0.0.1", world_size, timeout_seconds, port)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    return dist.TCPStore("127.0.0.1", port, world_size, is_master=False, timeout=timeout)
