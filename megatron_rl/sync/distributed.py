"""Sends weights over a process group: rank 0 of the trainer broadcasts buckets to all servers, by SGLang's routes.

The ranks export a bucket (gather their shards, reshape) and send their pieces to rank 0, while rank 0 broadcasts the
bucket before. This takes two buckets of memory on rank 0 and one elsewhere, in host memory with gloo and on the GPUs
with NCCL.
"""

import logging
import secrets
from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.checkpoint.names import name_table
from megatron_rl.device import torch_device
from megatron_rl.keys import KeyOf, no_key
from megatron_rl.model.build import Model
from megatron_rl.rollout.client import RequestRefused, ServerError, ServerLost
from megatron_rl.rollout.member import Member
from megatron_rl.sync.all_ranks import gather_objects
from megatron_rl.sync.buckets import Bucket, divide
from megatron_rl.sync.export import exported_names, fill, gathered
from megatron_rl.sync.requests import READY_SECONDS, Asked, ServerRequests, Waits
from megatron_rl.sync.server_group import GroupFailed, ServerGroup
from megatron_rl.sync.transport import PushSeconds, Receivers, members_to_update, settle

log = logging.getLogger(__name__)


def join_request(
    address: str, port: int, offset: int, world_size: int, group_name: str, backend: str
) -> dict[str, Any]:
    """Return the body of /init_weights_update_group."""
    return {
        "master_address": address,
        "master_port": port,
        "rank_offset": offset,
        "world_size": world_size,
        "group_name": group_name,
        "backend": backend,
    }


class DistributedTransport:
    """Sends weights over a process group. The group is made at the first push, and again when the servers are no longer
    the same."""

    def __init__(
        self,
        model: Model,
        control: Any,
        max_bytes: int,
        address: str,
        silence_seconds: float,
        backend: str = "gloo",
        key_of: KeyOf = no_key,
    ) -> None:
        """Divide the model into buckets, and allocate their memory. Collective over the gloo group `control` of all
        ranks. max_bytes: of a bucket, unless one parameter alone is larger. address: of this machine, by which the
        servers reach rank 0. silence_seconds: a server that does not answer for so long, on top of the time for the
        bytes, is lost. backend: see `gpus.chosen_backend`. key_of: of the servers, see `ServerRequests`."""
        self._parameters = model.parameters_by_canonical_name()
        device = torch_device() if backend == "nccl" else torch.device("cpu")
        # Pieces for rank 0 travel by what moves the memory that they are in.
        self._group = None if backend == "nccl" else control
        if backend == "nccl":
            # All ranks have met in it: then pieces in a batch go over its communicator. A pair's own takes 100 MB.
            dist.all_reduce(torch.zeros(1, device=device))
        table = name_table(model.architecture)
        self.buckets = divide(table.values(), model.dtype, max_bytes)
        self._owner_of = owners(exported_names(model), control)
        assert self._owner_of.keys() == table.keys(), "every parameter is exported by one rank"
        largest = max(bucket.num_bytes for bucket in self.buckets)
        num_buffers = 2 if dist.get_rank() == 0 else 1
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(num_buffers)]
        self._make_sender = lambda: _Sender(address, ServerRequests(silence_seconds, largest, key_of), backend)
        self._sender = self._make_sender() if dist.get_rank() == 0 else None

    def push(self, version: int, receivers: Receivers | None) -> PushSeconds:
        """Push the weights, see `Transport`. Raise ServerLost when a server failed: all of them are then in the middle
        of an update, those that failed are taken out, and a push of the same weights must follow before anything is
        generated."""
        if receivers is None or not receivers.late:
            return self._push(version, receivers, self._sender)
        sender = self._make_sender()  # the others stay in the group that they have with the usual one
        try:
            return self._push(version, receivers, sender)
        finally:
            sender.close()

    def _push(self, version: int, receivers: Receivers | None, sender: "_Sender | None") -> PushSeconds:
        members: list[Member] = []
        trouble: Exception | None = None
        if receivers is not None:
            assert sender is not None
            try:
                members = receivers.run(members_to_update(receivers))
                sender.begin(members)
            except Exception as error:  # a stop, say: raised below, because the other ranks are in their collectives
                trouble, sender = error, None
        seconds = PushSeconds()
        for number, bucket in enumerate(self.buckets):
            flat = self._buffers[number % len(self._buffers)][: bucket.num_bytes]
            with seconds.of("export"):
                self._collect(bucket, flat)
            if sender is not None:
                is_last = number == len(self.buckets) - 1
                with seconds.of("send"):
                    sender.send(bucket, flat, str(version) if is_last else None)
        if trouble is not None:
            raise trouble
        if receivers is not None:
            assert sender is not None
            with seconds.of("install"):
                failed = sender.end()
                receivers.run(settle(receivers, members, failed, str(version), sender.is_new))
        return seconds

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def _collect(self, bucket: Bucket, flat: Tensor) -> None:
        """Make rank 0's `flat` the whole bucket. Collective."""
        fill(flat, bucket, gathered(bucket.entries, self._parameters))
        rank, pieces = dist.get_rank(), []
        for owner, start, end in bucket.runs(self._owner_of):
            if owner != 0 and rank in (0, owner):
                how, peer = (dist.irecv, owner) if rank == 0 else (dist.isend, 0)
                pieces.append(dist.P2POp(how, flat[start:end], peer, self._group))
        for work in dist.batch_isend_irecv(pieces) if pieces else []:
            work.wait()


