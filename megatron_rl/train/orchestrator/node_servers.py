"""Starts the generation servers of a run. Each node's first rank owns the servers of its node, and rank 0 knows all
their urls."""

import ipaddress
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from megatron_rl.config.distillation import DistillationSection
from megatron_rl.config.load import secret_variables
from megatron_rl.config.schema import RlConfig
from megatron_rl.errors import StopRequested
from megatron_rl.place import own_place
from megatron_rl.rollout.ports import address_towards, is_here
from megatron_rl.rollout.server import check_same_torch
from megatron_rl.rollout.supervisor import ServerSupervisor, start_servers, wish
from megatron_rl.sync.all_ranks import broadcast_object, gather_objects
from megatron_rl.train.run.signals import StopSignals

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Started:
    """Holds the result of starting a node's servers. keys: by url. problem: why they did not start."""

    keys: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    is_stopped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Address:
    """Holds rank 0's address, or why there is none. is_beside: one of the servers is on its machine."""

    address: str = ""
    is_beside: bool = False
    problem: str | None = None


class NodeServers:
    """Knows the servers of all nodes, and owns those of this node on its first rank. `close()` ends these.

    rollout: their settings. urls: of all nodes' servers, on every rank. address: by which they reach rank 0. beside:
    one of them is on rank 0's machine. Both are known where weights go over a process group. supervisor: of this node's
    servers, on its first rank. node: its number.
    """

    def __init__(
        self,
        config: RlConfig,
        weights: Path,
        control: Any,
        signals: StopSignals,
        keys: Mapping[str, str],
        teacher: DistillationSection | None = None,
    ) -> None:
        """Start the servers on the model directory `weights` and wait until they serve, or take those of rollout.urls.
        Collective over the gloo group `control`.

        keys: of the latter, by their url. teacher: they are its servers and not the policy's, or those of
        distillation.urls. Raises on every rank ValueError when a server did not start, and StopRequested when a signal
        came first.
        """
        self.rollout = config.rollout if teacher is None else teacher.as_rollout(config.rollout)
        self._dtype, self._name = (config.model.dtype, "") if teacher is None else (teacher.dtype, "teacher_")
        self.supervisor: ServerSupervisor | None = None
        self._keys = dict(keys)
        self.node = own_place().node
        # Several nodes share the run directory in any case.
        self._wishes = config.run_dir / "restarts" if own_place().num_nodes > 1 and not self.rollout.urls else None
        self.urls = list(self.rollout.urls)
        try:
            if not self.urls:
                self._start(config, weights, control, signals)
            self.address, self.beside = "", False
            if config.sync.transport == "distributed" and teacher is None:
                self.address, self.beside = _agreed_address(self.urls, control)
        except BaseException:
            self.close()
            raise

    def _start(self, config: RlConfig, weights: Path, control: Any, signals: StopSignals) -> None:
        mine = _Started()
        if own_place().local_rank == 0:
            node = self.node
            name = self._name + ("server" if node == 0 else f"node{node}_server")
            try:
                if config.sync.transport == "ipc":
                    check_same_torch(self.rollout)
                self.supervisor = start_servers(
                    weights,
                    config.run_dir,
                    self.rollout,
                    self._dtype,
                    name=name,
                    host=node_address(),
                    secret_variables=secret_variables(config),
                    wishes=self._wishes,
                )
                self.supervisor.wait_ready(signals.check)
                mine.keys = {url: self.supervisor.key_of(url) for url in self.supervisor.urls}
            except StopRequested:
                mine.is_stopped = True
            except (ValueError, OSError) as error:
                mine.problem = (
                    f"node {node} ({socket.gethostname()}): {error}" if own_place().num_nodes > 1 else str(error)
                )
        found = gather_objects(mine, control)
        if any(one.is_stopped for one in found):
            raise StopRequested("stopped while the servers started")
        for one in found:
            if one.problem is not None:
                raise ValueError(one.problem)
        for one in found:
            self._keys |= one.keys
        self.urls = list(self._keys)

    def key_of(self, url: str) -> str:
        """Return the key of the server at `url`, to be sent now. Raise ServerLost while it is not known who listens
        there, which only its own node can tell."""
        if self.supervisor is not None and url in self.supervisor.urls:
            return self.supervisor.key_of(url)
        return self._keys[url]

    def replace(self, url: str, reason: str) -> None:
        """End the silent server at `url`, and have its node start another there. It may take seconds. Nothing happens
        to a server that this run has not started."""
        if self.supervisor is not None and url in self.supervisor.urls:
            self.supervisor.replace(url, reason)
        elif self._wishes is not None:
            try:
                wish(self._wishes, url, reason)
            except OSError as error:
                log.warning("the node of %s cannot be asked to start it again: %s", url, error)

    def close(self) -> None:
        if self.supervisor is not None:
            self.supervisor.close()


def is_one_machine(urls: Sequence[str]) -> bool:
    """Tell whether this run's ranks and servers share memory. urls: rollout.urls."""
    hosts = {urlsplit(url).hostname or "" for url in urls}
    return own_place().num_nodes == 1 and all(ipaddress.ip_address(address_towards(host)).is_loopback for host in hosts)


def node_address() -> str:
    """Return this machine's address as the other machines of the run see it; loopback when there are no others."""
    place = own_place()
    return "127.0.0.1" if place.num_nodes == 1 else address_towards(place.address)


def _agreed_address(urls: Sequence[str], control: Any) -> tuple[str, bool]:
    """Return rank 0's address, and whether one of the servers is on its machine, on every rank. Raise ValueError on
    every rank when there is no single address."""
    found = _Address()
    if dist.get_rank() == 0:
        try:
            beside = any(is_here(urlsplit(url).hostname or "") for url in urls)
            found = _Address(address=own_address(urls), is_beside=beside)
        except ValueError as error:
            found = _Address(problem=str(error))
    found = broadcast_object(found, 0, control)
    if found.problem is not None:
        raise ValueError(found.problem)
    return found.address, found.is_beside


def own_address(urls: Sequence[str]) -> str:
    """Return the address by which servers at these urls reach this machine. Raise ValueError when there is no single
    one."""
    hosts = {urlsplit(url).hostname or "" for url in urls}
    found = {host: address_towards(host) for host in sorted(hosts)}
    local = [host for host, address in found.items() if ipaddress.ip_address(address).is_loopback]
    others = {address for host, address in found.items() if host not in local}
    if local and others:
        raise ValueError(
            f"servers at {', '.join(local)} can only be reached from this machine, others are elsewhere; give every "
            "node a host name that does not resolve to loopback (MASTER_ADDR, /etc/hosts), or correct rollout.urls"
        )
    if len(others) > 1:
        raise ValueError(
            f"servers reach this machine at different addresses ({', '.join(sorted(others))}); put all into one network"
        )
    return others.pop() if others else "127.0.0.1"
