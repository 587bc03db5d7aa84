"""Serves OpenAI's API on loopback for a run, with an address and a key for each trajectory.

A request is looked at in this order: who asks, then how much it says, then what. So nobody without the key of a
trajectory has this process read a body, and what one sends is held against its own trajectory only.
"""

import asyncio
import hmac
import json
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from megatron_rl.gateway import answers
from megatron_rl.gateway.requests import asks_for_other_sampling, parse_chat, parse_text
from megatron_rl.gateway.trajectory import Answer, Trajectory
from megatron_rl.open_files import possible_open_files
from megatron_rl.rollout.embedded.bodies import Bodies, client_gone
from megatron_rl.rollout.embedded.fields import RequestError, TooMuchInFlight
from megatron_rl.rollout.embedded.guard import Guard
from megatron_rl.rollout.embedded.listening import bind, http_server

log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
# The most requests of one trajectory at a time.
_MAX_REQUESTS = 64
# Beyond this a client is shown that it is still waited for: many give up on a silent line.
_SILENT_SECONDS = 15.0
_END_SECONDS = 5.0
# An agent that only opens connections must not take this process's files from the run: a quarter of them at most.
_SHARE_OF_OPEN_FILES = 4
# A body may have so many bytes, and so many for each token that its trajectory may have.
_LEAST_BODY_BYTES, _BYTES_PER_TOKEN = 2**20, 64

Events = Callable[[Answer, str, bool], Iterator[bytes]]


@dataclass(slots=True, eq=False)
class Opened:
    """Holds a trajectory that may ask. base_url: for OpenAI's clients, with the key."""

    trajectory: Trajectory
    key: str
    base_url: str
    bodies: Bodies = field(default_factory=Bodies)
    num_requests: int = 0


