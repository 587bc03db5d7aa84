"""Runs `megatron-rl report --follow`: the page of unfinished runs, made anew after each step, for this machine
alone."""

import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron_rl.report.status import state_of

_HOST = "127.0.0.1"
_AGAIN_SECONDS = 5


class Follower:
    """Serves the newest page on a port of the loopback interface. `close()` ends that.

    The page asks at /version whether there is a newer one, and loads itself anew when there is.
    """

    def __init__(self, directories: Sequence[Path], page: Callable[[str], str], port: int = 0) -> None:
        """Open the port. page: makes the page, with its version in it. port: 0 picks one. Raise ValueError when the
        port is taken."""
        self._directories, self._page = directories, page
        self._lock = threading.Lock()
        self._made: tuple[str, bytes] = ("", b"")
        try:
            self._server = ThreadingHTTPServer((_HOST, port), self._handler())
        except OSError as error:
            raise ValueError(f"--port {port} cannot be used ({error.strerror}); name another, or 0") from None
        self.port = self._server.server_port
        self.url = f"http://{_HOST}:{self.port}/"

    def serve(self) -> None:
        """Serve until `close`, or a signal."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def version(self) -> str:
        """Return another text as soon as a run has another step or another state."""
        return " ".join(f"{_changed(run / 'metrics.jsonl')}{state_of(run)}" for run in self._directories)

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Return the status, content type and body of a GET."""
        if path == "/version":
            return 200, "text/plain; charset=utf-8", self.version.encode()
        if path != "/":
            return 404, "text/plain; charset=utf-8", b"there is only one page, /\n"
        with self._lock:
            version = self.version
            if self._made[0] != version:
                try:
                    self._made = version, self._page(version).encode()
                except ValueError as error:  # no step yet
                    return 503, "text/plain; charset=utf-8", f"{error}\n".encode()
            return 200, "text/html; charset=utf-8", self._made[1]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        follower = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                # A page of another site may have its name lead here; its requests bear that name.
                if self.headers.get("Host") not in (f"{_HOST}:{follower.port}", f"localhost:{follower.port}"):
                    self.send_error(403)
                    return
                code, kind, body = follower.answer(self.path)
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                if code == 503:
                    self.send_header("Refresh", str(_AGAIN_SECONDS))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Log nothing: a line for every look would be too many."""

        return Handler


def run_follow(directories: Sequence[Path], page: Callable[[str], str], port: int) -> int:
    """Serve the page until Ctrl-C. Returns the exit code."""
    follower = Follower(directories, page, port)
    sys.stdout.write(f"the report is at {follower.url} and renews itself after each step; Ctrl-C ends it\n")
    sys.stdout.flush()
    try:
        follower.serve()
    finally:
        follower.close()
    return 0


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
