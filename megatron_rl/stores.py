"""This module opens torch's TCPStores, by which the processes of a group find each other, at one address only.

A plain TCPStore listens on every interface of the machine, and serves whoever connects.
"""

import contextlib
import datetime
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from megatron_rl.errors import Fault
from megatron_rl.place import SOCKET_VARIABLE, Place, remedy

log = logging.getLogger(__name__)

_LOOK_EVERY_SECONDS = 0.1
_TELL_AFTER_SECONDS, _TELL_EVERY_SECONDS = 5.0, 30.0


def host_store(address: str, world_size: int, timeout_seconds: float, port: int = 0) -> dist.TCPStore:
    """Make rank 0's store at a port of `address`, which `.port` tells; 0 picks one.

    The port is bound by the store itself, so nobody else can take it between its choice and its use.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=max(64, world_size))
    return _store_of(listener, address, world_size, timeout_seconds)


def _store_of(listener: socket.socket, address: str, world_size: int, timeout_seconds: float) -> dist.TCPStore:
    return dist.TCPStore(
        address,
        listener.getsockname()[1],
        world_size,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join(place: Place, deadline_seconds: float, check: Callable[[], None] = lambda: None) -> dist.Store:
    """Wait until every rank of the world has connected, and return the store at which they have met. Between ranks of
    one machine it is on loopback.

    check: called ten times a second; what it raises ends the wait. The wait logs which ranks are missing. ValueError
    after deadline_seconds (train.phase_deadline_seconds) and where the port is taken; Fault when rank 0 ends.
    """
    if place.world_size == 1:
        return dist.HashStore()  # no port: a single process cannot collide with another run on this machine
    is_local = place.world_size == place.local_world_size
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # which has a store already, for all ranks
    if is_local and not of_torchrun:
        place = replace(place, address="127.0.0.1")
    waiting = _Waiting(place, deadline_seconds, check)
    if place.rank == 0 and not of_torchrun:
        store = _hosted(place, is_local, deadline_seconds)
    else:
        store = _reached(place, waiting)
    try:
        _wait_for_all(store, place, waiting)
    except dist.DistError as error:
        raise Fault(
            f"rank {place.rank}: the store at {waiting.where} is gone ({_first_line(error)}) before all ranks had "
            "come; the log of rank 0 says why"
        ) from None
    store.set_timeout(datetime.timedelta(seconds=deadline_seconds))
    return store


class _Waiting:
    """Holds the state of a wait of this rank for others. The wait says what it waits for, can be interrupted, and
    ends."""

    def __init__(self, place: Place, deadline_seconds: float, check: Callable[[], None]) -> None:
        self.where = f"{place.address}:{place.port}"
        self._place, self._deadline, self._check = place, deadline_seconds, check
        self._give_up = time.monotonic() + deadline_seconds
        self._tell_at = time.monotonic() + _TELL_AFTER_SECONDS

    def pause(self, missing: Callable[[], str], tells: bool = True) -> None:
        """Wait a moment. missing: names what is waited for. tells: log it now and then. ValueError after the
        deadline."""
        self._check()
        now = time.monotonic()
        if now > self._give_up:
            raise ValueError(
                f"{self._told(missing())} after {self._deadline:g} s (train.phase_deadline_seconds); see the logs of "
                f"the other ranks, or start them; {remedy()}"
            )
        if tells and now > self._tell_at:
            self._tell_at = now + _TELL_EVERY_SECONDS
            log.warning("%s; %s", self._told(missing()), remedy())
        time.sleep(_LOOK_EVERY_SECONDS)

    def _told(self, missing: str) -> str:
        return (
            f"rank {self._place.rank} of {self._place.world_size} (RANK, WORLD_SIZE) waits at {self.where} "
            f"(MASTER_ADDR, MASTER_PORT) for {missing}"
        )


def _hosted(place: Place, is_local: bool, deadline_seconds: float) -> dist.TCPStore:
    """Make the store of rank 0: on loopback when all ranks are here, else on every interface, since nobody knows which
    one the others use."""
    given = os.environ.pop(SOCKET_VARIABLE, None)
    try:
        if given is not None:
            listener = socket.socket(fileno=int(given))
        else:
            listener = _listening(place.address if is_local else "", place.port, place.world_size)
    except OSError as error:
        raise ValueError(
            f"rank 0 cannot listen on MASTER_PORT {place.port} of this machine ({error.strerror}); another run may "
            f"have it: set another one; {remedy()}"
        ) from None
    return _store_of(listener, "127.0.0.1", place.world_size, deadline_seconds)


def _listening(address: str, port: int, backlog: int) -> socket.socket:
    """Listen at `address`. Where that is empty, listen at every address of both families that this machine has."""
    if not address and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # it may be built in and switched off
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server((address, port), backlog=backlog)


def _reached(place: Place, waiting: _Waiting) -> dist.TCPStore:
    """Wait for the store of rank 0 or of torchrun, and connect to it."""
    problem = ""

    def missing() -> str:
        return f"rank 0, which is not there ({problem})"

    while True:
        try:
            with socket.create_connection((place.address, place.port), timeout=1) as tried:
                if tried.getsockname() != tried.getpeername():
                    break
                # The kernel chose this very port for our end, and TCP connected the socket to itself. Closed as usual
                # it would keep rank 0 from the port for a minute.
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            problem = "nobody listens"
        except OSError as error:
            problem = str(error)
        waiting.pause(missing)
    # torch's constructor runs in a thread: if another program has the port, it waits for ever and sees no signal.
    found: list[dist.TCPStore | Exception] = []

    def connect() -> None:
        timeout = datetime.timedelta(seconds=10)
        try:
            found.append(
                dist.TCPStore(
                    place.address,
                    place.port,
                    place.world_size,
                    is_master=False,
                    timeout=timeout,
                    wait_for_workers=False,
                )
            )
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=connect, name="join", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_EVERY_SECONDS)
        if thread.is_alive():
            waiting.pause(lambda: "an answer; what listens there may be another program than rank 0")
    (store,) = found
    if isinstance(store, Exception):
        raise Fault(f"rank {place.rank}: no store at {waiting.where}: {_first_line(store)}; see the log of rank 0")
    return store


def _wait_for_all(store: dist.TCPStore, place: Place, waiting: _Waiting) -> None:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may keep its store
    ranks = dist.PrefixStore(f"megatron_rl/join/{attempt}", store)
    if ranks.add(str(place.rank), 1) > 1:
        raise ValueError(
            f"another process has come to {waiting.where} as rank {place.rank} of this run; give each a RANK of its "
            f"own; {remedy()}"
        )
    ranks.add("come", 1)

    def missing() -> str:
        absent = [rank for rank in range(place.world_size) if not ranks.check([str(rank)])]
        return f"{len(absent)} of {place.world_size} ranks: {_spans(absent)}"

    while ranks.add("come", 0) < place.world_size:
        waiting.pause(missing, tells=place.rank == 0)


def _spans(numbers: list[int]) -> str:
    """Write ascending numbers in words: "1, 4-7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
