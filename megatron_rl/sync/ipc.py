"""Gives weights to the servers of the same node: they open the trainer's memory and copy from it.

The ranks that hold the whole model between them, as a rule those of one node (sync/spans.py), gather a bucket, and then
each of them has it. Every rank of a server opens the bucket on its own GPU. The first rank of each node talks to the
servers there. While they copy one bucket, the next is filled in other memory: torch frees the memory of a bucket only
when the last process that opened it has let go of it and its copies are done.

On a CPU the same goes through shared memory. Not run on a GPU yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.checkpoint.names import TensorMapping, name_table
from megatron_rl.device import backend, forget_shared, torch_device
from megatron_rl.gpus import opened_rank
from megatron_rl.keys import KeyOf, no_key
from megatron_rl.model.build import Model, tensor_group
from megatron_rl.rollout.client import ServerError, ServerLost
from megatron_rl.rollout.member import Member
from megatron_rl.sync.all_ranks import broadcast_object, gather_objects, on_all_ranks
from megatron_rl.sync.buckets import Bucket, divide
from megatron_rl.sync.export import exported_names, fill, gathered
from megatron_rl.sync.handles import serialized
from megatron_rl.sync.requests import Asked, ServerRequests, Waits
from megatron_rl.sync.spans import gather_spans, ranks_by_node
from megatron_rl.sync.transport import PushSeconds, Receivers, members_to_update, settle


@dataclass(frozen=True, slots=True, kw_only=True)
class _PushOrder:
    """Tells the other ranks what rank 0 has decided before anything is sent. urls: of the servers that take part; None:
    no push."""

    urls: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opener:
    """Names a tensor-parallel rank of a server, which opens the buckets of one rank of its node."""

    url: str
    server_rank: int
    node_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Handle:
    """Holds what an opener is given of a bucket: how it gets at the bytes."""

    url: str
    server_rank: int
    payload: str


class IpcTransport:
    """Hands weights to the servers of each node. It takes two buckets of memory on every rank during a push, none
    otherwise."""

    def __init__(
        self,
        model: Model,
        control: Any,
        max_bytes: int,
        node: int,
        local_urls: Sequence[str],
        num_servers: int,
        num_gpus: int,
        silence_seconds: float,
        key_of: KeyOf = no_key,
    ) -> None:
        """Find out which ranks gather the model together. Collective over the gloo group `control` of all ranks. node:
        of this rank. local_urls: of this node's servers, by their number; on its first rank, empty elsewhere.
        num_servers, num_gpus: of each node; 0 GPUs on a CPU. Each GPU has one training rank, in their order. max_bytes,
        silence_seconds and key_of: see DistributedTransport."""
        self._parameters = model.parameters_by_canonical_name()
        self._control, self._local_urls = control, tuple(local_urls)
        self._num_servers, self._num_gpus = num_servers, num_gpus
        table = name_table(model.architecture)
        self.buckets = divide(table.values(), model.dtype, max_bytes)
        rank = dist.get_rank()
        node_of = gather_objects(node, control)
        exports = gather_objects(exported_names(model, takes_part=lambda _: True), control)
        assert set().union(*exports) == table.keys(), "every parameter is exported by some rank"
        spans = gather_spans(node_of, exports)
        self._exporters = [set(span.owner_of.items()) for span in spans]
        self._span, self._span_group = _own_group([span.ranks for span in spans], backend(), spans)
        nodes = ranks_by_node(node_of)
        self._node_ranks, self._node_group = _own_group(nodes, "gloo", nodes)
        assert num_gpus in (0, len(self._node_ranks)), "preflight.check_seats"
        largest = max(bucket.num_bytes for bucket in self.buckets)
        requests = ServerRequests(silence_seconds, largest, key_of)
        self._sender = _Sender(requests) if rank == self._node_ranks[0] else None

    def push(self, version: int, receivers: Receivers | None) -> PushSeconds:
        """Push the weights, see `Transport`. Raise ServerLost when a server failed: a push of the same weights must
        follow before anything is generated."""
        members: list[Member] = []
        trouble: Exception | None = None
        order = _PushOrder(urls=None)
        if receivers is not None:
            try:
                members = receivers.run(members_to_update(receivers))
                order = _PushOrder(urls=tuple(member.client.url for member in members))
            except Exception as error:  # a stop, say: raised below, once the other ranks know that there is no push
                trouble = error
        order = broadcast_object(order, 0, self._control)
        if trouble is not None:
            raise trouble
        seconds = PushSeconds()
        if order.urls is None:
            return seconds
        failed = self._hand_over(order.urls, version, seconds)
        with seconds.of("install"):
            forget_shared()
            if receivers is not None:
                if not members:
                    failed["none"] = ServerLost("no generation server is left")
                receivers.run(settle(receivers, members, failed, str(version), is_fresh=True))
        return seconds

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def _hand_over(self, urls: Sequence[str], version: int, seconds: PushSeconds) -> dict[str, ServerError]:
        """Fill every bucket and have the servers copy it. Collective. Return why each server of any node that failed
        did; then nobody uses the memory of a bucket any more."""
        openers = self._openers(urls)
        in_use: list[Tensor] = []
        for number, bucket in enumerate(self.buckets):
            with seconds.of("export"):
                flat = self._filled(bucket)
            in_use.append(flat)
            handles = self._handles(bucket, flat, openers)
            with seconds.of("send"):
                if self._sender is not None:
                    is_last = number == len(self.buckets) - 1
                    self._sender.send(handles, str(version) if is_last else None)
                # From here on the bucket before is copied, on every rank of the node.
                dist.barrier(self._node_group)
            del in_use[:-1]
        with seconds.of("install"):
            failed = self._sender.end() if self._sender is not None else {}
            return {url: error for one in gather_objects(failed, self._control) for url, error in one.items()}

    def _openers(self, urls: Sequence[str]) -> list[_Opener]:
        """Return the server ranks that open this rank's buckets. Collective over the node."""
        openers: list[_Opener] = []
        if self._sender is not None:
            numbers = {url: number for number, url in enumerate(self._local_urls)}
            for url, size in self._sender.begin([url for url in self._local_urls if url in urls]).items():
                for rank in range(size):
                    node_rank = opened_rank(numbers[url], rank, self._num_servers, self._num_gpus)
                    openers.append(_Opener(url=url, server_rank=rank, node_rank=node_rank))
        openers = broadcast_object(openers, self._node_ranks[0], self._node_group)
        own = self._node_ranks.index(dist.get_rank())
        return [opener for opener in openers if opener.node_rank == own]

    def _filled(self, bucket: Bucket) -> Tensor:
        """Return the whole bucket, uint8 [bytes]. Collective."""
        rank, owner_of = dist.get_rank(), self._span.owner_of
        flat = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=torch_device())
        found = gathered(bucket.entries, self._parameters, takes_part=self._takes_part)
        own = ((entry, tensors) for entry, tensors in found if owner_of[entry.megatron] == rank)
        fill(flat, bucket, own)
        if len(self._span.ranks) > 1:
            for owner, start, end in bucket.runs(owner_of):
                dist.broadcast(flat[start:end], src=owner, group=self._span_group)
        return flat

    def _takes_part(self, entry: TensorMapping) -> bool:
        """Tell whether the first rank of this rank's tensor group exports the entry to some span."""
        first = dist.get_process_group_ranks(tensor_group(entry))[0]
        return any((entry.megatron, first) in exporters for exporters in self._exporters)

    def _handles(self, bucket: Bucket, flat: Tensor, openers: Sequence[_Opener]) -> list[_Handle]:
        """Return the handles of all ranks of the node. Collective over the node."""

        def make() -> list[_Handle]:
            return [
                _Handle(
                    url=opener.url,
                    server_rank=opener.server_rank,
                    payload=serialized(flat, bucket.tensors, bucket.dtype),
                )
                for opener in openers
            ]

        return [handle for one in on_all_ranks(make, self._node_group) for handle in one]


