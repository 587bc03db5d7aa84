"""Tests the store where ranks meet: no rank takes another process for rank 0."""

import socket
import threading
from dataclasses import replace
from typing import Any

import pytest
from ports import free_port

from megatron_rl.place import Place
from megatron_rl.stores import join


def test_a_connection_to_itself_is_not_taken_for_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a socket that is connected to itself, as the kernel may do when nobody listens at an ephemeral port."""
    place = Place(rank=1, world_size=2, local_rank=1, local_world_size=2, port=free_port())
    connect = socket.create_connection
    tries: list[tuple[str, int]] = []

    def to_itself_at_first(address: tuple[str, int], timeout: float) -> socket.socket:
        tries.append(address)
        return connect(address, timeout=timeout, **({"source_address": address} if len(tries) == 1 else {}))

    monkeypatch.setattr(socket, "create_connection", to_itself_at_first)
    stores: list[Any] = []
    rank_0 = threading.Thread(target=lambda: stores.append(join(replace(place, rank=0, local_rank=0), 30)))

    def start_rank_0() -> None:
        if rank_0.ident is None:
            rank_0.start()

    stores.append(join(place, 30, check=start_rank_0))
    rank_0.join()
    stores[0].set("told by one", "to the other")
    assert stores[1].get("told by one") == b"to the other"
    assert len(tries) >= 2