def owners(mine: list[str], control: Any) -> dict[str, int]:
    """Return which rank exports each parameter, by canonical name. Collective."""
    owner_of: dict[str, int] = {}
    for rank, names in enumerate(gather_objects(mine, control)):
        for name in names:
            assert name not in owner_of, f"{name} is exported twice"
            owner_of[name] = rank
    return owner_of


class _Sender:
    """Runs rank 0's end: HTTP requests beside the broadcast. What fails is remembered until `end`, so that the other
    ranks' collectives go on to theirs."""

    def __init__(self, address: str, requests: ServerRequests, backend: str) -> None:
        self._address, self._requests, self._backend = address, requests, backend
        self._group: ServerGroup | None = None
        self._joined: list[tuple[str, int]] = []  # url and number of losses of each member of the group
        self._urls: list[str] = []
        self.is_new = False
        # Names groups of this run alone: servers that outlive a run may still know the groups of the one before.
        self._run, self._number = secrets.token_hex(4), 0
        self._pending: Asked = []  # the servers' word on the bucket that is on its way
        self._brackets: set[str] = set()

    def begin(self, members: Sequence[Member]) -> None:
        self._requests.failed, self.is_new = {}, False
        if not members:
            self._failed["none"] = ServerLost("no generation server is left")
            return
        # A server that was lost and came back is no member of the old group, though its url is the same.
        present = [(member.client.url, member.num_losses) for member in members]
        if self._group is None or present != self._joined:
            self._abandon()
            self._joined, self.is_new = present, True
            self._join([url for url, _ in present])
        if not self._failed:
            self._requests.settle(self._at_brackets("/begin_weight_update"))

    def send(self, bucket: Bucket, flat: Tensor, version: str | None) -> None:
        """Start the broadcast of a bucket once the one before has arrived; `flat` must stay until the next call's end.

        version: with the last bucket, what the weights are called.
        """
        self._wait()
        if self._failed or self._group is None:
            return
        body = {
            "names": [place.name for place in bucket.tensors],
            "dtypes": [str(bucket.dtype).removeprefix("torch.")] * len(bucket.tensors),
            "shapes": [list(place.shape) for place in bucket.tensors],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,  # afterwards, see GenerationClient.flush_cache
            "weight_version": version,
        }
        asked = self._requests.ask("/update_weights_from_distributed", dict.fromkeys(self._urls, body))
        try:
            self._group.broadcast(flat)
        except GroupFailed as error:
            self._give_up(asked, error)
            for url in self._urls:  # what the servers say of it has no remedy
                if not isinstance(self._failed.get(url), ServerLost):
                    self._failed[url] = RequestRefused(str(error))
        else:
            self._pending = asked

    def end(self) -> dict[str, ServerError]:
        """Wait for what is on its way. Return why each server that failed did."""
        self._wait()
        if not self._failed:
            self._requests.settle(self._at_brackets("/end_weight_update"))
        if self._failed:
            self._abandon()
        if self.is_new and not any(isinstance(error, ServerLost) for error in self._failed.values()):
            for url, error in self._failed.items():
                if isinstance(error, Waits):  # and there is nobody that it could be waiting for
                    self._failed[url] = ServerLost(str(error))
        return self._failed

    def close(self) -> None:
        if self._group is not None:
            body = {"group_name": self._name}
            asked = self._requests.ask("/destroy_weights_update_group", dict.fromkeys(self._urls, body))
            wait([future for _, future in asked], timeout=READY_SECONDS)  # the run is over, answered or not
            self._abandon()
        self._requests.close()

    @property
    def _name(self) -> str:
        return f"weights-{self._run}-{self._number}"

    @property
    def _failed(self) -> dict[str, ServerError]:
        return self._requests.failed

    def _abandon(self) -> None:
        """Leave the group without telling anybody."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _at_brackets(self, route: str) -> Asked:
        return self._requests.ask(route, {url: {} for url in self._urls if url in self._brackets})

    def _join(self, urls: list[str]) -> None:
        """Make one group of rank 0 and all ranks of all servers."""
        self._urls = urls
        sizes, self._brackets = self._requests.ranks_of(urls)
        if self._failed:
            return
        # A push that failed has left its update open at those that did not: it holds what came, and serves none of it.
        stale = self._at_brackets("/end_weight_update")
        body = {"group_name": self._name}
        stale += self._requests.ask("/destroy_weights_update_group", dict.fromkeys(urls, body))
        for _, future in stale:
            future.exception()  # it may have neither
        self._number += 1
        group = ServerGroup(self._name, self._address, 1 + sum(sizes.values()), self._backend, self._requests.timeout)
        bodies, offset = {}, 1
        for url in urls:
            bodies[url] = join_request(group.address, group.port, offset, group.world_size, group.name, group.backend)
            offset += sizes[url]
        asked = self._requests.ask("/init_weights_update_group", bodies)
        try:
            group.join()
        except GroupFailed as error:
            self._give_up(asked, error)
            if not self._failed:  # nobody admits it
                self._failed.update({url: ServerLost(f"{url} did not join the process group") for url in urls})
        else:
            self._requests.settle(asked)
            self._group = group

    def _wait(self) -> None:
        if self._group is None:
            return
        asked, self._pending = self._pending, []
        try:
            self._group.wait()
        except GroupFailed as error:
            self._give_up(asked, error)
            if not self._failed:  # nobody admits it
                self._failed.update({url: ServerLost(f"{url}: {error}") for url in self._urls})
        else:
            self._requests.settle(asked)

    def _give_up(self, asked: Asked, error: GroupFailed) -> None:
        """Do without the group, which has closed itself, and see what the servers say."""
        log.warning("%s", error)
        self._group = None
        self._requests.settle(asked)
