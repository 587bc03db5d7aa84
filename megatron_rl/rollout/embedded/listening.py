"""Binds a socket and makes an HTTP server for it that runs in the caller's event loop, here and in the gateway."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("megatron_rl.rollout.embedded")

GRACEFUL_SHUTDOWN_SECONDS = 3


def bind(host: str, port: int, allow_remote: bool, key: str) -> socket.socket:
    """Return a bound socket that does not listen yet, so that a taken port is known before the model is read."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be in [0, 65535], got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host} cannot be resolved: {error}") from None
    if not ipaddress.ip_address(address[0]).is_loopback and not allow_remote:
        raise ValueError(f"--host must be a loopback address, got {host}; --allow-remote permits it")
    if allow_remote and not key:
        raise ValueError("--allow-remote needs a key, or everybody could change the weights; set --api-key-variable")
    # The protocol is named because only then does asyncio turn Nagle's algorithm off, which lets the body of an answer
    # wait 40 ms for the client's delayed acknowledgement of its head.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(f"port {port} of {host} cannot be bound: {error.strerror}") from None
    return bound


def http_server(
    app: "Starlette", what: str, bound: socket.socket, max_connections: int | None = None
) -> "uvicorn.Server":
    """Make a server for the socket, which logs what it serves once it takes connections.

    max_connections: with more, those that have waited longest without a request in progress are closed.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    connections: dict[H11Protocol, None] = {}  # the oldest comes first

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections[self] = None
            if max_connections is not None and len(connections) > max_connections:
                # The new one is not among them: its request is still on the way.
                idle = (one for one in connections if one is not self and _is_idle(one))
                if (oldest := next(idle, None)) is not None:
                    del connections[oldest]
                    oldest.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            connections.pop(self, None)
            super().connection_lost(exc)

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Leave signals to the loop: uvicorn would raise them again and so end with a signal's status."""
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            # Whoever started the server waits for this line: from here on connections are accepted.
            host, port = bound.getsockname()[:2]
            log.info("%s on http://%s:%d", what, f"[{host}]" if ":" in host else host, port)

    return Server(
        uvicorn.Config(
            app,
            http=Protocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
            timeout_keep_alive=120,
            backlog=4096,
        )
    )


def _is_idle(connection: "H11Protocol") -> bool:
    """Tell whether a connection has no request that is complete and not answered."""
    return connection.cycle is None or connection.cycle.response_complete
