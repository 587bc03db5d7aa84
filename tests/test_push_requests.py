"""Tests pushes to servers that are silent, refuse or are gone, and to a group that nobody joins."""

import socket
import threading
import time

import pytest
from liar import Exchange, liar
from ports import free_port

from megatron_rl.keys import no_key
from megatron_rl.rollout.client import RequestRefused, ServerLost
from megatron_rl.sync.requests import ServerRequests, Waits
from megatron_rl.sync.server_group import GroupFailed, ServerGroup


def test_each_server_that_fails_is_remembered_with_the_reason() -> None:
    hangs = threading.Event()

    def ready(exchange: Exchange) -> None:
        exchange.say(b"", 503 if hangs.is_set() else 200)

    faults = {
        "well": lambda exchange: exchange.say(b'{"success": true}'),
        "refused": lambda exchange: exchange.say(b'{"success": false, "message": "no such group"}'),
        "silent": lambda exchange: time.sleep(3),
        "ready": ready,
    }
    gone = f"http://127.0.0.1:{free_port()}"
    with liar(gone, **faults) as url:
        requests = ServerRequests(silence_seconds=0.5, largest_bytes=0, key_of=no_key)
        try:
            requests.settle(requests.ask("/well", {url: {}}))
            assert requests.failed == {}
            requests.settle(requests.ask("/refused", {url: {}, gone: {}}))
            refused, lost = requests.failed[url], requests.failed[gone]
            assert type(refused) is RequestRefused and "no such group" in str(refused)
            assert isinstance(lost, ServerLost) and gone in str(lost)
            requests.failed = {}
            requests.settle(requests.ask("/silent", {url: {}}))
            assert isinstance(requests.failed[url], Waits), "it answers /ready all the same"
            hangs.set()
            requests.failed = {}
            requests.settle(requests.ask("/silent", {url: {}}))
            assert isinstance(requests.failed[url], ServerLost)
        finally:
            requests.close()


def test_a_group_that_nobody_joins_closes_its_store_before_it_says_so() -> None:
    group = ServerGroup("g", "127.0.0.1", 2, "gloo", 0.5)
    socket.create_connection(("127.0.0.1", group.port), timeout=5).close()
    with pytest.raises(GroupFailed, match="the process group for weights was not joined by all: ") as failed:
        group.join()
    deadline = time.monotonic() + 5
    while True:  # the store's thread ends a moment later
        try:
            socket.create_connection(("127.0.0.1", group.port), timeout=5).close()
        except ConnectionRefusedError:
            break
        assert time.monotonic() < deadline, "somebody still holds the store"
        time.sleep(0.02)
    assert failed.value.__context__ is None, "an error that was being handled would hold the group"
