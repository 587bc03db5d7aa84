"""The HTTP client of a generation server: SGLang's routes, finite timeouts, errors that name the server.

Responses become numpy arrays here, at the edge; nothing behind it sees JSON.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from megatron_rl.errors import Fault
from megatron_rl.keys import KeyOf, bearer, hidden, no_key
from megatron_rl.rollout.routing import RoutedShape, decode_routed_experts

T = TypeVar("T")

_SHOWN_CHARACTERS = 500
# Answers with routed experts that are in memory before they are arrays: 12 MB each where a response has 12,800 tokens
# of Ling-lite. What waits stays with its server, whose connection is not read.
MOST_BODIES = 16


class ServerError(Fault):
    """A generation server failed, refused or answered nonsense; the message names it and what it said."""


class RequestRefused(ServerError):
    """The server understood and will not do it (status 4xx, or success false): asking again would not help."""


class ServerLost(ServerError):
    """It is gone, does not answer in time, or answers what no healthy server would: another one may do."""


class ServerSilent(ServerLost):
    """It has not answered in time; it may be there all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One response to sample: the tokens before it, its seed, and how many tokens it may have.

    top_p: below 1 for evaluation only. Log-probs are those of the whole distribution, from which it then does not come.
    """

    input_ids: Sequence[int]
    seed: int
    max_new_tokens: int
    top_p: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled continuation: output_ids int32 [n], logprobs float32 [n], and the weights that made it.

    finish_reason: "stop", "length", or "abort" for the part that was there when it was aborted, perhaps no token.
    weight_versions: of its tokens, in order; several when weights came while it ran.
    message: what the server says of an abort; empty otherwise.
    routed_experts: uint8 [tokens before it + n - 1, layers, topk], where they were asked for; an aborted part may lack
        them.
    """

    output_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    weight_versions: tuple[str, ...]
    message: str = ""
    routed_experts: np.ndarray | None = None


