"""Tests that unused connections are closed before they use up the file descriptors of the process."""

import asyncio

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from until import until

from megatron_rl.rollout.embedded.listening import bind, http_server

MOST = 8
REQUEST = b"GET /%s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def _flood() -> None:
    asked, answers = asyncio.Event(), asyncio.Event()

    async def slow(request):
        asked.set()
        await answers.wait()
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/slow", slow), Route("/quick", lambda request: PlainTextResponse("done"))])
    bound = bind("127.0.0.1", 0, False, "")
    server = http_server(app, "test", bound, MOST)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    await until(lambda: server.started, "the server has started")
    where = bound.getsockname()
    first, first_writer = await asyncio.open_connection(*where)
    first_writer.write(REQUEST % b"slow")
    await asked.wait()
    idle = [await asyncio.open_connection(*where) for _ in range(30)]
    quick, quick_writer = await asyncio.open_connection(*where)
    quick_writer.write(REQUEST % b"quick")
    assert (await quick.readline()).startswith(b"HTTP/1.1 200")
    # The one that is answered and the quick one are among the eight; the newest of the others are left.
    assert [await reader.read(1) for reader, _ in idle[:24]] == [b""] * 24
    for reader, writer in idle[24:]:
        writer.write(REQUEST % b"quick")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    answers.set()
    assert (await first.readline()).startswith(b"HTTP/1.1 200")
    for writer in (first_writer, quick_writer, *(writer for _, writer in idle)):
        writer.close()
    server.should_exit = True
    await serving


def test_unused_connections_make_room_and_requests_are_answered() -> None:
    asyncio.run(asyncio.wait_for(_flood(), 240))
