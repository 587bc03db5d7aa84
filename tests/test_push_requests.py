"""Tests pushes to servers that are silent, refuse or are gone, and to a group that nobody joins."""

import socket
import threading

import pytest
from liar import Exchange, liar
from ports import free_port
from until import wait_until

from megatron_rl.keys import no_key
from megatron_rl.rollout.client import RequestRefused, ServerLost
from megatron_rl.sync import requests as requests_module
from megatron_rl.sync.requests import ServerRequests, Waits
from megatron_rl.sync.server_group import GroupFailed, ServerGroup


def test_each_server_that_fails_is_remembered_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "READY_SECONDS", 240.0)
    hangs, is_over = threading.Event(), threading.Event()

    def ready(exchange: Exchange) -> None:
        exchange.say(b"", 503 if hangs.is_set() else 200)

    faults = {
        "well": lambda exchange: exchange.say(b'{"success": true}'),
        "refused": lambda exchange: exchange.say(b'{"success": false, "message": "no such group"}'),
        "silent": lambda exchange: is_over.wait() and None,
        "ready": ready,
    }
    gone = f"http://127.0.0.1:{free_port()}"
    with liar(gone, **faults) as url:
        # Who answers may be slow.
        patient, requests = (ServerRequests(seconds, largest_bytes=0, key_of=no_key) for seconds in (240.0, 0.5))
        try:
            patient.settle(patient.ask("/well", {url: {}}))
            assert patient.failed == {}
            patient.settle(patient.ask("/refused", {url: {}, gone: {}}))
            refused, lost = patient.failed[url], patient.failed[gone]
            assert type(refused) is RequestRefused and "no such group" in str(refused)
            assert isinstance(lost, ServerLost) and gone in str(lost)
            requests.settle(requests.ask("/silent", {url: {}}))
            assert isinstance(requests.failed[url], Waits), "it answers /ready all the same"
            hangs.set()
            requests.failed = {}
            requests.settle(requests.ask("/silent", {url: {}}))
            assert isinstance(requests.failed[url], ServerLost)
        finally:
            is_over.set()
            patient.close()
            requests.close()


def test_a_group_that_nobody_joins_closes_its_store_before_it_says_so() -> None:
    group = ServerGroup("g", "127.0.0.1", 2, "gloo", 0.5)
    socket.create_connection(("127.0.0.1", group.port), timeout=240).close()
    with pytest.raises(GroupFailed, match="the process group for weights was not joined by all: ") as failed:
        group.join()

    def is_closed() -> bool:
        try:
            socket.create_connection(("127.0.0.1", group.port), timeout=240).close()
        except ConnectionRefusedError:
            return True
        return False

    wait_until(is_closed, "nobody holds the store")  # its thread ends a moment later
    assert failed.value.__context__ is None, "an error that was being handled would hold the group"
