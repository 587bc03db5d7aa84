"""The HTTP client of a generation server: SGLang's routes, finite timeouts, errors that name the server.

Responses become numpy arrays here, at the edge; nothing behind it sees JSON.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from megatron_rl.errors import Fault
from megatron_rl.rollout.routing import RoutedShape, decode_routed_experts

T = TypeVar("T")


class ServerError(Fault):
    """A generation server failed, refused or answered nonsense; the message names it and what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One sampled continuation: output_ids int32 [n], logprobs float32 [n], and the weights that made it.

    routed_experts: uint8 [prompt + n - 1, layers, topk], where they were asked for.
    """

    output_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    weight_version: str
    routed_experts: np.ndarray | None = None


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at once and return their results in order. The first failure cancels the rest and is raised itself."""
    try:
        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(one) for one in work]
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [task.result() for task in started]


class GenerationClient:
    """Talks to one server. Use it in one event loop; `close()` ends its connections."""

    def __init__(self, url: str, control_timeout_seconds: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self._control_timeout = control_timeout_seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(
            base_url=self.url, limits=limits, timeout=control_timeout_seconds, trust_env=False
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(
        self,
        input_ids: Sequence[int],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        timeout_seconds: float,
        return_routed_experts: RoutedShape | None = None,
    ) -> list[Generated]:
        """One continuation of the same prompt per seed, in the order of the seeds.

        return_routed_experts: asks for them and says what they must look like; see `supports_routed_experts`.
        """
        shared = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0, "top_k": -1}
        body = {
            "input_ids": [list(input_ids)] * len(seeds),
            "sampling_params": [shared | {"sampling_seed": seed} for seed in seeds],
            "return_logprob": True,
        }
        if return_routed_experts is not None:
            body["return_routed_experts"] = True
        answers = await self._post("/generate", body, timeout_seconds)
        if not isinstance(answers, list) or len(answers) != len(seeds):
            raise ServerError(f"{self.url}/generate answered {type(answers).__name__} for {len(seeds)} samples")
        return [self._generated(answer, len(input_ids), return_routed_experts) for answer in answers]

    async def update_weights_from_disk(self, directory: Path, version: str) -> None:
        """Load new weights between two tokens; ServerError when the server refuses them."""
        body = {"model_path": str(directory), "weight_version": version, "abort_all_requests": False}
        answer = await self._post("/update_weights_from_disk", body, self._control_timeout)
        if not answer.get("success"):
            raise ServerError(f"{self.url} refused new weights: {answer.get('message')}")

    async def version(self) -> str:
        """What the server calls itself; "" where it does not say."""
        info = await self._json(self._http.get("/server_info"), "/server_info")
        return str(info.get("version", ""))

    async def is_ready(self) -> bool:
        """True once the server answers /ready with 200; False while nothing listens."""
        try:
            return (await self._http.get("/ready", timeout=5.0)).status_code == 200
        except httpx.TransportError:
            return False

    def _generated(self, answer: dict[str, Any], num_prompt_tokens: int, shape: RoutedShape | None) -> Generated:
        try:
            meta = answer["meta_info"]
            pairs = meta["output_token_logprobs"]
            output_ids = np.array(answer["output_ids"], dtype=np.int32)
            result = Generated(
                output_ids=output_ids,
                logprobs=np.array([pair[0] for pair in pairs], dtype=np.float32),
                finish_reason=meta["finish_reason"]["type"],
                weight_version=str(meta["weight_version"]),
            )
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ServerError(f"{self.url}/generate: answer lacks {error!r}: {str(answer)[:300]}") from error
        if shape is not None and result.finish_reason != "abort":
            try:
                count = num_prompt_tokens + len(output_ids) - 1
                result = replace(result, routed_experts=decode_routed_experts(meta.get("routed_experts"), count, shape))
            except ValueError as error:
                raise ServerError(f"{self.url}/generate: {error}") from error
        if result.finish_reason == "abort":
            raise ServerError(f"{self.url}/generate: a request was aborted: {meta['finish_reason']}")
        if len(result.logprobs) != len(output_ids) or not len(output_ids) or not np.isfinite(result.logprobs).all():
            raise ServerError(
                f"{self.url}/generate: {len(output_ids)} tokens came with {len(result.logprobs)} log-probs, "
                f"{int((~np.isfinite(result.logprobs)).sum())} of them not finite"
            )
        return result

    async def _post(self, route: str, body: dict[str, Any], timeout_seconds: float) -> Any:
        return await self._json(self._http.post(route, json=body, timeout=timeout_seconds), route)

    async def _json(self, request: Any, route: str) -> Any:
        try:
            answer = await request
        except httpx.TimeoutException as error:
            raise ServerError(f"{self.url}{route} did not answer in time ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise ServerError(f"{self.url}{route} cannot be reached: {error or type(error).__name__}") from error
        if answer.status_code != 200:
            raise ServerError(f"{self.url}{route} answered {answer.status_code}: {answer.text[:500]}")
        return answer.json()
