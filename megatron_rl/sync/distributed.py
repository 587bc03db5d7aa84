"""Weights over a process group: rank 0 of the trainer broadcasts buckets to all servers, by SGLang's routes.

The ranks export a bucket (gather their shards, reshape) and send their pieces to rank 0, while rank 0 broadcasts the
one before. Two buckets of memory on rank 0, one elsewhere.
"""

import logging
import secrets
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import httpx
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.checkpoint.names import name_table
from megatron_rl.model.build import Model
from megatron_rl.rollout import update_group
from megatron_rl.rollout.client import RequestRefused, ServerError, ServerLost
from megatron_rl.rollout.pool import Member
from megatron_rl.rollout.versions import capabilities
from megatron_rl.sync.buckets import Bucket, divide
from megatron_rl.sync.export import exported_names, gathered
from megatron_rl.sync.transport import Receivers

log = logging.getLogger(__name__)

# A bucket must arrive at this rate, or its server counts as lost.
_SLOWEST_BYTES_PER_SECOND = 20e6
_READY_SECONDS = 2.0


class DistributedTransport:
    """The process group is made at the first push, and again when the servers are no longer the same."""

    def __init__(self, model: Model, control: Any, max_bytes: int, address: str, silence_seconds: float) -> None:
        """Collective over the gloo group `control` of all ranks. max_bytes: of a bucket, unless one parameter alone is
        larger. address: of this machine, by which the servers reach rank 0. silence_seconds: a server that does not
        answer for so long, on top of the time for the bytes, is lost."""
        self._parameters = model.parameters_by_canonical_name()
        self._dtype, self._control, self._address = model.dtype, control, address
        table = name_table(model.bailing)
        self.buckets = divide(table.values(), model.dtype, max_bytes)
        self._owner_of = _owners(exported_names(model), control)
        assert self._owner_of.keys() == table.keys(), "every parameter is exported by one rank"
        largest = max(bucket.num_bytes for bucket in self.buckets)
        num_buffers = 2 if dist.get_rank() == 0 else 1
        self._buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(num_buffers)]
        self._sender = _Sender(address, silence_seconds, largest) if dist.get_rank() == 0 else None

    def push(self, version: int, receivers: Receivers | None) -> None:
        """See `Transport`. ServerLost when a server failed: all of them are then in the middle of an update, those that
        failed are taken out, and a push of the same weights must follow before anything is generated."""
        members: list[Member] = []
        trouble: Exception | None = None
        if receivers is not None:
            assert self._sender is not None
            try:
                members = receivers.run(_members(receivers))
                self._sender.begin(members)
            except Exception as error:  # a stop, say: raised below, because the other ranks are in their collectives
                trouble = error
        sender = self._sender if trouble is None else None
        for number, bucket in enumerate(self.buckets):
            flat = self._buffers[number % len(self._buffers)][: bucket.num_bytes]
            self._collect(bucket, flat)
            if sender is not None:
                is_last = number == len(self.buckets) - 1
                sender.send(bucket, flat, self._dtype, str(version) if is_last else None)
        if trouble is not None:
            raise trouble
        if receivers is not None:
            assert sender is not None
            failed = sender.end()
            receivers.run(_settle(receivers, members, failed, str(version), sender.is_new))

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def _collect(self, bucket: Bucket, flat: Tensor) -> None:
        """Collective: rank 0's `flat` becomes the whole bucket."""
        places = dict(zip((entry.megatron for entry in bucket.entries), bucket.places, strict=True))
        for entry, tensors in gathered(bucket.entries, self._parameters):
            for place, tensor in zip(places[entry.megatron], tensors, strict=True):
                flat[place.start : place.end].view(self._dtype).view(place.shape).copy_(tensor)
        for owner, start, end in bucket.runs(self._owner_of):
            if owner == 0:
                continue
            if dist.get_rank() == owner:
                dist.send(flat[start:end], dst=0, group=self._control)
            elif dist.get_rank() == 0:
                dist.recv(flat[start:end], src=owner, group=self._control)


async def _members(receivers: Receivers) -> list[Member]:
    """Everyone that shall have the weights: those that serve, and those that came back and lack them. By url, so that
    the group stays the same where they do."""
    members = [*receivers.pool.serving, *await receivers.pool.recovered()]
    return sorted(members, key=lambda member: member.client.url)


