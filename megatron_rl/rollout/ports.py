"""Holds ports of this machine for our servers, and proves that our server listens there before it is trusted.

A server binds its port when its model is loaded, and again after each restart. Until then this process has the port
bound. Linux lets a second socket bind a port only if both sockets set SO_REUSEADDR and neither listens. So this process
sets SO_REUSEADDR only while a server of ours starts. In that time any other process that asks for exactly this port can
bind it too, so `is_ours` looks which process has it. When the server listens, SO_REUSEADDR is unset, and when it dies,
the port stays with this process.
"""

import ipaddress
import socket

import psutil

_held: dict[tuple[str, int], socket.socket] = {}


def hold_port(host: str, port: int = 0) -> int:
    """Keep a port of this machine as long as this process lives, and let a server that it starts bind it.

    0 picks one. Raises ValueError when somebody listens there: SGLang neither serves nor ends where it cannot bind its
    port.
    """
    if (host, port) not in _held:
        held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host, port))
        except OSError as error:
            held.close()
            raise ValueError(
                f"port {port} of {host} cannot be used ({error.strerror}); set another rollout.port or 0"
            ) from None
        port = int(held.getsockname()[1])
        _held[host, port] = held
    _held[host, port].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return port


def close_port(host: str, port: int) -> None:
    """Let nobody bind the held port until it is held again for the next server."""
    _held[host, port].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)


def is_ours(host: str, port: int, pid: int) -> bool:
    """Tell whether the process, or one that it started, listens there; False while nobody does.

    Nothing is sent to who listens. Raises ValueError when it is somebody else.
    """
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except OSError:
        return False
    if _listens(host, port, pid):
        return True
    raise ValueError(
        f"another process listens on port {port} of {host}, where the generation server should; nothing was sent to "
        "it. See what it is with `ss -tlnp`, and set another rollout.port or 0"
    )


def _listens(host: str, port: int, pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        return any(
            socket.status == psutil.CONN_LISTEN and tuple(socket.laddr) == (host, port)
            for one in [process, *process.children(recursive=True)]
            for socket in one.net_connections("tcp")
        )
    except psutil.NoSuchProcess:
        return False


def address_towards(host: str) -> str:
    """Return this machine's address on the way to `host`. Raise ValueError when there is no such host."""
    return _both_ends(host)[0]


def is_here(host: str) -> bool:
    """Tell whether `host` is this machine: the way from it to itself begins where it ends. Raise ValueError when there
    is no such host."""
    own, other = _both_ends(host)
    return own == other or ipaddress.ip_address(own).is_loopback


def _both_ends(host: str) -> tuple[str, str]:
    """Return this machine's address on the way to `host`, and the address of `host`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: connecting only tells which of this machine's addresses leads there.
            probe.connect(address)
            return str(probe.getsockname()[0]), str(probe.getpeername()[0])
    except OSError as error:
        raise ValueError(f"host {host!r} cannot be reached: {error}; correct rollout.urls or MASTER_ADDR") from None
