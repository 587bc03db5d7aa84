"""Sends requests to several servers at once, in a thread beside the caller. Failures are remembered, not raised."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from megatron_rl.keys import KeyOf
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import GenerationClient, RequestRefused, ServerError, ServerLost, ServerSilent
from megatron_rl.rollout.versions import capabilities

READY_SECONDS = 2.0
# A bucket must arrive at this rate, or its server counts as lost.
_SLOWEST_BYTES_PER_SECOND = 20e6

Asked = list[tuple[str, "Future[None]"]]  # by url


class Waits(RequestRefused):
    """Says that the server is there, but a request has not been answered in time: it waits for others of its group."""


class ServerRequests:
    """Sends requests to servers. failed: why each server that failed did, by its url. `close()` ends connections and
    the thread of their loop."""

    def __init__(self, silence_seconds: float, largest_bytes: int, key_of: KeyOf) -> None:
        """Start the thread. A server that does not answer for `silence_seconds`, on top of the time for the bytes of a
        bucket, fails.

        key_of: tells the key that a request to a url shows; ServerLost where it must not be sent now.
        """
        self._key_of = key_of
        self.timeout = silence_seconds + largest_bytes / _SLOWEST_BYTES_PER_SECOND
        self.failed: dict[str, ServerError] = {}
        # A loop of its own, because most ranks have no pool: the first of every node talks to the servers there.
        self._loop = BackgroundLoop()
        self._clients: dict[str, GenerationClient] = {}

    def ask(self, route: str, bodies: Mapping[str, dict[str, Any]]) -> Asked:
        """Send a request to each of these servers. bodies: by url."""
        return [(url, self._loop.start(_control(self._client(url), route, body))) for url, body in bodies.items()]

    def settle(self, asked: Asked) -> None:
        """Wait for all of these requests, and remember which servers failed."""
        for url, future in asked:
            error = future.exception()
            if isinstance(error, ServerError):
                self.failed.setdefault(url, error)
            elif error is not None:
                raise error

    def ranks_of(self, urls: Sequence[str]) -> tuple[dict[str, int], set[str]]:
        """Return by url the number of a server's tensor-parallel ranks, and those servers whose updates lie between
        begin_weight_update and end_weight_update."""
        sizes: dict[str, int] = {}
        brackets = set()
        for url, future in [(url, self._loop.start(self._client(url).server_info())) for url in urls]:
            try:
                info = future.result()
                sizes[url] = int(info.get("tp_size") or 1)
                if capabilities(str(info.get("version", ""))).weight_update_sessions:
                    brackets.add(url)
            except (ServerError, TypeError, ValueError) as error:
                self.failed[url] = ServerLost(f"{url}/server_info: {error}")
        return sizes, brackets

    def close(self) -> None:
        for client in self._clients.values():
            self._loop.run(client.close())
        self._loop.close()

    def _client(self, url: str) -> GenerationClient:
        if url not in self._clients:
            self._clients[url] = GenerationClient(url, self.timeout, self._key_of)
        return self._clients[url]


async def _control(client: GenerationClient, route: str, body: dict[str, Any]) -> None:
    try:
        await client.control(route, body)
    except ServerSilent as error:
        if await client.is_ready(READY_SECONDS):
            raise Waits(str(error)) from None
        raise