async def _settle(
    receivers: Receivers, members: Sequence[Member], failed: dict[str, ServerError], version: str, is_new: bool
) -> None:
    """is_new: the group was made for this push."""
    pool = receivers.pool
    if failed:
        for member in members:
            error = failed.get(member.client.url)
            if isinstance(error, ServerLost):
                pool.take_out(member, str(error))
        # A server that is there but refuses has lost a peer, or is not the one that joined the group any more: again,
        # in a new group. Where that is refused though nobody was lost, there is a reason that will not go away.
        lost = any(isinstance(error, ServerLost) for error in failed.values())
        kind = ServerLost if lost or not is_new else RequestRefused
        reasons = "; ".join(map(str, failed.values()))
        raise kind(f"weights {version} did not reach all {len(members)} servers: {reasons}")
    pool.assume(None, version)
    for member in members:
        if member.out is not None:
            pool.put_back(member)
    await pool.flush_caches()


def _owners(mine: list[str], control: Any) -> dict[str, int]:
    """Which rank exports each parameter, by canonical name."""
    gathered_names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered_names, mine, group=control)
    owner_of: dict[str, int] = {}
    for rank, names in enumerate(gathered_names):
        for name in names:
            assert name not in owner_of, f"{name} is exported twice"
            owner_of[name] = rank
    return owner_of


class _Waits(RequestRefused):
    """The server is there, but a request has not been answered in time: it waits for others of its group."""


