"""Keeps one HTTP/1.1 connection to a server, and sends requests over it one after the other.

A phase has thousands of requests in flight on one event loop, where a general client's pools, hooks and streams would
take more time than the replies. h11 handles the protocol.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from ssl import SSLContext
from urllib.parse import SplitResult

import h11


class ConnectionFailed(Exception):
    """Says that no answer came; the message says what the connection did. The connection cannot be used again."""


class Connection(asyncio.Protocol):
    """Sends requests over one connection. Use it from one task at a time; `close()` ends it."""

    def __init__(self, host: str) -> None:
        """Prepare a connection; `open` makes it. host: as servers are told of it."""
        self._host = host
        self._http = h11.Connection(h11.CLIENT)
        self._status, self._content = 0, bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._head: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, url: SplitResult, tls: SSLContext | None) -> "Connection":
        """Connect to a server. Raise ConnectionFailed where nobody listens."""
        host, port = url.hostname or "", url.port or (443 if tls else 80)
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: cls(url.netloc.rpartition("@")[2]), host, port, ssl=tls
            )
        except OSError as error:
            raise ConnectionFailed(str(error)) from None
        return connection

    @property
    def is_open(self) -> bool:
        """True while the next request can be sent."""
        return self._http.our_state is h11.IDLE and not self._transport.is_closing()

    def close(self) -> None:
        self._transport.abort()

    async def ask(
        self,
        method: str,
        target: str,
        content: bytes | None,
        headers: Mapping[str, str],
        admitted: Callable[[], Awaitable[object]] | None = None,
    ) -> tuple[int, bytes]:
        """Send one request and return the status and content of its answer. Raise ConnectionFailed when no answer
        comes.

        admitted: awaited between head and content of the answer; the content stays with the server until then.
        """
        own = {"Host": self._host, "Accept": "*/*"}
        if content is not None:
            own |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
        loop = asyncio.get_running_loop()
        self._answer, self._head = loop.create_future(), None if admitted is None else loop.create_future()
        try:
            request = h11.Request(method=method, target=target, headers=[*own.items(), *headers.items()])
            parts = [request, *([h11.Data(content)] if content else []), h11.EndOfMessage()]
            self._transport.write(b"".join(self._http.send(part) or b"" for part in parts))
            if self._head is not None and admitted is not None:
                await self._head
                if not self._answer.done():  # it may have failed, or come whole with its head
                    await admitted()
                self._transport.resume_reading()  # also for the requests that follow
            return await self._answer
        except h11.ProtocolError as error:
            raise ConnectionFailed(str(error)) from None
        finally:
            self._answer = self._head = None

    # Callbacks of the event loop -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._receive(data)

    def connection_lost(self, error: Exception | None) -> None:
        if error is None and self._http.their_state is h11.SEND_BODY:
            self._receive(b"")  # what has no length ends here; anything else is cut short
        self._fail(str(error or "the server disconnected without an answer"))

    def _receive(self, data: bytes) -> None:
        """Take the bytes that came. The answer is given out with its last byte."""
        try:
            self._http.receive_data(data)
            while (event := self._http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    self._status = event.status_code
                    if self._head is not None:
                        self._transport.pause_reading()
                        self._set_head()
                elif isinstance(event, h11.Data):
                    self._content += event.data
                elif isinstance(event, h11.EndOfMessage):
                    self._end()
                elif isinstance(event, h11.ConnectionClosed):
                    return
        except h11.ProtocolError as error:
            self._fail(str(error))
            self._transport.abort()

    def _end(self) -> None:
        content, self._content = bytes(self._content), bytearray()
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._status, content))

    def _set_head(self) -> None:
        if self._head is not None and not self._head.done():
            self._head.set_result(None)

    def _fail(self, why: str) -> None:
        self._set_head()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionFailed(why))