async def gather_all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at once and return their results in order. The first failure cancels the rest and is raised itself."""
    try:
        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(one) for one in work]
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [task.result() for task in started]


class GenerationClient:
    """Talks to one server. Use it in one event loop; `close()` ends its connections."""

    def __init__(
        self,
        url: str,
        control_timeout_seconds: float = 60.0,
        key_of: KeyOf = no_key,
        bodies: asyncio.Semaphore | None = None,
    ) -> None:
        """key_of: tells the key that every request shows; ServerLost where it must not be sent now. bodies: bounds how
        many answers with routed experts are read at the same time, of all clients that share it."""
        self.url = url.rstrip("/")
        self._key_of, self._key = partial(key_of, url), ""
        self._control_timeout = control_timeout_seconds
        self._bodies = bodies or asyncio.Semaphore(MOST_BODIES)
        # One httpx client for each connection: a client with many looks through all of them at every request, and a
        # phase has thousands in flight.
        self._idle: list[httpx.AsyncClient] = []
        self._tls = httpx.create_ssl_context() if self.url.startswith("https:") else False

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().aclose()

    async def generate(
        self,
        wanted: Sequence[SampleRequest],
        *,
        temperature: float,
        timeout_seconds: float,
        routed: RoutedShape | None = None,
    ) -> list[Completion]:
        """One sample for each, in their order. routed: ask for routed experts, which must look like this."""
        shared = {"temperature": temperature, "top_k": -1}
        body = {
            "input_ids": [list(one.input_ids) for one in wanted],
            "sampling_params": [
                shared | {"max_new_tokens": one.max_new_tokens, "sampling_seed": one.seed, "top_p": one.top_p}
                for one in wanted
            ],
            "return_logprob": True,
        }
        if routed is not None:
            body["return_routed_experts"] = True
        async with contextlib.AsyncExitStack() as held:
            answers = await self._ask("POST", "/generate", body, timeout_seconds, held=held if routed else None)
            if not isinstance(answers, list) or len(answers) != len(wanted):
                raise ServerLost(f"{self.url}/generate answered {type(answers).__name__} for {len(wanted)} samples")
            found = [
                self._generated(answer, len(one.input_ids), routed) for answer, one in zip(answers, wanted, strict=True)
            ]
            del answers
        for asked, one in zip(wanted, found, strict=True):
            if len(one.output_ids) > asked.max_new_tokens:
                raise ServerLost(
                    f"{self.url}/generate gave {len(one.output_ids)} tokens where at most {asked.max_new_tokens} were "
                    "asked for"
                )
        return found

    async def input_logprobs(self, input_ids: Sequence[int]) -> np.ndarray:
        """Log-probs float32 [n - 1] of all tokens but the first, whatever the temperature."""
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._ask("POST", "/generate", body, self._control_timeout)
        try:
            found = answer["meta_info"]["input_token_logprobs"]
            logprobs = np.array([entry[0] for entry in found[1:]], np.float32)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise ServerLost(f"{self.url}/generate: answer lacks {error!r}: {self._shown(str(answer))}") from error
        if len(logprobs) != len(input_ids) - 1:
            raise ServerLost(f"{self.url}/generate gave {len(logprobs)} log-probs for {len(input_ids)} tokens")
        return logprobs

    async def abort_all(self) -> None:
        """Every request in flight is answered now, with what it has."""
        await self._ask("POST", "/abort_request", {"rid": "", "abort_all": True}, self._control_timeout, parse=False)

    async def update_weights_from_disk(
        self, directory: Path, version: str, timeout_seconds: float | None = None
    ) -> None:
        """Load new weights between two tokens; RequestRefused when the server will not have them."""
        body = {
            "model_path": str(directory),
            "weight_version": version,
            "abort_all_requests": False,
            # SGLang asserts that its cache can be flushed, and dies right behind a request that has only just ended.
            "flush_cache": False,
        }
        await self.control("/update_weights_from_disk", body, timeout_seconds)
        await self.flush_cache()

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Give the memory of these parts back, once idle: SGLang ends itself when it is asked while something runs."""
        await self.flush_cache()
        await self._ask("POST", "/release_memory_occupation", {"tags": list(tags)}, self._control_timeout)

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take it again. SGLang ends itself over a part that was not released."""
        await self._ask("POST", "/resume_memory_occupation", {"tags": list(tags)}, self._control_timeout)

    async def flush_cache(self) -> None:
        """Forget shared prompts: their keys and values belong to the weights before. Waits until nothing runs."""
        give_up = time.monotonic() + self._control_timeout
        while True:
            try:
                return await self._ask("POST", "/flush_cache", {}, self._control_timeout, parse=False)
            except RequestRefused:
                if time.monotonic() > give_up:
                    raise
            await asyncio.sleep(0.1)

    async def control(self, route: str, body: dict[str, Any], timeout_seconds: float | None = None) -> None:
        """A POST that is answered with {"success": true}; RequestRefused with the server's message otherwise."""
        answer = await self._ask("POST", route, body, timeout_seconds or self._control_timeout)
        if not isinstance(answer, dict) or not answer.get("success"):
            message = answer.get("message") if isinstance(answer, dict) else answer
            raise RequestRefused(f"{self.url}{route} refused: {self._shown(str(message))}")

    async def weight_checksums(self) -> tuple[dict[str, str], dict[str, str]]:
        """By tensor name the checksum that tensor_bytes.py computes, and the dtype that it was computed in.
        RequestRefused by a server that has none; only the embedded one does."""
        answer = await self._ask("POST", "/weights_checker", {"action": "checksum"}, self._control_timeout)
        try:
            return dict(answer["checksums"]), dict(answer["dtypes"])
        except (KeyError, TypeError, ValueError) as error:
            raise RequestRefused(f"{self.url}/weights_checker gave no checksums of tensors ({error!r})") from None

    async def server_info(self) -> dict[str, Any]:
        found = await self._ask("GET", "/server_info", None, self._control_timeout)
        if not isinstance(found, dict):
            raise ServerLost(f"{self.url}/server_info answered {type(found).__name__}")
        return found

    async def is_ready(self, timeout_seconds: float = 5.0) -> bool:
        """True once the server answers /ready with 200; False while nothing listens."""
        return await self._is_ok("/ready", timeout_seconds)

    async def is_there(self, timeout_seconds: float) -> bool:
        """True when its front end answers, whatever the model behind it does."""
        return await self._is_ok("/ping", timeout_seconds)

    async def is_healthy(self, timeout_seconds: float) -> bool:
        """True when it still makes tokens: SGLang answers /health only then."""
        return await self._is_ok("/health", timeout_seconds)

    def _shown(self, said: str) -> str:
        """Quote what the server said for a message, without the key, which it may repeat."""
        return hidden(said, self._key)[:_SHOWN_CHARACTERS]

    def _generated(self, answer: dict[str, Any], num_tokens_before: int, routed: RoutedShape | None) -> Completion:
        try:
            meta = answer["meta_info"]
            # A request that was aborted before it ran has no list of log-probs.
            pairs = meta.get("output_token_logprobs") or []
            output_ids = np.array(answer["output_ids"], dtype=np.int32)
            result = Completion(
                output_ids=output_ids,
                logprobs=np.array([pair[0] for pair in pairs], dtype=np.float32),
                finish_reason=meta["finish_reason"]["type"],
                weight_versions=_versions(meta),
                message=str(meta["finish_reason"].get("message") or ""),
            )
        except (KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError) as error:
            raise ServerLost(f"{self.url}/generate: answer lacks {error!r}: {self._shown(str(answer))}") from error
        whole = result.finish_reason in ("stop", "length")
        if not whole and result.finish_reason != "abort":
            raise ServerLost(f"{self.url}/generate: unknown finish_reason {result.finish_reason!r}")
        if (
            output_ids.ndim != 1
            or (output_ids < 0).any()
            or result.logprobs.shape != output_ids.shape
            or (whole and not len(output_ids))
            or not np.isfinite(result.logprobs).all()
        ):
            raise ServerLost(
                f"{self.url}/generate: {len(output_ids)} tokens came with {len(result.logprobs)} log-probs, "
                f"{int((~np.isfinite(result.logprobs)).sum())} of them not finite"
            )
        if routed is None or not (whole or "routed_experts" in meta):
            return result
        try:
            count = num_tokens_before + len(output_ids) - 1
            return replace(result, routed_experts=decode_routed_experts(meta.get("routed_experts"), count, routed))
        except ValueError as error:  # a server that cannot do it cannot do it the next time either
            raise RequestRefused(f"{self.url}/generate: {error}") from error

    async def _is_ok(self, route: str, timeout_seconds: float) -> bool:
        try:
            return (await self._request("GET", route, None, timeout_seconds)).status_code == 200
        except (httpx.HTTPError, TimeoutError, ServerLost):
            return False

    async def _request(
        self,
        method: str,
        route: str,
        body: dict[str, Any] | None,
        timeout_seconds: float,
        held: contextlib.AsyncExitStack | None = None,
    ) -> httpx.Response:
        """The time limit is for the whole answer: a server that sends a byte now and then would never run into one
        between two reads. TimeoutError or httpx.HTTPError; then the connection is not used again. ServerLost where it
        is not known who listens there: nothing is sent."""
        self._key = self._key_of()
        if self._idle:
            # A connection that was kept may be closed by the server just as it is used again. Then nothing was asked,
            # and a new one tells whether the server is there.
            with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                return await self._request_over(self._idle.pop(), method, route, body, timeout_seconds, held)
            self._key = self._key_of()  # who listens now may be another one
        http = httpx.AsyncClient(base_url=self.url, timeout=None, trust_env=False, verify=self._tls)
        return await self._request_over(http, method, route, body, timeout_seconds, held)

    async def _request_over(
        self,
        http: httpx.AsyncClient,
        method: str,
        route: str,
        body: dict[str, Any] | None,
        timeout_seconds: float,
        held: contextlib.AsyncExitStack | None,
    ) -> httpx.Response:
        """held: keeps one of the places for large bodies, which are read only then."""
        try:
            async with asyncio.timeout(timeout_seconds):
                request = http.build_request(method, route, json=body, headers=bearer(self._key))
                answer = await http.send(request, stream=held is not None)
                if held is not None:
                    await held.enter_async_context(self._bodies)
                    await answer.aread()
        except BaseException:
            await http.aclose()
            if held is not None:
                await held.aclose()
            raise
        self._idle.append(http)
        return answer

    async def _ask(
        self,
        method: str,
        route: str,
        body: dict[str, Any] | None,
        timeout_seconds: float,
        parse: bool = True,
        held: contextlib.AsyncExitStack | None = None,
    ) -> Any:
        """The JSON of the answer."""
        try:
            answer = await self._request(method, route, body, timeout_seconds, held)
        except TimeoutError:
            raise ServerSilent(f"{self.url}{route} did not answer within {timeout_seconds:.0f} s") from None
        except httpx.HTTPError as error:
            raise ServerLost(f"{self.url}{route} cannot be reached: {error or type(error).__name__}") from error
        if answer.status_code != 200:
            kind = RequestRefused if 400 <= answer.status_code < 500 else ServerLost
            raise kind(f"{self.url}{route} answered {answer.status_code}: {self._shown(answer.text)}")
        if not parse:
            return None
        try:
            return answer.json()
        except (ValueError, RecursionError):
            raise ServerLost(f"{self.url}{route} answered what is no JSON: {self._shown(answer.text)!r}") from None


def _versions(meta: dict[str, Any]) -> tuple[str, ...]:
    spans = meta.get("weight_versions")
    if spans:
        return tuple(str(span["version"]) for span in spans if span["end"] > span["start"])
    return (str(meta["weight_version"]),)
