"""Talks to a generation server over HTTP: SGLang's routes, finite timeouts, errors that name the server.

Responses become numpy arrays here, at the edge; nothing behind it sees JSON.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec
import numpy as np

from megatron_rl.errors import Fault
from megatron_rl.keys import KeyOf, bearer, hidden, no_key
from megatron_rl.rollout.connection import Connection, ConnectionFailed
from megatron_rl.rollout.loop_lag import LoopLag
from megatron_rl.rollout.replies import READABLE, Reply, read_input_logprobs, read_reply
from megatron_rl.rollout.routing import RoutedShape, decode_routed_experts

T = TypeVar("T")

_SHOWN_CHARACTERS = 500
# Answers with routed experts that are in memory before they are arrays: 12 MB each where a response has 12,800 tokens
# of Ling-lite. What waits stays with its server, whose connection is not read.
MOST_BODIES = 16
_READ_BYTES = 2**14  # of an answer, to quote it: a key in it is looked for there


class ServerError(Fault):
    """Says that a generation server failed, refused or answered nonsense; the message names it and what it said."""


class RequestRefused(ServerError):
    """Says that the server understood and will not do it (status 4xx, or success false): asking again would not
    help."""


class ServerLost(ServerError):
    """Says that the server is gone, does not answer in time, or answers what no healthy server would: another one may
    do."""


class ServerSilent(ServerLost):
    """Says that the server has not answered in time; it may be there all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Describes one response to sample: the tokens before it, its seed, and how many tokens it may have.

    top_p: below 1 for evaluation only. Log-probs are those of the whole distribution, from which it then does not come.
    stop: texts that end it, the first of them that comes up.
    """

    input_ids: Sequence[int]
    seed: int
    max_new_tokens: int
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Holds one sampled continuation: output_ids int32 [n], logprobs float32 [n], and the weights that made it.

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
        lag: LoopLag | None = None,
    ) -> None:
        """Prepare to talk to the server at `url`; requests connect. key_of: tells the key that every request shows;
        ServerLost where it must not be sent now. bodies: bounds how many answers with routed experts are read at the
        same time, of all clients that share it. lag: of the event loop; no time limit counts what that was late."""
        self.url = url.rstrip("/")
        self._lag = lag or LoopLag()
        self._key_of, self._key = partial(key_of, url), ""
        self._control_timeout = control_timeout_seconds
        self._bodies = bodies or asyncio.Semaphore(MOST_BODIES)
        self._place = urlsplit(self.url)
        self._idle: list[Connection] = []
        self._tls = httpx.create_ssl_context() if self._place.scheme == "https" else None

    async def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def generate(
        self,
        wanted: SampleRequest,
        *,
        temperature: float,
        timeout_seconds: float,
        routed: RoutedShape | None = None,
    ) -> Completion:
        """Ask for one sample. routed: ask for routed experts too, which must look like this."""
        params: dict[str, Any] = {
            "temperature": temperature,
            "top_k": -1,
            "max_new_tokens": wanted.max_new_tokens,
            "sampling_seed": wanted.seed,
            "top_p": wanted.top_p,
        }
        if wanted.stop:
            params["stop"] = list(wanted.stop)
        body = {"input_ids": list(wanted.input_ids), "sampling_params": params, "return_logprob": True}
        if routed is not None:
            body["return_routed_experts"] = True
        async with contextlib.AsyncExitStack() as held:
            content = await self._answered("POST", "/generate", body, timeout_seconds, held if routed else None)
            try:
                reply = read_reply(content)
            except READABLE as error:
                is_json = isinstance(error, msgspec.ValidationError | OverflowError)
                kind = "what is no reply" if is_json else "what is no JSON"
                raise ServerLost(
                    f"{self.url}/generate answered {kind} ({error}): {self._shown(_text(content))!r}"
                ) from None
            found = self._generated(reply, len(wanted.input_ids), routed)
            del content, reply
        if len(found.output_ids) > wanted.max_new_tokens:
            raise ServerLost(
                f"{self.url}/generate gave {len(found.output_ids)} tokens where at most {wanted.max_new_tokens} were "
                "asked for"
            )
        return found

    async def input_logprobs(
        self, input_ids: Sequence[int], start: int = 1, timeout_seconds: float | None = None
    ) -> np.ndarray:
        """Ask for the log-probs float32 [n - start] of the tokens from `start` on, at least 1, whatever the
        temperature."""
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": start - 1,  # the first one asked for comes without
        }
        content = await self._answered("POST", "/generate", body, timeout_seconds or self._control_timeout)
        try:
            logprobs = read_input_logprobs(content)
        except READABLE as error:
            raise ServerLost(
                f"{self.url}/generate gave no input log-probs ({error}): {self._shown(_text(content))!r}"
            ) from None
        if len(logprobs) != len(input_ids) - start or not np.isfinite(logprobs).all():
            raise ServerLost(
                f"{self.url}/generate gave {np.isfinite(logprobs).sum()} finite log-probs for the "
                f"{len(input_ids) - start} tokens behind the first {start}"
            )
        return logprobs

    async def abort_all(self) -> None:
        """Have every request in flight answered now, with what it has."""
        await self._ask("POST", "/abort_request", {"rid": "", "abort_all": True}, self._control_timeout, parse=False)

    async def update_weights_from_disk(
        self, directory: Path, version: str, timeout_seconds: float | None = None
    ) -> None:
        """Load new weights between two tokens. Raise RequestRefused when the server will not have them."""
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
        """Give the memory of these parts back, once the server is idle: SGLang ends itself when it is asked while
        something runs."""
        await self.flush_cache()
        await self._ask("POST", "/release_memory_occupation", {"tags": list(tags)}, self._control_timeout)

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take the memory of these parts again. SGLang ends itself over a part that was not released."""
        await self._ask("POST", "/resume_memory_occupation", {"tags": list(tags)}, self._control_timeout)

    async def flush_cache(self) -> None:
        """Forget shared prompts: their keys and values belong to the weights before. This waits until nothing runs."""
        give_up = time.monotonic() + self._control_timeout
        while True:
            try:
                return await self._ask("POST", "/flush_cache", {}, self._control_timeout, parse=False)
            except RequestRefused:
                if time.monotonic() > give_up:
                    raise
            await asyncio.sleep(0.1)

    async def control(self, route: str, body: dict[str, Any], timeout_seconds: float | None = None) -> None:
        """Send a POST that is answered with {"success": true}. Raise RequestRefused with the server's message
        otherwise."""
        answer = await self._ask("POST", route, body, timeout_seconds or self._control_timeout)
        if not isinstance(answer, dict) or not answer.get("success"):
            message = answer.get("message") if isinstance(answer, dict) else answer
            raise RequestRefused(f"{self.url}{route} refused: {self._shown(str(message))}")

    async def weight_checksums(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return by tensor name the checksum that tensor_bytes.py computes, and the dtype that it was computed in.
        Raise RequestRefused for a server that has none; only the embedded one has them."""
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
        """Tell whether the server answers /ready with 200; False while nothing listens."""
        return await self._is_ok("/ready", timeout_seconds)

    async def is_there(self, timeout_seconds: float) -> bool:
        """Tell whether the server's front end answers, whatever the model behind it does."""
        return await self._is_ok("/ping", timeout_seconds)

    async def is_healthy(self, timeout_seconds: float) -> bool:
        """Tell whether the server still makes tokens: SGLang answers /health only then."""
        return await self._is_ok("/health", timeout_seconds)

    def _shown(self, said: str) -> str:
        """Quote what the server said for a message, without the key, which it may repeat."""
        return hidden(said, self._key)[:_SHOWN_CHARACTERS]

    def _generated(self, reply: Reply, num_tokens_before: int, routed: RoutedShape | None) -> Completion:
        output_ids, meta = reply.output_ids, reply.meta
        result = Completion(
            output_ids=output_ids,
            logprobs=reply.logprobs,
            finish_reason=meta.finish_reason.type,
            weight_versions=meta.versions,
            message=str(meta.finish_reason.message or ""),
        )
        whole = result.finish_reason in ("stop", "length")
        if not whole and result.finish_reason != "abort":
            raise ServerLost(f"{self.url}/generate: unknown finish_reason {result.finish_reason!r}")
        if (
            (output_ids < 0).any()
            or result.logprobs.shape != output_ids.shape
            or (whole and not len(output_ids))
            or not np.isfinite(result.logprobs).all()
        ):
            raise ServerLost(
                f"{self.url}/generate: {len(output_ids)} tokens came with {len(result.logprobs)} log-probs, "
                f"{int((~np.isfinite(result.logprobs)).sum())} of them not finite"
            )
        if routed is None or not (whole or meta.routed_experts is not None):
            return result
        try:
            count = num_tokens_before + len(output_ids) - 1
            return replace(result, routed_experts=decode_routed_experts(meta.routed_experts, count, routed))
        except ValueError as error:  # a server that cannot do it cannot do it the next time either
            raise RequestRefused(f"{self.url}/generate: {error}") from error

    async def _is_ok(self, route: str, timeout_seconds: float) -> bool:
        try:
            status, _ = await self._request("GET", route, None, timeout_seconds)
            return status == 200
        except (ConnectionFailed, TimeoutError, ServerLost):
            return False

    async def _request(
        self,
        method: str,
        route: str,
        body: dict[str, Any] | None,
        timeout_seconds: float,
        held: contextlib.AsyncExitStack | None = None,
    ) -> tuple[int, bytes]:
        """Send a request, and return the status and content of its answer. The time limit is for all of it: a server
        that sends a byte now and then would never run into one between two reads. Raise TimeoutError or
        ConnectionFailed; then the connection is not used again. Raise ServerLost where it is not known who listens
        there: nothing is sent.

        held: keeps one of the places for large contents, which are read only then.
        """
        content = None if body is None else msgspec.json.encode(body)
        self._key = self._key_of()
        async with self._lag.timeout(timeout_seconds):
            while self._idle:
                if (kept := self._idle.pop()).is_open:
                    # It may be closed by the server just as it is used again. Then nothing was asked, and a new one
                    # tells whether the server is there.
                    with contextlib.suppress(ConnectionFailed):
                        return await self._request_over(kept, method, route, content, held)
                    self._key = self._key_of()  # who listens now may be another one
                    break
            fresh = await Connection.open(self._place, self._tls)
            return await self._request_over(fresh, method, route, content, held)

    async def _request_over(
        self,
        connection: Connection,
        method: str,
        route: str,
        content: bytes | None,
        held: contextlib.AsyncExitStack | None,
    ) -> tuple[int, bytes]:
        admitted = None if held is None else partial(held.enter_async_context, self._bodies)
        try:
            answer = await connection.ask(method, self._place.path + route, content, bearer(self._key), admitted)
        except BaseException:
            connection.close()
            if held is not None:
                await held.aclose()
            raise
        if connection.is_open:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def _ask(
        self,
        method: str,
        route: str,
        body: dict[str, Any] | None,
        timeout_seconds: float,
        parse: bool = True,
    ) -> Any:
        """Send a request and return the JSON of the answer; None where that is not to be parsed."""
        content = await self._answered(method, route, body, timeout_seconds)
        try:
            return json.loads(content) if parse else None
        except (ValueError, RecursionError):
            raise ServerLost(f"{self.url}{route} answered what is no JSON: {self._shown(_text(content))!r}") from None

    async def _answered(
        self,
        method: str,
        route: str,
        body: dict[str, Any] | None,
        timeout_seconds: float,
        held: contextlib.AsyncExitStack | None = None,
    ) -> bytes:
        """Send a request and return the content of an answer with status 200. held: see `_request`."""
        try:
            status, content = await self._request(method, route, body, timeout_seconds, held)
        except TimeoutError:
            raise ServerSilent(f"{self.url}{route} did not answer within {timeout_seconds:.0f} s") from None
        except ConnectionFailed as error:
            raise ServerLost(f"{self.url}{route} cannot be reached: {error}") from error
        if status != 200:
            kind = RequestRefused if 400 <= status < 500 else ServerLost
            raise kind(f"{self.url}{route} answered {status}: {self._shown(_text(content))}")
        return content


def _text(content: bytes) -> str:
    """Return enough of the content as text to quote it."""
    return content[:_READ_BYTES].decode(errors="replace")
