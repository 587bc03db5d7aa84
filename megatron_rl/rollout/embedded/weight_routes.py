"""Answers the routes that change or check weights."""

import asyncio
import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from megatron_rl.families import Architecture, tensor_shapes
from megatron_rl.rollout.embedded.answers import json_answer, success, wait
from megatron_rl.rollout.embedded.bodies import Bodies
from megatron_rl.rollout.embedded.engine import Engine
from megatron_rl.rollout.embedded.fields import MAX_PATH, RequestError, cut, flag, text
from megatron_rl.rollout.embedded.hold import Hold
from megatron_rl.rollout.embedded.occupation import Occupation
from megatron_rl.rollout.embedded.packing import places
from megatron_rl.rollout.embedded.threads import in_thread
from megatron_rl.rollout.embedded.update_lock import UpdateLock
from megatron_rl.rollout.embedded.updates import UpdateError, WeightUpdates
from megatron_rl.rollout.embedded.weight_requests import (
    DEFAULT_GROUP,
    MAX_GROUP_NAME,
    BucketLimits,
    parse_bucket,
    parse_join,
)
from megatron_rl.rollout.embedded.weight_roots import WeightRoots
from megatron_rl.tensor_bytes import checksum

log = logging.getLogger(__name__)


class WeightRoutes:
    """Answers one route with each method. Updates take the lock one at a time, and block no event loop.

    A session of updates ends by itself when nothing comes for the engine's `hold_timeout_seconds`. A release does not:
    it may last as long as others need the memory, and keeps nobody waiting, because what it forbids is refused.
    """

    def __init__(self, engine: Engine, update_lock: UpdateLock, occupation: Occupation, bodies: Bodies) -> None:
        self._engine, self._update_lock, self._occupation = engine, update_lock, occupation
        self._config: Architecture = engine.config
        self._updates = WeightUpdates(engine.config, engine.options.dtype, engine.options.update_timeout_seconds)
        self._group_lock = asyncio.Lock()  # groups and session are for one at a time
        self._checking = asyncio.Lock()
        self._roots = WeightRoots(engine.options.model_path, engine.options.weights_roots)
        self._session = Hold(engine.options.hold_timeout_seconds, lambda: self._updates.open, self._end_session)
        self._bodies = bodies
        self.limits = BucketLimits(
            tensors=2 * len(tensor_shapes(engine.config)), values=2 * engine.config.num_parameters()
        )

    async def update_weights_from_disk(self, body: dict[str, Any]) -> Response:
        path = text(body, "model_path", maximum=MAX_PATH)
        version = None if body.get("weight_version") is None else text(body, "weight_version")
        flush = flag(body, "flush_cache", True)
        directory = self._roots.directory(path)
        if flag(body, "abort_all_requests", False):
            await wait(self._engine.abort(None))
        async with self._update_lock.updating():
            self._refuse_flush(flush)
            self._occupation.check_takes_weights()
            if self._updates.open:
                raise UpdateError("a weight-update session is open; call end_weight_update first")
            try:
                weights = await in_thread(lambda: self._engine.load(directory))
            except ValueError as error:
                raise UpdateError(f"weights are unchanged: {error}") from None
            await wait(self._engine.swap(weights, path, version))
            self._occupation.weights_came()
        return success("Succeeded to update model weights." + version_note(version), num_paused_requests=0)

    async def init_weights_update_group(self, body: dict[str, Any]) -> Response:
        request = parse_join(body)
        async with self._group_lock:
            await in_thread(lambda: self._updates.join_group(request))
        return success("Succeeded to initialize custom process group.")

    async def destroy_weights_update_group(self, body: dict[str, Any]) -> Response:
        async with self._group_lock:
            self._updates.leave_group(text(body, "group_name", DEFAULT_GROUP, MAX_GROUP_NAME))
        return success("Succeeded to destroy custom process group.")

    # The lock of groups first: who waits for somebody's rendezvous to end must not keep requests out meanwhile.

    async def begin_weight_update(self, _: dict[str, Any]) -> Response:
        with self._session.touched():
            async with self._group_lock, self._update_lock.updating():
                self._occupation.check_takes_weights()
                self._updates.begin()
        return success("Success")

    async def update_weights_from_distributed(self, body: dict[str, Any]) -> Response:
        request = parse_bucket(body, self.limits)
        if request.abort_all:
            await wait(self._engine.abort(None))
        with self._session.touched():
            async with self._group_lock, self._update_lock.updating():
                self._refuse_flush(request.flush_cache)
                await in_thread(lambda: self._updates.receive(request))
        return success("Succeeded to update parameter online." + version_note(request.weight_version))

    async def end_weight_update(self, _: dict[str, Any]) -> Response:
        with self._session.touched():
            async with self._group_lock, self._update_lock.updating():
                weights, version = await in_thread(self._updates.finish)
                await wait(self._engine.swap(weights, None, version))
                self._occupation.weights_came()
        return success("Success")

    async def _end_session(self) -> None:
        async with self._group_lock:
            if self._updates.open:
                log.warning(
                    "no weights came for %g s (--hold-timeout): the session of whoever began it is over",
                    self._engine.options.hold_timeout_seconds,
                )
                await in_thread(self._updates.abandon)

    async def update_weights_from_tensor(self, _: dict[str, Any]) -> Response:
        raise UpdateError(
            "the embedded server does not unpickle what arrives over HTTP; use update_weights_from_distributed or "
            "update_weights_from_disk"
        )

    async def release_memory_occupation(self, body: dict[str, Any]) -> Response:
        """Release memory, and answer null, as SGLang does."""
        self._occupation.release(body, idle=await wait(self._engine.flush()))
        return json_answer(None)

    async def resume_memory_occupation(self, body: dict[str, Any]) -> Response:
        self._occupation.resume(body)
        return json_answer(None)

    def _refuse_flush(self, flush: bool) -> None:
        """Raise UpdateError for a flush in a pause in which requests stand still. SGLang ends itself when it has to
        flush the cache then, so do not get used to it."""
        if flush and self._update_lock.paused and self._engine.load_state()["running"]:
            raise UpdateError(
                "flush_cache must be false while requests are paused in place, got true; send false or pause by retract"
            )

    async def weights_checker(self, request: Request) -> Response:
        """Answer with checksums of the tensors that serve, in the dtypes in which they serve."""
        action = await self._bodies.read(
            request, self.limits.body_bytes, lambda body: text(body, "action", "checksum"), empty="checksum"
        )
        if action != "checksum":
            raise RequestError(f"action must be 'checksum', got {cut(action)}")
        async with self._checking:  # one at a time: it takes a core
            weights = await wait(self._engine.weights())
            tensors = places(weights, self._config)
            sums = await in_thread(lambda: {name: checksum(tensor) for name, tensor in tensors.items()})
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        return success("Success", checksums=sums, dtypes=dtypes)

    async def update_weight_version(self, body: dict[str, Any]) -> Response:
        version = text(body, "new_version")
        if flag(body, "abort_all_requests", True):
            await wait(self._engine.abort(None))
        await wait(self._engine.set_version(version))
        return success(f"Weight version updated to {version}", new_version=version)


def version_note(version: str | None) -> str:
    return "" if version is None else f" Weight version updated to {version}."
