"""Stands in for an OpenAI-compatible endpoint, in this process."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StandIn(http.server.BaseHTTPRequestHandler):
    """Serves /v1/models and /v1/chat/completions.

    replies: given out in turn; without one `answer` is asked, with the request. Either gives the text of a reply or a
    whole choice; a number is a status, a pair a status and what is said with it, None breaks the connection, and an
    event hangs until it is set.
    """

    model: str
    replies: list[Any]
    asked: list[tuple[dict[str, Any], str | None]]
    answer: Callable[[dict[str, Any]], Any]

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": self.model}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((body, self.headers.get("Authorization")))
        reply = self.replies.pop(0) if self.replies else type(self).answer(body)
        if reply is None:
            self.close_connection = True
            return
        if isinstance(reply, threading.Event):
            reply.wait(600)
            return
        if isinstance(reply, int):
            reply = reply, {"error": "busy"}
        if isinstance(reply, tuple):
            self._send(*reply)
        else:
            choice = reply if isinstance(reply, dict) else {"message": {"content": reply}, "finish_reason": "stop"}
            self._send(200, {"choices": [choice], "usage": {"completion_tokens": 7}})

    def _send(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stand_in(model: str) -> Iterator[tuple[str, type[StandIn]]]:
    """Run an endpoint. Yield its URL, and the class whose attributes say what it does."""
    handler = type("Scripted", (StandIn,), {"model": model, "replies": [], "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
