"""Runs the trainer's end of the process group that it has with the servers."""

import torch.distributed as dist
from torch import Tensor

from megatron_rl.device import on_cuda, torch_device
from megatron_rl.rollout import update_group
from megatron_rl.stores import host_store


class GroupFailed(RuntimeError):
    """Says that a group was not joined by all, or a broadcast did not arrive; the group is closed."""


class ServerGroup:
    """Owns one group, its store and the broadcast in flight. A group that fails closes itself before it says so.

    gloo closes its connections with the last reference to the group, and this is what tells the other members that
    nothing will come; a work holds one, and so does an error that is still being handled. So nobody else gets hold of
    either: `close` drops all that there are, and errors are told in words.
    """

    def __init__(self, name: str, address: str, world_size: int, backend: str, timeout_seconds: float) -> None:
        """Open the store at which the members meet, at `address` and `port`. The group has no members yet."""
        self.name, self.address, self.world_size, self.backend = name, address, world_size, backend
        self._timeout_seconds = timeout_seconds
        self._store: dist.TCPStore | None = host_store(address, world_size, timeout_seconds)
        self._group: dist.ProcessGroup | None = None
        self._work: update_group.Waitable | None = None
        self.port = self._store.port

    def join(self) -> None:
        """Enter as rank 0, once the others have been told to. Raise GroupFailed when they do not come."""
        problem = ""
        try:
            self._group = update_group.join(
                self.address,
                self.port,
                0,
                self.world_size,
                self.name,
                self.backend,
                self._timeout_seconds,
                device=torch_device() if on_cuda() else None,
                store=self._store,
            )
        except (RuntimeError, dist.DistError) as error:
            problem = str(error).splitlines()[0]
        self._check(problem and f"the process group for weights was not joined by all: {problem}")

    def broadcast(self, flat: Tensor) -> None:
        """Start to send; `flat` must stay as it is until `wait` returns. Raise GroupFailed when it cannot be
        started."""
        assert self._group is not None and self._work is None
        problem = ""
        try:
            self._work = update_group.broadcast(self._group, flat)
        except RuntimeError as error:  # NCCL makes its communicator here, at the first one
            problem = _told(error)
        self._check(problem)

    def wait(self) -> None:
        """Wait for what is in flight. Raise GroupFailed when it did not arrive."""
        problem = ""
        try:
            if self._work is not None:
                self._work.wait()
        except RuntimeError as error:
            problem = _told(error)
        self._work = None
        self._check(problem)

    def close(self) -> None:
        """Leave the group without telling anybody; who waits for it learns of it by the end of its connections."""
        group, self._group = self._group, None
        self._work = self._store = None
        if group is not None:
            update_group.leave(group)

    def _check(self, problem: str) -> None:
        if problem:
            self.close()
            raise GroupFailed(problem)


def _told(error: RuntimeError) -> str:
    """Say on one line why a broadcast failed, with the remedy where it is known."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    remedy = ""
    if "Duplicate GPU" in text:
        remedy = (
            ". A server is on the GPU of the trainer's first rank, or two servers are on one, which NCCL refuses: set "
            "sync.backend = 'gloo', or give the servers GPUs of their own"
        )
    elif "ismatched NCCL" in text:
        remedy = (
            ". Trainer and servers have different versions of NCCL: install the same torch in both, or set "
            "sync.backend = 'gloo'"
        )
    return f"the broadcast of weights to the servers failed: {text}{remedy}"
