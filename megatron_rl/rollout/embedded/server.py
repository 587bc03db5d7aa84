"""Answers SGLang's HTTP routes over one Engine, on one event loop."""

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_rl import __version__
from megatron_rl.families import Architecture, family_of
from megatron_rl.rollout.embedded.answers import errors_as_json, json_answer, wait
from megatron_rl.rollout.embedded.bodies import Bodies, client_gone
from megatron_rl.rollout.embedded.engine import PAUSE_MODES, Engine, EngineOptions, EngineStopped
from megatron_rl.rollout.embedded.fields import RequestError, cut, flag, text
from megatron_rl.rollout.embedded.in_flight import InFlight, Job, Listener
from megatron_rl.rollout.embedded.occupation import Occupation
from megatron_rl.rollout.embedded.protocol import GenerateRequest, Limits, PromptRequest, meta_info, parse_generate
from megatron_rl.rollout.embedded.sampling import derive_seeds
from megatron_rl.rollout.embedded.sequence import Event, Sequence
from megatron_rl.rollout.embedded.streams import DONE, Stream, error_lines
from megatron_rl.rollout.embedded.update_lock import UpdateLock
from megatron_rl.rollout.embedded.weight_routes import WeightRoutes
from megatron_rl.rollout.routing import MAX_EXPERTS

log = logging.getLogger(__name__)

HEALTH_TIMEOUT_SECONDS = 20


