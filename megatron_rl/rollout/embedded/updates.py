"""Receives weights over process groups: the groups, and the session in which a model is put together."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.families import Architecture
from megatron_rl.rollout.embedded.fields import cut
from megatron_rl.rollout.embedded.packing import Packing
from megatron_rl.rollout.embedded.weight_requests import BucketRequest, JoinRequest, TensorHead
from megatron_rl.rollout.embedded.weights import ModelWeights
from megatron_rl.rollout.update_group import broadcast, join, leave

log = logging.getLogger(__name__)

MAX_PROBLEMS_TOLD = 3
MAX_GROUPS = 8


class UpdateError(ValueError):
    """Says why a weight-update route answers `success: false`."""


class WeightUpdates:
    """Owns the groups this server has joined and the open session. Not for two threads at once; every call may block.

    What arrives is packed into a second model, which nobody serves until `finish` hands it out whole. A bucket is
    packed while the next one is received: at most one more copy of the model, and two buckets.
    """

    def __init__(self, config: Architecture, dtype: torch.dtype, timeout_seconds: float) -> None:
        """Begin without groups and session. timeout_seconds: how long a rendezvous or a broadcast may take."""
        self._config, self._dtype, self._timeout_seconds = config, dtype, timeout_seconds
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._packing: Packing | None = None
        self._problems: list[str] = []
        self._version: str | None = None
        self._packer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="packer")
        self._packed: Future[None] | None = None
        self._buffers: list[Tensor] = []  # of the last two buckets: one is packed while the next is received

    @property
    def open(self) -> bool:
        return self._packing is not None

    def join_group(self, request: JoinRequest) -> None:
        if request.group_name in self._groups:
            raise UpdateError(f"group {request.group_name!r} exists; destroy it first or choose another group_name")
        try:
            self._groups[request.group_name] = join(
                request.master_address,
                request.master_port,
                request.rank,
                request.world_size,
                request.group_name,
                "gloo",
                self._timeout_seconds,
            )
        except (RuntimeError, ValueError) as error:
            raise UpdateError(
                f"group {request.group_name!r} could not be joined at {request.master_address}:{request.master_port}: "
                f"{_first_line(error)}"
            ) from None
        # Nobody destroys the groups of runs that were killed.
        for name in list(self._groups)[:-MAX_GROUPS]:
            log.warning("leaving group %r: %d are joined that came later", name, MAX_GROUPS)
            self.leave_group(name)

    def leave_group(self, name: str) -> None:
        if name not in self._groups:
            raise UpdateError(f"group {cut(name)} does not exist; known: {', '.join(self._groups) or 'none'}")
        leave(self._groups.pop(name))

    def begin(self) -> None:
        if self._packing is not None:
            raise UpdateError("a weight-update session is open already; call end_weight_update first")
        with torch.inference_mode():
            self._packing = Packing(self._config, self._dtype)
        self._problems, self._version = [], None

    def receive(self, request: BucketRequest) -> None:
        """Receive one bucket into the session. Raise UpdateError, which says what is wrong with it; then `finish` will
        refuse too."""
        if self._packing is None:
            raise UpdateError(
                "update_weights_from_distributed must come between begin_weight_update and end_weight_update"
            )
        group = self._groups.get(request.group_name)
        if group is None:
            raise UpdateError(f"group {request.group_name!r} does not exist; call init_weights_update_group first")
        before = len(self._problems)
        try:
            with torch.inference_mode():
                self._receive(group, request, self._packing)
        except UpdateError as error:
            self._problems.append(str(error))
        except RuntimeError as error:
            self._problems.append(f"receiving {request.heads[0].name} and what follows failed: {_first_line(error)}")
        if request.weight_version is not None:
            self._version = request.weight_version
        if len(self._problems) > before:
            raise UpdateError(_told(self._problems[before:]))

    def abandon(self) -> None:
        """Close the session without weights."""
        self._wait_packed()
        self._buffers.clear()
        self._packing, self._problems, self._version = None, [], None

    def finish(self) -> tuple[ModelWeights, str | None]:
        """Return (the new weights, their version). Raise UpdateError when they are not whole. The session is closed
        either way."""
        packing, version = self._packing, self._version
        if packing is None:
            raise UpdateError("no weight-update session is open; call begin_weight_update first")
        problems = self._problems
        self.abandon()
        try:
            weights = packing.finish()
        except ValueError as error:
            problems = [*problems, str(error)]
        if problems:
            raise UpdateError(f"weights are unchanged: {_told(problems)}")
        return weights, version

    def _receive(self, group: dist.ProcessGroup, request: BucketRequest, packing: Packing) -> None:
        """Receive every byte that the sender sends, wanted or not: otherwise its next broadcast would meet this one."""
        dtypes = [_dtype(head) for head in request.heads]
        if request.flattened:
            sizes = [head.size * dtype.itemsize for head, dtype in zip(request.heads, dtypes, strict=True)]
            flat = self._buffer(sum(sizes))
            broadcast(group, flat).wait()
            tensors = [
                # A copy where the bytes before it leave the tensor at an odd place.
                (raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()).view(dtype).view(head.shape)
                for head, dtype, raw in zip(request.heads, dtypes, flat.split(sizes), strict=True)
            ]
        else:
            tensors = [torch.empty(head.shape, dtype=dtype) for head, dtype in zip(request.heads, dtypes, strict=True)]
            for tensor in tensors:
                broadcast(group, tensor).wait()
        admitted = []
        for head, tensor in zip(request.heads, tensors, strict=True):
            try:
                packing.admit(head.name, tensor)
            except ValueError as error:
                self._problems.append(str(error))
            else:
                admitted.append((head.name, tensor))
        self._wait_packed()
        self._packed = self._packer.submit(_copy, packing, admitted)

    def _buffer(self, num_bytes: int) -> Tensor:
        """Return memory for a bucket: that of the one before the last where it is large enough, because fresh pages
        cost more time than what is written into them."""
        spare = self._buffers.pop(0) if len(self._buffers) > 1 else torch.empty(0, dtype=torch.uint8)
        if spare.numel() < num_bytes:
            spare = torch.empty(num_bytes, dtype=torch.uint8)
        self._buffers.append(spare)
        return spare[:num_bytes]

    def _wait_packed(self) -> None:
        packed, self._packed = self._packed, None
        if packed is not None:
            packed.result()


def _copy(packing: Packing, tensors: Sequence[tuple[str, Tensor]]) -> None:
    with torch.inference_mode():
        for name, tensor in tensors:
            packing.copy(name, tensor)


def _dtype(head: TensorHead) -> torch.dtype:
    found = getattr(torch, head.dtype, None)
    if not isinstance(found, torch.dtype):
        raise UpdateError(
            f"tensor {head.name} has dtype {head.dtype!r}, which torch does not know; send its torch name"
        )
    return found


def _told(problems: list[str]) -> str:
    rest = len(problems) - MAX_PROBLEMS_TOLD
    return "; ".join(problems[:MAX_PROBLEMS_TOLD]) + (f"; and {rest} more" if rest > 0 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
