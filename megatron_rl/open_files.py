"""Reads and raises the limit of files and sockets that this process may have open at once."""

import resource

# Some programs that are started from here first close every descriptor that they may have, one by one.
_MOST = 2**20


def possible_open_files() -> int:
    """Return how many files there may be once the limit is raised."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)


def raise_open_files() -> None:
    """Raise the soft limit, often 1,024, to the hard one: every response that is sampled is a connection.

    Processes that are started from here inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < possible_open_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible_open_files(), hard))