class App:
    """Holds the engine and the requests in flight; `on_failure` is called once if the engine dies."""

    def __init__(
        self, config: Architecture, options: EngineOptions, on_failure: Callable[[], None], guard: Middleware
    ) -> None:
        """Start the engine. guard: rollout/embedded/guard.py, before every route."""
        self._guard = guard
        self.loop = asyncio.get_running_loop()
        self.config = config
        self.limits = Limits(vocab_size=config.vocab_size, context_length=options.context_length)
        self.engine = Engine(config, options, self._deliver)
        self._on_failure = on_failure
        self._in_flight = InFlight(options.context_length)
        self._update_lock = UpdateLock(options.hold_timeout_seconds, self._end_pause)
        self._leaving: set[asyncio.Task[None]] = set()  # streams that still keep updates out
        self._occupation = Occupation()
        self._bodies = Bodies()
        self._weights = WeightRoutes(self.engine, self._update_lock, self._occupation, self._bodies)
        self.engine.start()

    def close(self) -> None:
        self.engine.stop()

    def starlette(self) -> Starlette:
        def post(path: str, handler: Callable[[dict[str, Any]], Awaitable[Response]]) -> Route:
            async def endpoint(request: Request) -> Response:
                max_bytes = self._weights.limits.body_bytes
                return await handler(await self._bodies.read(request, max_bytes, lambda body: body))

            return Route(path, errors_as_json(endpoint), methods=["POST"])

        def get(path: str, handler: Callable[[], Awaitable[Response]], methods: tuple[str, ...] = ("GET",)) -> Route:
            async def endpoint(_: Request) -> Response:
                return await handler()

            return Route(path, errors_as_json(endpoint), methods=list(methods))

        app = Starlette(
            routes=[
                Route("/generate", errors_as_json(self.generate), methods=["POST"]),
                post("/update_weights_from_disk", self._weights.update_weights_from_disk),
                post("/init_weights_update_group", self._weights.init_weights_update_group),
                post("/destroy_weights_update_group", self._weights.destroy_weights_update_group),
                post("/begin_weight_update", self._weights.begin_weight_update),
                post("/update_weights_from_distributed", self._weights.update_weights_from_distributed),
                post("/end_weight_update", self._weights.end_weight_update),
                post("/update_weights_from_tensor", self._weights.update_weights_from_tensor),
                post("/update_weight_version", self._weights.update_weight_version),
                Route("/weights_checker", errors_as_json(self._weights.weights_checker), methods=["GET", "POST"]),
                post("/release_memory_occupation", self._weights.release_memory_occupation),
                post("/resume_memory_occupation", self._weights.resume_memory_occupation),
                post("/pause_generation", self.pause_generation),
                post("/continue_generation", self.continue_generation),
                post("/abort_request", self.abort_request),
                get("/flush_cache", self.flush_cache, ("GET", "POST")),
                get("/health", self.health),
                get("/ready", self.health),
                get("/ping", self.health),
                get("/health_generate", self.health_generate),
                get("/server_info", self.server_info),
                get("/get_server_info", self.server_info),
                get("/model_info", self.model_info),
                get("/get_model_info", self.model_info),
                get("/v1/models", self.models),
            ],
            middleware=[self._guard],
        )
        app.router.redirect_slashes = False  # to what the client says that this host is called
        return app

    # Generation ----------------------------------------------------------------------------------------------------

    async def generate(self, request: Request) -> Response:
        started = time.perf_counter()
        asked = await self._bodies.read(request, self.limits.body_bytes, lambda body: parse_generate(body, self.limits))
        self._occupation.check_generates()
        jobs = self._sequences(asked)
        if asked.stream:
            return StreamingResponse(self._stream(asked, jobs, started), media_type="text/event-stream")
        self._in_flight.enter(jobs)
        gone = asyncio.create_task(client_gone(request))
        gone.add_done_callback(lambda task: None if task.cancelled() else self._abandon(jobs))
        try:
            async with self._update_lock.generating():
                if gone.done():
                    return Response(status_code=499)  # nobody reads it
                self.engine.submit([sequence for _, sequence in jobs])
                answers = []
                for number, (prompt, sequence) in enumerate(jobs, 1):
                    event = await sequence.listener.next()
                    if gone.done():
                        return Response(status_code=499)
                    answers.append(json.dumps(self._answer(prompt, event, started)))
                    if not number % 16:  # an answer of thousands is made between those of others
                        await asyncio.sleep(0)
        finally:
            gone.cancel()
            self._in_flight.leave(jobs)
        content = answers[0] if asked.single else f"[{', '.join(answers)}]"
        return Response(content, media_type="application/json")

    def _sequences(self, asked: GenerateRequest) -> list[Job]:
        """Make one sequence per sample, all samples of prompt 0 first."""
        jobs = []
        for prompt in asked.prompts:
            params = prompt.params
            self.engine.texts.check(params)
            if prompt.return_routed_experts and self.config.num_experts > MAX_EXPERTS:
                raise RequestError(
                    f"return_routed_experts works for up to {MAX_EXPERTS} experts, the model has "
                    f"{self.config.num_experts}; leave it out"
                )
            first_seed = secrets.randbits(64) if params.sampling_seed is None else params.sampling_seed
            stops = () if params.ignore_eos else (*self.config.eos_token_ids, *params.stop_token_ids)
            for seed in derive_seeds(first_seed, params.n):
                sequence = Sequence(
                    # As in SGLang the samples of a prompt have ids of their own, which only the answer tells.
                    rid=prompt.rid if params.n == 1 else uuid.uuid4().hex,
                    prompt=prompt.input_ids,
                    params=params,
                    seed=seed,
                    stop_ids=stops,
                    input_logprob_start=prompt.logprob_start,
                    stream=asked.stream,
                    return_routed_experts=prompt.return_routed_experts,
                    listener=Listener(),
                )
                jobs.append((prompt, sequence))
        return jobs

    def _abandon(self, jobs: list[Job]) -> None:
        """Abort the sequences of a client that is gone, so that nothing is generated for nobody."""
        with suppress(EngineStopped):
            self.engine.abort_sequences([sequence for _, sequence in jobs])

    async def _stream(self, asked: GenerateRequest, jobs: list[Job], started: float) -> AsyncIterator[bytes]:
        """Yield cumulative answers as server-sent events; those of a list carry their `index`."""
        try:
            self._in_flight.enter(jobs)
        except RequestError as error:
            yield error_lines(error)
            return
        stream = Stream(jobs, lambda prompt, event: self._answer(prompt, event, started), indexed=not asked.single)
        try:
            await self._submit_in_turn(jobs)
            stream.start()
            while (line := await stream.next()) is not None:
                yield line
            yield DONE
        except EngineStopped as error:
            yield error_lines(error)
        finally:
            stream.close()
            if stream.num_open:
                self._abandon(jobs)
            self._in_flight.leave(jobs)

    async def _submit_in_turn(self, jobs: list[Job]) -> None:
        """Submit once its turn has come, and stay inside until the tokens are there.

        A reader may take its time: weight updates wait for the tokens, not for who reads them.
        """

        async def leave_behind(inside: AsyncExitStack) -> None:
            async with inside:
                for _, sequence in jobs:
                    await sequence.listener.ended.wait()

        async with AsyncExitStack() as inside:
            await inside.enter_async_context(self._update_lock.generating())
            self.engine.submit([sequence for _, sequence in jobs])
            leaving = asyncio.create_task(leave_behind(inside.pop_all()))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    def _answer(self, prompt: PromptRequest, event: Event, started: float) -> dict[str, Any]:
        sequence = event.sequence
        inputs: list[list[Any]] = []
        if prompt.logprob_start is not None:
            known = sequence.input_logprobs or []
            # As in SGLang the first one asked for has no log-prob, wherever it stands.
            inputs = [
                [None if position == prompt.logprob_start else known[position], prompt.input_ids[position], None]
                for position in range(prompt.logprob_start, len(known))
            ]
        return {
            "text": self.engine.texts.decode(event.output_ids, prompt.params, event.finish_reason),
            "output_ids": event.output_ids,
            "meta_info": meta_info(
                rid=sequence.rid,
                prompt_tokens=None if event.queued else len(prompt.input_ids),
                output_ids=event.output_ids,
                output_logprobs=event.output_logprobs if prompt.return_logprob else None,
                input_token_logprobs=inputs if prompt.return_logprob else None,
                finish_reason=event.finish_reason,
                weight_version=event.weight_version,
                weight_versions=event.version_spans,
                routed_experts=event.routed_experts,
                e2e_latency=time.perf_counter() - started,
            ),
        }

    def _deliver(self, events: list[Event]) -> None:
        """Pass events on to the event loop. The engine thread calls this."""
        try:
            self.loop.call_soon_threadsafe(self._receive, events)
        except RuntimeError:
            log.info("the event loop is closed; %d results are dropped", len(events))

    def _receive(self, events: list[Event]) -> None:
        for event in events:
            event.sequence.listener.tell(event)
        if self.engine.failure is not None:
            self._in_flight.fail(f"the engine failed: {self.engine.failure!r}")
            self._on_failure()

    # Control -------------------------------------------------------------------------------------------------------

    async def pause_generation(self, body: dict[str, Any]) -> Response:
        mode = body.get("mode", "abort")
        if mode not in PAUSE_MODES:
            raise RequestError(f"mode must be one of {', '.join(PAUSE_MODES)}, got {cut(mode)}")
        await self._update_lock.pause()
        await wait(self.engine.pause(mode))
        return json_answer({"status": "ok", "message": f"Generation paused ({mode})."})

    async def continue_generation(self, _: dict[str, Any]) -> Response:
        await wait(self.engine.resume())
        await self._update_lock.resume()
        return json_answer({"status": "ok", "message": "Generation continued."})

    async def _end_pause(self) -> None:
        log.warning(
            "generation has been paused for %g s without a word from whoever paused it (--hold-timeout): it goes on",
            self.engine.options.hold_timeout_seconds,
        )
        await self.continue_generation({})

    async def abort_request(self, body: dict[str, Any]) -> Response:
        """Abort requests. An id that nobody has is no error: it may have just ended. One that is held back by a pause
        is not hit."""
        if flag(body, "abort_all", False):
            await wait(self.engine.abort(None))
        elif (rid := text(body, "rid")) in self._in_flight:
            await wait(self.engine.abort(rid))
        return Response(status_code=200)

    async def flush_cache(self) -> Response:
        if await wait(self.engine.flush()):
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse("The cache is not flushed: requests are running or waiting.\n", 400)

    # Information ---------------------------------------------------------------------------------------------------

    async def health(self) -> Response:
        return Response(status_code=200 if self.engine.is_alive() else 503)

    async def health_generate(self) -> Response:
        """Generate one token to see that the engine works."""
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        asked = parse_generate(body, self.limits)
        jobs = self._sequences(asked)
        self._in_flight.enter(jobs)
        try:
            self.engine.submit([sequence for _, sequence in jobs])
            await asyncio.wait_for(jobs[0][1].listener.next(), HEALTH_TIMEOUT_SECONDS)
        except (TimeoutError, EngineStopped):
            self._abandon(jobs)
            return Response(status_code=503)
        finally:
            self._in_flight.leave(jobs)
        return Response(status_code=200)

    async def server_info(self) -> Response:
        engine, options = self.engine, self.engine.options
        return json_answer(
            {
                "server": "megatron_rl.rollout.embedded",
                "version": f"embedded-{__version__}",
                "model_path": engine.model_path,
                "dtype": str(options.dtype).removeprefix("torch."),
                "context_length": options.context_length,
                "max_running_requests": options.max_running_requests,
                "weight_version": engine.weight_version,
                "batch_invariant": engine.row_counts.invariant,
                "decode_rows": list(engine.row_counts.decode),
                "internal_states": [engine.load_state()],
            }
        )

    async def model_info(self) -> Response:
        family = family_of(self.config)
        return json_answer(
            {
                "model_path": self.engine.model_path,
                "served_model_name": self.engine.model_path,
                "tokenizer_path": self.engine.options.model_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self.engine.weight_version,
                "model_type": family.model_types[0],
                "architectures": [family.architectures[0]],
            }
        )

    async def models(self) -> Response:
        card = {
            "id": self.engine.options.model_path,
            "object": "model",
            "owned_by": "megatron_rl",
            "max_model_len": self.limits.context_length,
        }
        return json_answer({"object": "list", "data": [card]})
