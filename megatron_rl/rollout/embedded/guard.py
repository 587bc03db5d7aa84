"""Decides who may ask the embedded server: whoever shows its key, and never a page in somebody's browser."""

import hmac
import json
from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

# Open as in SGLang, for whoever only watches that the server lives. Not /health_generate, which makes a token.
OPEN_PATHS = ("/health", "/ready")
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Guard:
    """Refuses requests before their bodies are read. Plain ASGI: it sees neither bodies nor answers of the others."""

    def __init__(self, app: ASGIApp, key: str, host: str) -> None:
        """Guard `app`. key: what the header `Authorization: Bearer KEY` must hold; "" asks for none. host: by which the
        server is known beside loopback and the address at which a connection arrives."""
        self._app, self._key = app, key.encode()
        self._hosts = _LOOPBACK | {host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http" and (problem := self._problem(scope)):
            await _refuse(send, *problem)
        else:
            await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> tuple[int, str] | None:
        """Find the status and the reason of a refusal, or None."""
        # ASGI gives names in lower case. A header may come several times: each of its values counts.
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value.decode("latin-1").strip())
        hosts = [_name_in(host) for host in headers.get(b"host", ())]
        here = (scope.get("server") or ("",))[0]
        if not hosts or not all(host in self._hosts or host == here for host in hosts):
            # A page whose own name resolves to this machine would be of the same origin as the server.
            return 421, f"the header Host must name this server, got {', '.join(hosts) or 'none'}; ask by its address"
        if any(headers.get(b"origin", ())) or any(site != "none" for site in headers.get(b"sec-fetch-site", ())):
            return 403, "requests from pages in a browser are refused; ask with another program"
        if self._key and scope["path"] not in OPEN_PATHS and not self._is_shown(headers.get(b"authorization", [])):
            return 401, "this server serves who shows its key: the header Authorization: Bearer KEY"
        if _has_body(headers) and not _is_json(headers):
            # A page may send other types to anywhere without asking.
            return 415, "the body must be JSON, and the header Content-Type application/json"
        return None

    def _is_shown(self, values: list[str]) -> bool:
        if len(values) != 1:
            return False
        scheme, _, key = values[0].partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.encode(), self._key)


def _name_in(host: str) -> str:
    """Return a host's name without the port, since a tunnel has another one."""
    bare = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return bare.lower()


def _has_body(headers: Mapping[bytes, list[str]]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", ["0"]) != ["0"]


def _is_json(headers: Mapping[bytes, list[str]]) -> bool:
    types = [value.partition(";")[0].strip().lower() for value in headers.get(b"content-type", ())]
    return types == ["application/json"]


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": {"message": reason}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
