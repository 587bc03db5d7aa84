"""Requests to several servers at once, beside what the calling thread does. Who fails is remembered, not raised."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx

from megatron_rl.keys import KeyOf, bearer, hidden
from megatron_rl.rollout.client import RequestRefused, ServerError, ServerLost
from megatron_rl.rollout.versions import capabilities

READY_SECONDS = 2.0
# A bucket must arrive at this rate, or its server counts as lost.
_SLOWEST_BYTES_PER_SECOND = 20e6

Asked = list[tuple[str, "Future[None]"]]  # by url


class Waits(RequestRefused):
    """The server is there, but a request has not been answered in time: it waits for others of its group."""


class ServerRequests:
    """failed: why each server that failed did, by its url. `close()` ends threads and connections."""

    def __init__(self, silence_seconds: float, largest_bytes: int, key_of: KeyOf) -> None:
        """A server that does not answer for `silence_seconds`, on top of the time for the bytes of a bucket, fails.

        key_of: tells the key that a request to a url shows; ServerLost where it must not be sent now."""
        self._key_of = key_of
        self.timeout = silence_seconds + largest_bytes / _SLOWEST_BYTES_PER_SECOND
        self.failed: dict[str, ServerError] = {}
        self._http: dict[str, httpx.Client] = {}
        # One for each server, made as they are needed: a rendezvous keeps all of them waiting for the last.
        self.threads = ThreadPoolExecutor(max_workers=4096, thread_name_prefix="weights")

    def ask(self, route: str, bodies: Mapping[str, dict[str, Any]]) -> Asked:
        """bodies: by url."""
        return [(url, self.threads.submit(self._post, url, route, body)) for url, body in bodies.items()]

    def settle(self, asked: Asked) -> None:
        """Wait for all of them."""
        for url, future in asked:
            error = future.exception()
            if isinstance(error, ServerError):
                self.failed.setdefault(url, error)
            elif error is not None:
                raise error

    def ranks_of(self, urls: Sequence[str]) -> tuple[dict[str, int], set[str]]:
        """By url the number of its tensor-parallel ranks, and those servers whose updates lie between
        begin_weight_update and end_weight_update."""
        sizes: dict[str, int] = {}
        brackets = set()
        for url in urls:
            try:
                info = self._client(url).get("/server_info", headers=self._headers(url), timeout=self.timeout).json()
                if not isinstance(info, dict):
                    raise ValueError(f"answered {type(info).__name__}")
                sizes[url] = int(info.get("tp_size") or 1)
                if capabilities(str(info.get("version", ""))).weight_update_sessions:
                    brackets.add(url)
            except (httpx.HTTPError, ValueError, ServerLost) as error:
                self.failed[url] = ServerLost(f"{url}/server_info: {error or type(error).__name__}")
        return sizes, brackets

    def close(self) -> None:
        for http in self._http.values():
            http.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    def _client(self, url: str) -> httpx.Client:
        if url not in self._http:
            self._http[url] = httpx.Client(base_url=url, trust_env=False)
        return self._http[url]

    def _headers(self, url: str) -> dict[str, str]:
        return bearer(self._key_of(url))

    def _post(self, url: str, route: str, body: dict[str, Any]) -> None:
        """RequestRefused unless it is answered with {"success": true}; ServerLost when nobody is there to answer."""
        key = self._key_of(url)
        try:
            answer = self._client(url).post(route, json=body, headers=bearer(key), timeout=self.timeout)
            found = answer.json()
        except httpx.TimeoutException as error:
            text = f"{url}{route}: {error or type(error).__name__} after {self.timeout:.0f} s"
            raise (Waits(text) if self._is_there(url) else ServerLost(text)) from None
        except (httpx.HTTPError, ValueError) as error:
            raise ServerLost(f"{url}{route}: {error or type(error).__name__}") from None
        if answer.status_code != 200 or not isinstance(found, dict) or not found.get("success"):
            kind = RequestRefused if answer.status_code < 500 else ServerLost
            message = found.get("message", found) if isinstance(found, dict) else found
            raise kind(f"{url}{route} answered {answer.status_code}: {hidden(str(message), key)}")

    def _is_there(self, url: str) -> bool:
        try:
            return self._client(url).get("/ready", headers=self._headers(url), timeout=READY_SECONDS).is_success
        except (httpx.HTTPError, ServerLost):
            return False
