"""Runs an HTTP server in front of a real one. It forwards everything but what it is told to spoil."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx


class Exchange(http.server.BaseHTTPRequestHandler):
    """Handles one request. body: as it came; a fault may change it before `forwarded`."""

    protocol_version = "HTTP/1.1"
    body = b""

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.faults.get(self.path)  # type: ignore[attr-defined]
        if fault is not None:
            fault(self)
        else:
            answer = self.forwarded()
            self.say(answer.content, answer.status_code)

    do_GET = do_POST

    def forwarded(self) -> httpx.Response:
        url = f"{self.server.behind}{self.path}"  # type: ignore[attr-defined]
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
        return httpx.request(self.command, url, content=self.body, headers=headers, timeout=240, trust_env=False)

    def say(self, content: bytes, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def liar(behind: str, **faults: Callable[[Exchange], None]) -> Iterator[str]:
    """Run a liar and yield its URL. faults: by route without its slash, what is done in place of forwarding."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Exchange)
    server.behind, server.faults = behind, {f"/{name}": fault for name, fault in faults.items()}  # type: ignore[attr-defined]
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