class _Sender:
    """Rank 0's end: HTTP requests in threads beside the broadcast. What fails is remembered until `end`, so that the
    other ranks' collectives go on to theirs."""

    def __init__(self, address: str, silence_seconds: float, largest_bytes: int) -> None:
        self._address = address
        self._timeout = silence_seconds + largest_bytes / _SLOWEST_BYTES_PER_SECOND
        self._group: dist.ProcessGroup | None = None
        self._joined: list[tuple[str, int]] = []  # url and number of losses of each member of the group
        self._urls: list[str] = []
        self.is_new = False
        # Of this run alone: servers that outlive a run may still know the groups of the one before.
        self._run, self._number = secrets.token_hex(4), 0
        self._http: dict[str, httpx.Client] = {}
        # One for each server, made as they are needed: a rendezvous keeps all of them waiting for the last.
        self._threads = ThreadPoolExecutor(max_workers=4096, thread_name_prefix="weights")
        self._pending: tuple[update_group.Waitable, list[tuple[str, Future[None]]]] | None = None
        self._failed: dict[str, ServerError] = {}
        self._brackets: set[str] = set()

    def begin(self, members: Sequence[Member]) -> None:
        self._failed, self.is_new = {}, False
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
            self._at_all("/begin_weight_update", {}, among=self._brackets)

    def send(self, bucket: Bucket, flat: Tensor, dtype: torch.dtype, version: str | None) -> None:
        """Start the broadcast of a bucket once the one before has arrived; `flat` must stay until the next call's end.

        version: with the last bucket, what the weights are called.
        """
        self._wait()
        if self._failed or self._group is None:
            return
        body = {
            "names": [place.name for place in bucket.tensors],
            "dtypes": [str(dtype).removeprefix("torch.")] * len(bucket.tensors),
            "shapes": [list(place.shape) for place in bucket.tensors],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,  # afterwards, see GenerationClient.flush_cache
            "weight_version": version,
        }
        asked = self._ask("/update_weights_from_distributed", body, self._urls)
        self._pending = update_group.broadcast(self._group, flat), asked

    def end(self) -> dict[str, ServerError]:
        """Wait for what is on its way; returns why each server that failed did."""
        self._wait()
        if not self._failed:
            self._at_all("/end_weight_update", {}, among=self._brackets)
        if self._failed:
            self._abandon()
        if self.is_new and not any(isinstance(error, ServerLost) for error in self._failed.values()):
            for url, error in self._failed.items():
                if isinstance(error, _Waits):  # and there is nobody that it could be waiting for
                    self._failed[url] = ServerLost(str(error))
        return self._failed

    def close(self) -> None:
        if self._group is not None:
            asked = self._ask("/destroy_weights_update_group", {"group_name": self._name}, self._urls)
            wait([future for _, future in asked], timeout=_READY_SECONDS)  # the run is over, answered or not
            self._abandon()
        for http in self._http.values():
            http.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def _name(self) -> str:
        return f"weights-{self._run}-{self._number}"

    def _abandon(self) -> None:
        """Leave the group without a word; gloo closes its connections with the last reference."""
        if self._group is not None:
            update_group.leave(self._group)
            self._group = None

    def _join(self, urls: list[str]) -> None:
        """One group of rank 0 and all ranks of all servers."""
        self._urls = urls
        self._brackets = set()
        sizes = []
        for url in urls:
            try:
                info = self._client(url).get("/server_info", timeout=self._timeout).json()
                sizes.append(int(info.get("tp_size") or 1))
                if capabilities(str(info.get("version", ""))).weight_update_sessions:
                    self._brackets.add(url)
            except (httpx.HTTPError, ValueError) as error:
                self._failed[url] = ServerLost(f"{url}/server_info: {error or type(error).__name__}")
        if self._failed:
            return
        # A push that failed has left its update open at those that did not: it holds what came, and serves none of it.
        stale = self._ask("/end_weight_update", {}, [url for url in urls if url in self._brackets])
        stale += self._ask("/destroy_weights_update_group", {"group_name": self._name}, urls)
        for _, future in stale:
            future.exception()  # it may have neither
        self._number += 1
        world_size = 1 + sum(sizes)
        store = update_group.host_store(self._address, world_size, self._timeout)
        asked, offset = [], 1
        for url, size in zip(urls, sizes, strict=True):
            body = {
                "master_address": self._address,
                "master_port": store.port,
                "rank_offset": offset,
                "world_size": world_size,
                "group_name": self._name,
                "backend": "gloo",
            }
            asked += self._ask("/init_weights_update_group", body, [url])
            offset += size
        try:
            self._group = update_group.join(
                self._address, store.port, 0, world_size, self._name, "gloo", self._timeout, store=store
            )
        except (RuntimeError, dist.DistError) as error:
            log.warning("the process group for weights was not joined by all: %s", str(error).splitlines()[0])
            del store  # its end tells those that still wait for the others
        self._note_failures(asked)
        if self._group is None and not self._failed:  # nobody admits it
            self._failed = {url: ServerLost(f"{url} did not join the process group") for url in urls}

    def _wait(self) -> None:
        if self._pending is None:
            return
        work, asked = self._pending
        self._pending = None
        failed = False
        try:
            work.wait()
        except RuntimeError as error:
            log.warning("the broadcast of weights failed: %s", str(error).splitlines()[0])
            failed = True
        if failed:
            # Before their answers are waited for: the end of its connections tells a server that nothing will come.
            del work
            self._abandon()
        self._note_failures(asked)
        if failed and not self._failed:  # nobody admits it
            self._failed = {url: ServerLost(f"{url}: the broadcast failed") for url in self._urls}

    def _at_all(self, route: str, body: dict[str, Any], among: set[str]) -> None:
        self._note_failures(self._ask(route, body, [url for url in self._urls if url in among]))

    def _ask(self, route: str, body: dict[str, Any], urls: Sequence[str]) -> list[tuple[str, "Future[None]"]]:
        return [(url, self._threads.submit(self._post, url, route, body)) for url in urls]

    def _note_failures(self, asked: Sequence[tuple[str, "Future[None]"]]) -> None:
        for url, future in asked:
            error = future.exception()
            if isinstance(error, ServerError):
                self._failed.setdefault(url, error)
            elif error is not None:
                raise error

    def _client(self, url: str) -> httpx.Client:
        if url not in self._http:
            self._http[url] = httpx.Client(base_url=url, trust_env=False)
        return self._http[url]

    def _post(self, url: str, route: str, body: dict[str, Any]) -> None:
        """RequestRefused unless it is answered with {"success": true}; ServerLost when nobody is there to answer."""
        try:
            answer = self._client(url).post(route, json=body, timeout=self._timeout)
            found = answer.json()
        except httpx.TimeoutException as error:
            text = f"{url}{route}: {error or type(error).__name__} after {self._timeout:.0f} s"
            raise (_Waits(text) if self._is_there(url) else ServerLost(text)) from None
        except (httpx.HTTPError, ValueError) as error:
            raise ServerLost(f"{url}{route}: {error or type(error).__name__}") from None
        if answer.status_code != 200 or not isinstance(found, dict) or not found.get("success"):
            kind = RequestRefused if answer.status_code < 500 else ServerLost
            message = found.get("message", found) if isinstance(found, dict) else found
            raise kind(f"{url}{route} answered {answer.status_code}: {message}")

    def _is_there(self, url: str) -> bool:
        try:
            return self._client(url).get("/ready", timeout=_READY_SECONDS).status_code == 200
        except httpx.HTTPError:
            return False
