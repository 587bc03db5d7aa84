"""Replies are read as plain JSON would be, by a connection that takes every framing of HTTP/1.1."""

import asyncio
import gc
import json
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.rollout.connection import Connection, ConnectionFailed
from megatron_rl.rollout.replies import READABLE, read_reply

LOGPROBS = st.none() | st.floats(-1e4, 0) | st.integers(-9, 0)
ENDS = st.sampled_from([{"type": "stop", "matched": 3}, {"type": "length", "length": 1}, {"type": "abort"}])


@st.composite
def replies(draw: Any) -> dict[str, Any]:
    """Draw replies as SGLang and the embedded server write them."""
    tokens = draw(st.lists(st.tuples(LOGPROBS, st.integers(0, 2**31 - 1)), max_size=20))
    meta = {
        "id": "a",
        "finish_reason": draw(ENDS) | draw(st.sampled_from([{}, {"message": "why"}])),
        "output_token_logprobs": [[logprob, token, None] for logprob, token in tokens],
        "input_token_logprobs": [[None, 5, None]],
        "weight_version": draw(st.sampled_from(["0", "17", 3])),
        "e2e_latency": 0.25,
    }
    if draw(st.booleans()):
        meta["weight_versions"] = [{"version": "3", "start": 0, "end": 0}, {"version": "4", "start": 0, "end": 9}]
    return {"text": draw(st.text(max_size=5)), "output_ids": [token for _, token in tokens], "meta_info": meta}


@given(replies())
def test_a_reply_has_the_numbers_that_plain_json_has(reply: dict[str, Any]) -> None:
    found = read_reply(json.dumps(reply).encode())
    meta = reply["meta_info"]
    assert found.output_ids.dtype == np.int32
    assert found.output_ids.tolist() == reply["output_ids"]
    expected = [np.nan if one is None else np.float32(one) for one, _, _ in meta["output_token_logprobs"]]
    assert found.logprobs.dtype == np.float32
    np.testing.assert_array_equal(found.logprobs, np.array(expected, np.float32))
    assert found.meta.finish_reason.type == meta["finish_reason"]["type"]
    assert (found.meta.finish_reason.message or "") == meta["finish_reason"].get("message", "")
    assert found.meta.versions == (("4",) if "weight_versions" in meta else (str(meta["weight_version"]),))


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists) | replies(), st.data()
)
def test_whatever_else_a_server_says_raises_what_the_client_expects(reply: Any, data: Any) -> None:
    content = json.dumps(reply).encode()
    if content:
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + data.draw(st.binary(max_size=3)) + content[at + 1 :]
    try:
        found = read_reply(content)
    except READABLE:
        return
    assert found.output_ids.ndim == found.logprobs.ndim == 1


def test_reading_a_long_reply_does_not_start_the_garbage_collector() -> None:
    count = 20_000
    meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-0.5, 7, None]] * count}
    content = json.dumps({"output_ids": [7] * count, "meta_info": meta}).encode()

    def num_collections() -> int:
        return sum(generation["collections"] for generation in gc.get_stats())

    before = num_collections()
    assert read_reply(content).logprobs.tolist() == [-0.5] * count
    assert num_collections() - before <= 1
    assert len([[token] for token in range(count)]) == count
    assert num_collections() - before > 10, "a list for every token starts it, and it is counted"


# A connection ---------------------------------------------------------------------------------------------------------

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
ANSWERS = {
    "with a length": WHOLE,
    "in chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
    "that the server closes behind": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc",
    "without a length": b"HTTP/1.1 200 OK\r\n\r\nabc",
    "after an informal one": b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE,
}
REUSABLE = [ANSWERS[how] for how in ("with a length", "in chunks", "after an informal one")]
FAILURES = {
    "nothing": (b"", "the server disconnected without an answer"),
    "half": (WHOLE[:-1], "peer closed connection without sending complete message body"),
    "no HTTP": (b"hello\r\n\r\n", "illegal status line"),
    "endless headers": (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000, "Receive buffer too long"),
}


async def free() -> None:
    """Allow each reply at once, as if there were always room for its content."""


async def asked_twice(answer: bytes, piece: int = 2**16, admitted: Any = None) -> tuple[list[Any], bool]:
    """Return the results of up to two requests over one connection, and whether a third could follow.

    piece: bytes that the server writes at once. It closes after an answer after which no other can come.
    """
    received = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not reader.at_eof():
            received.extend(await reader.read(2**16))
            while b'{"x":1}' in received:
                del received[: received.index(b'{"x":1}') + 7]
                for at in range(0, len(answer), piece):
                    writer.write(answer[at : at + piece])
                    await writer.drain()
                    await asyncio.sleep(0)
                if answer not in REUSABLE:
                    writer.close()
                    return
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        connection = await Connection.open(urlsplit(f"http://{host}:{port}"), None)
        found = []
        while connection.is_open and len(found) < 2:
            found.append(await asyncio.wait_for(connection.ask("POST", "/x", b'{"x":1}', {"A": "b"}, admitted), 240))
        is_open = connection.is_open
        connection.close()
        return found, is_open
    finally:
        server.close()


@pytest.mark.parametrize("admitted", [None, free])
@pytest.mark.parametrize("piece", [1, 2**16])
@pytest.mark.parametrize("how", ["with a length", "in chunks", "after an informal one"])
def test_a_connection_is_used_again(how: str, piece: int, admitted: Any) -> None:
    """Check that a connection is used again, also if head and content of an answer come at once.

    The content then comes before it may be read.
    """
    assert asyncio.run(asked_twice(ANSWERS[how], piece, admitted)) == ([(200, b"abc"), (200, b"abc")], True)


@pytest.mark.parametrize("admitted", [None, free])
@pytest.mark.parametrize("how", ["that the server closes behind", "without a length"])
def test_one_answer_is_whole_whatever_follows_it(how: str, admitted: Any) -> None:
    found, _ = asyncio.run(asked_twice(ANSWERS[how], admitted=admitted))
    assert found[0] == (200, b"abc")


@pytest.mark.parametrize("how", FAILURES)
def test_what_is_no_answer_says_what_came(how: str) -> None:
    answer, message = FAILURES[how]
    with pytest.raises(ConnectionFailed, match=message):
        asyncio.run(asked_twice(answer))


def test_a_place_where_nobody_listens_is_told() -> None:
    async def run() -> None:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        with pytest.raises(ConnectionFailed, match="Connect call failed"):
            await Connection.open(urlsplit(f"http://127.0.0.1:{port}"), None)

    asyncio.run(run())


def test_a_content_stays_with_the_server_until_it_is_admitted() -> None:
    size = 2**26
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.read(2**16)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(bytes(2**20))
            await writer.drain()
            sent += 2**20
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        connection = await Connection.open(urlsplit(f"http://{host}:{port}"), None)

        async def admitted() -> None:
            await asyncio.sleep(0.3)
            assert sent < size // 2  # what the sockets hold

        status, content = await asyncio.wait_for(connection.ask("GET", "/x", None, {}, admitted), 240)
        assert (status, len(content)) == (200, size)
        connection.close()
        server.close()

    asyncio.run(run())


def test_a_server_that_ends_without_an_answer_waits_for_no_place() -> None:
    async def run() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(2**16)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        connection = await Connection.open(urlsplit(f"http://{host}:{port}"), None)
        with pytest.raises(ConnectionFailed, match="disconnected without an answer"):
            await asyncio.wait_for(connection.ask("GET", "/x", None, {}, asyncio.Event().wait), 240)
        server.close()

    asyncio.run(run())