class Gateway:
    """Serves in the event loop that calls `start`. `close()` ends it."""

    def __init__(
        self, model: str, vocab_size: int, sequence_tokens: int, temperature: float, top_p: float = 1.0
    ) -> None:
        """Serve nobody yet; `open` lets a trajectory ask. model: its name, for clients. sequence_tokens: the longest
        that one reads and writes."""
        self._model, self._vocab_size, self._temperature, self._top_p = model, vocab_size, temperature, top_p
        self._max_body_bytes = _LEAST_BODY_BYTES + _BYTES_PER_TOKEN * sequence_tokens
        self._open: dict[str, Opened] = {}
        self._told: set[str] = set()
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when the gateway takes requests."""
        self._socket = bind(_HOST, 0, False, "")
        most = possible_open_files() // _SHARE_OF_OPEN_FILES
        self._server = http_server(self.starlette(), "agents find the policy", self._socket, most)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        if self._serving is not None:
            self._server.should_exit = self._server.force_exit = True
            await asyncio.wait({self._serving}, timeout=_END_SECONDS)
            self._serving.cancel()
        if self._socket is not None:
            self._socket.close()

    def open(self, trajectory: Trajectory) -> Opened:
        """Let a trajectory ask, until `shut`."""
        assert self._socket is not None
        name = secrets.token_hex(8)
        url = f"http://{_HOST}:{self._socket.getsockname()[1]}/trajectories/{name}/v1"
        opened = self._open[name] = Opened(trajectory, secrets.token_hex(24), url)
        return opened

    def shut(self, opened: Opened) -> None:
        """Forget a trajectory's key, so that it cannot ask any more."""
        self._open = {name: one for name, one in self._open.items() if one is not opened}

    def starlette(self) -> Starlette:
        root = "/trajectories/{name}/v1"
        app = Starlette(
            routes=[
                Route(f"{root}/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route(f"{root}/completions", self._guarded(self._text), methods=["POST"]),
                Route(f"{root}/models", self._guarded(self._models), methods=["GET"]),
                Route(f"{root}/models/{{model:path}}", self._guarded(self._model_card), methods=["GET"]),
                Route("/{path:path}", _unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
            ],
            middleware=[Middleware(Guard, key="", host=_HOST)],
        )
        app.router.redirect_slashes = False
        return app

    # Requests ------------------------------------------------------------------------------------------------------

    def _guarded(
        self, answer: Callable[[Opened, Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Check who asks and how many requests are in flight, and answer faults as OpenAI's errors."""

        async def endpoint(request: Request) -> Response:
            opened = self._open.get(request.path_params["name"])
            if not _shows_key(request, opened):
                return _refusal(
                    "no trajectory has this address and this key; take both from its agent", "wrong_key", 401
                )
            assert opened is not None
            if opened.num_requests >= _MAX_REQUESTS:
                return _error(
                    TooMuchInFlight(f"{_MAX_REQUESTS} requests of this trajectory are in flight; wait for some")
                )
            opened.num_requests += 1
            try:
                return await answer(opened, request)
            except RequestError as error:
                return _error(error)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            finally:
                opened.num_requests -= 1

        return endpoint

    async def _chat(self, opened: Opened, request: Request) -> Response:
        body = await opened.bodies.read(request, self._max_body_bytes, lambda body: body)
        asked = parse_chat(body)
        self._tell_of_sampling(body)
        make = answers.chat_events if asked.options.stream else None
        return await self._answered(opened, request, opened.trajectory.chat(asked), make, asked.options.usage)

    async def _text(self, opened: Opened, request: Request) -> Response:
        body = await opened.bodies.read(request, self._max_body_bytes, lambda body: body)
        asked = parse_text(body, self._vocab_size)
        self._tell_of_sampling(body)
        make = answers.text_events if asked.options.stream else None
        return await self._answered(
            opened, request, opened.trajectory.complete(asked), make, asked.options.usage, is_chat=False
        )

    async def _models(self, opened: Opened, request: Request) -> Response:
        del opened, request
        return _json({"object": "list", "data": [self._card()]})

    async def _model_card(self, opened: Opened, request: Request) -> Response:
        del opened, request
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": 0, "owned_by": "megatron_rl"}

    async def _answered(
        self,
        opened: Opened,
        request: Request,
        work: Coroutine[Any, Any, Answer],
        events: Events | None,
        usage: bool,
        *,
        is_chat: bool = True,
    ) -> Response:
        """Answer when the turn is sampled; give it up when the client is gone. events: makes a stream."""
        task = asyncio.create_task(work)
        gone = asyncio.create_task(client_gone(request))
        streams = False
        try:
            await asyncio.wait({task, gone}, timeout=_SILENT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and gone.done():
                return Response(status_code=499)
            streams = not task.done()
        finally:
            gone.cancel()
            if not streams:
                task.cancel()
        media_type = "text/event-stream" if events is not None else "application/json"
        if streams:
            return StreamingResponse(self._slowly(opened, task, events, usage, is_chat), media_type=media_type)
        if events is not None:
            return Response(b"".join(events(task.result(), self._model, usage)), media_type=media_type)
        return _json(self._whole(task.result(), is_chat))

    async def _slowly(
        self, opened: Opened, task: "asyncio.Task[Answer]", events: Events | None, usage: bool, is_chat: bool
    ) -> AsyncIterator[bytes]:
        """Yield signs of life until the turn is sampled, and then the answer. An error comes in its place."""
        opened.num_requests += 1
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_SILENT_SECONDS)
                if not task.done():
                    yield answers.WAITING if events is not None else b" "
            try:
                answer = task.result()
            except RequestError as error:
                body = answers.error_body(str(error), _code(error), error.status)
                yield answers.event(body) + answers.DONE if events is not None else json.dumps(body).encode()
                return
            if events is None:
                yield json.dumps(self._whole(answer, is_chat)).encode()
                return
            for line in events(answer, self._model, usage):
                yield line
        finally:
            opened.num_requests -= 1
            task.cancel()  # the client is gone

    def _whole(self, answer: Answer, is_chat: bool) -> dict[str, Any]:
        return answers.chat_answer(answer, self._model) if is_chat else answers.text_answer(answer, self._model)

    def _tell_of_sampling(self, body: dict[str, Any]) -> None:
        """Log that an agent asks for other sampling, once for each field: black-box programs ask for what they were
        written for."""
        other = asks_for_other_sampling(body, self._temperature, self._top_p)
        name = other.partition(" ")[0]
        if other and name not in self._told:
            self._told.add(name)
            log.warning(
                "an agent asks for %s; the configuration decides how all is sampled, with temperature %g and top_p %g, "
                "and that is what it gets",
                *(other, self._temperature, self._top_p),
            )


def _shows_key(request: Request, opened: Opened | None) -> bool:
    values = request.headers.getlist("authorization")
    scheme, _, key = (values[0] if len(values) == 1 else "").partition(" ")
    expected = opened.key if opened is not None else secrets.token_hex(24)
    return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), expected.encode())


async def _unknown(request: Request) -> Response:
    del request
    return _refusal(
        "there is nothing here; below its address a trajectory has chat/completions, completions and models",
        "not_found",
        404,
    )


def _code(error: RequestError) -> str:
    return str(getattr(error, "code", "invalid_request"))


def _error(error: RequestError) -> Response:
    return _refusal(str(error), _code(error), error.status)


def _refusal(message: str, code: str, status: int) -> Response:
    return _json(answers.error_body(message, code, status), status)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")
