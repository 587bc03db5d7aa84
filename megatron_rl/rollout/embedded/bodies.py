"""Reads the JSON bodies of requests: bounded, small ones at once, large ones aside and few at a time.

The event loop serves everybody, so nothing that one client sends may keep it for long. A large body is parsed in a
thread. The C code that parses JSON lets other threads run only where it calls Python, so there every number is made by
a Python function; lists, objects and strings, for which there is no such call, are counted first.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from megatron_rl.rollout.embedded.fields import BodyTooLarge, BodyTooSlow, RequestError, cut
from megatron_rl.rollout.embedded.threads import in_thread

T = TypeVar("T")

LARGE_BYTES = 256 * 1024
# A large body must come within this time and at this rate.
_PATIENCE_SECONDS, _SLOWEST_BYTES_PER_SECOND = 30.0, 1e6
_LARGE_AT_ONCE = 8
# A request has one list and one object for each sequence or tensor, and a few texts.
_MAX_LISTS_AND_OBJECTS, _MAX_QUOTES = 2**17, 2**21


class Bodies:
    """Reads the bodies of requests in one event loop."""

    def __init__(self) -> None:
        self._reading = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._parsing = asyncio.Lock()

    async def read(
        self, request: Request, max_bytes: int, parse: Callable[[dict[str, Any]], T], empty: T | None = None
    ) -> T:
        """Read a body and return what `parse` makes of it. Raise RequestError for what is no JSON object, or not a
        plain one.

        empty: what a body without any bytes means; None refuses it.
        """
        content = bytearray()
        chunks = request.stream()
        told = request.headers.get("content-length", "")
        if told.isdecimal() and int(told[:20]) > max_bytes:
            raise _too_large(max_bytes)
        async for chunk in chunks:
            content += chunk
            if len(content) > min(LARGE_BYTES, max_bytes):
                break
        if len(content) <= LARGE_BYTES:
            if len(content) > max_bytes:
                raise _too_large(max_bytes)
            if not content and empty is not None:
                return empty
            return parse(json_object(content, _PLAIN))
        async with self._reading:
            seconds = _PATIENCE_SECONDS + max_bytes / _SLOWEST_BYTES_PER_SECOND
            try:
                async with asyncio.timeout(seconds):
                    async for chunk in chunks:
                        content += chunk
                        if len(content) > max_bytes:
                            raise _too_large(max_bytes)
            except TimeoutError:
                raise BodyTooSlow(f"the body did not come within {seconds:.0f} s") from None
            async with self._parsing:
                return await in_thread(lambda: parse(json_object(content, _YIELDING)))


async def client_gone(request: Request) -> None:
    """Return when whoever asked has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def json_object(content: bytes | bytearray, decoder: json.JSONDecoder) -> dict[str, Any]:
    """Read the JSON object in `content`, which is UTF-8. Raise RequestError, which says what is wrong."""
    try:
        text = content.decode()
        if text.count("[") + text.count("{") > _MAX_LISTS_AND_OBJECTS or text.count('"') > _MAX_QUOTES:
            raise RequestError(
                f"the body must hold at most {_MAX_LISTS_AND_OBJECTS} lists and objects and {_MAX_QUOTES} quotation "
                "marks; send several requests"
            )
        body = decoder.decode(text)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"the body must be JSON: {error}") from None
    except RecursionError:
        raise RequestError("the body must be JSON that is not nested so deeply") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body must be at most {max_bytes} bytes long for this model; send several requests")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of the pairs, and refuse a key that comes twice: it means two things."""
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RequestError(f"{cut(twice)} must come once in its object, got it {keys.count(twice)} times")
    return made


def _refuse_constant(name: str) -> None:
    raise RequestError(f"the body must be JSON, which has no {name}")


def _integer(text: str) -> int:
    return int(text)


def _float(text: str) -> float:
    return float(text)


_PLAIN = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
_YIELDING = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_float
)
