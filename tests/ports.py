"""Finds free ports for what a test starts.

The kernel gives any port of its own range to whatever connects next, so one that it named as free a moment ago may be
another program's when ours comes to listen there. These are outside of that range.
"""

import itertools
import os
import random
import socket

_WORKERS = 64  # of pytest at once: each has ports of its own
_tries = itertools.count(random.SystemRandom().randrange(100))


def free_port() -> int:
    """Return a port of loopback where nobody listens, which is given to no other worker of pytest."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    for _ in range(100):
        port = 20000 + _WORKERS * (next(_tries) % 100) + worker
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("no port from 20000 to 26399 is free")