def _own_group(members: Sequence[Sequence[int]], kind: str, values: Sequence[Any]) -> tuple[Any, Any]:
    """Make a group for each of `members`. Collective over all ranks. Return this rank's value and group."""
    groups = [dist.new_group(list(ranks), backend=kind) for ranks in members]
    number = next(i for i, ranks in enumerate(members) if dist.get_rank() in ranks)
    return values[number], groups[number]


class _Sender:
    """Runs the end of a node's first rank: requests beside its thread, one bucket at a time. What fails is remembered
    until `end`."""

    def __init__(self, requests: ServerRequests) -> None:
        self._requests = requests
        self._brackets: set[str] = set()
        self._pending: Asked = []

    def begin(self, urls: Sequence[str]) -> dict[str, int]:
        """Begin an update. Return the tensor-parallel size of each server that takes part."""
        self._requests.failed = {}
        sizes, self._brackets = self._requests.ranks_of(urls)
        # A push that failed has left its update open at those that did not.
        for _, future in self._at_brackets("/end_weight_update"):
            future.exception()  # as a rule there is none
        self._requests.settle(self._at_brackets("/begin_weight_update"))
        return sizes

    def send(self, handles: Sequence[_Handle], version: str | None) -> None:
        """Hand a bucket over, once the one before was copied. version: with the last bucket, what the weights are
        called."""
        self._settle()
        payloads: dict[str, list[str]] = {}
        for handle in sorted(handles, key=lambda handle: (handle.url, handle.server_rank)):
            payloads.setdefault(handle.url, []).append(handle.payload)
        bodies = {
            url: {
                "serialized_named_tensors": parts,  # by tensor-parallel rank
                "load_format": "flattened_bucket",
                "flush_cache": False,  # afterwards, see GenerationClient.flush_cache
                "weight_version": version,
            }
            for url, parts in payloads.items()
            if url not in self._requests.failed
        }
        self._pending = self._requests.ask("/update_weights_from_tensor", bodies)

    def end(self) -> dict[str, ServerError]:
        """Wait for the last bucket. Return why each server that failed did."""
        self._settle()
        self._requests.settle(self._at_brackets("/end_weight_update"))
        failed = self._requests.failed
        # One that is there and does not answer waits for nobody here: it hangs.
        return {url: ServerLost(str(e)) if isinstance(e, Waits) else e for url, e in failed.items()}

    def close(self) -> None:
        self._requests.close()

    def _settle(self) -> None:
        asked, self._pending = self._pending, []
        self._requests.settle(asked)

    def _at_brackets(self, route: str) -> Asked:
        urls = [url for url in sorted(self._brackets) if url not in self._requests.failed]
        return self._requests.ask(route, {url: {} for url in urls})
