"""This module is a client of OpenAI-compatible endpoints. The judge of answers (reward/model_judge.py) and the teacher
of distillation (rollout/teacher.py) share it.

GET {url}/models -> {data: [{id}]}
POST {url}/chat/completions {model, messages, ...} -> {choices: [{message: {content}, finish_reason}], usage}
"""

import asyncio
import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from megatron_rl.config.endpoints import EndpointSection
from megatron_rl.keys import bearer, hidden, key_in_environment
from megatron_rl.parsing import parse_json
from megatron_rl.proxies import proxy_for, told_of_proxy

log = logging.getLogger(__name__)

_RETRY = {408, 429, 500, 502, 503, 504}
_PAUSE_SECONDS = 1.0  # before the second try; doubles
_MAX_ASKED_PAUSE_SECONDS = 60.0  # of what an endpoint asks for by Retry-After
_TELL_EVERY_SECONDS = 10.0
_SHOWN_CHARACTERS = 300


class EndpointError(Exception):
    """Says that an endpoint did not answer after all tries, or that its answer is no chat completion. Its text never
    holds the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Holds one answer of an endpoint.
    content: "" where the endpoint has none. reasoning: what a reasoning model thought before it, where the endpoint
    keeps it apart; else "". finish_reason: "stop", "length", or another word of the endpoint; "" for none.
    num_tokens: generated, by the endpoint's own count; 0 where it does not say."""

    content: str
    reasoning: str
    finish_reason: str
    num_tokens: int


class Endpoint:
    """Asks one model. It may be used in several event loops."""

    def __init__(self, section: EndpointSection, where: str, tries: int = 3) -> None:
        """Read the key and the proxy, and ask which models the endpoint lists. where: the section's name, for messages.
        ValueError when the environment lacks the key, or names a proxy that cannot be used, when the url holds a key,
        or the endpoint does not list the model."""
        if "@" in section.url.split("://")[-1].split("/")[0] or "?" in section.url:  # it is logged and written down
            raise ValueError(
                f"{where}.url must hold neither a password nor a query; put a key into the environment "
                f"({where}.api_key_variable)"
            )
        self._section, self._where, self._tries = section, where, tries
        self._key = key_in_environment(section.api_key_variable, f"{where}.api_key_variable")
        self._headers = bearer(self._key)
        self._url = section.url.rstrip("/")
        self._proxy = proxy_for(self._url, f"{where}.url")
        self._tls = httpx.create_ssl_context()  # takes long to make
        self._told = -_TELL_EVERY_SECONDS
        self._room: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )
        self._check()

    def room(self) -> asyncio.Semaphore:
        """Return the semaphore to hold while asking. It lets `concurrent` in at a time, first come first served."""
        loop = asyncio.get_running_loop()
        return self._room.setdefault(loop, asyncio.Semaphore(self._section.concurrent))

    async def ask(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Reply:
        """Ask for one chat completion. options: further keys of the request. A busy or silent endpoint is asked again.
        Cancelling it closes the connection."""
        body = {"model": self._section.model, "messages": list(messages), **options}
        async with httpx.AsyncClient(
            headers=self._headers,
            timeout=self._section.timeout_seconds,
            verify=self._tls,
            trust_env=False,
            proxy=self._proxy,
        ) as client:
            for attempt in range(self._tries):
                pause = _PAUSE_SECONDS * 2**attempt
                try:
                    # httpx limits the silence; an endpoint that keeps the line alive with spaces is not silent.
                    async with asyncio.timeout(self._section.timeout_seconds):
                        response = await client.post(f"{self._url}/chat/completions", json=body)
                except TimeoutError:
                    problem = f"no answer within {self._section.timeout_seconds:g} s ({self._where}.timeout_seconds)"
                except httpx.HTTPError as error:
                    problem = self._shown(error)
                    if not _may_pass(error):
                        break
                else:
                    if response.is_success:
                        return self._reply(response)
                    problem = self._status(response)
                    if response.status_code not in _RETRY:
                        break
                    pause = max(pause, _asked_pause(response))
                if attempt < self._tries - 1:
                    self._tell(problem, pause)
                    await asyncio.sleep(pause)
        raise EndpointError(problem + told_of_proxy(self._proxy))

    def _check(self) -> None:
        url, model = self._section.url, self._section.model
        try:
            listed = httpx.get(
                f"{self._url}/models",
                headers=self._headers,
                timeout=min(60.0, self._section.timeout_seconds),
                verify=self._tls,
                trust_env=False,
                proxy=self._proxy,
            )
            if not listed.is_success:
                raise ValueError(self._status(listed))
            names = [entry["id"] for entry in parse_json(listed.content)["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._where}.url {url} does not list its models{told_of_proxy(self._proxy)} ({self._shown(error)}); "
                "it must be the address of an OpenAI-compatible server, such as http://host:port/v1"
                + (", which that proxy reaches, or one that no_proxy names" if self._proxy else "")
            ) from None
        if model not in names:
            raise ValueError(f"{self._where}.model {model!r} is not served at {url}; it has {', '.join(names)}")

    def _reply(self, response: httpx.Response) -> Reply:
        try:
            reply = parse_json(response.content)
            choice = reply["choices"][0]
            message = choice["message"]
            return Reply(
                content=_clean(message.get("content")),
                reasoning=_clean(message.get("reasoning_content") or message.get("reasoning")),
                finish_reason=_clean(choice.get("finish_reason")),
                num_tokens=int((reply.get("usage") or {}).get("completion_tokens") or 0),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError(f"no chat completion: {self._excerpt(response)}") from None

    def _status(self, response: httpx.Response) -> str:
        return f"HTTP {response.status_code}: {self._excerpt(response)}"

    def _excerpt(self, response: httpx.Response) -> str:
        return hidden(response.text, self._key).strip()[:_SHOWN_CHARACTERS]

    def _shown(self, error: Exception) -> str:
        """Describe an error. Leave out the text of one that may quote the request's headers, and so the key."""
        name = type(error).__name__
        text = hidden(str(error), self._key)
        return name if isinstance(error, httpx.LocalProtocolError) or not text else f"{name}: {text}"

    def _tell(self, problem: str, pause: float) -> None:
        """Log a problem, but only now and then: hundreds of requests may meet the same."""
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY_SECONDS:
            self._told = now
            log.warning("%s at %s: %s; asking again in %g s", self._where, self._section.url, problem, pause)


def _may_pass(error: httpx.HTTPError) -> bool:
    """Tell whether asking again may help."""
    return isinstance(error, httpx.TransportError) and not isinstance(
        error, httpx.LocalProtocolError | httpx.UnsupportedProtocol
    )


def _asked_pause(response: httpx.Response) -> float:
    """Return the seconds of Retry-After; 0 without one, or where it is a date."""
    value = response.headers.get("Retry-After", "")
    return min(float(value), _MAX_ASKED_PAUSE_SECONDS) if value.isdecimal() else 0.0


def _clean(value: object) -> str:
    """Return a text that a file takes: None becomes "", and half a surrogate pair becomes "?". TypeError for what is no
    text."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return (value or "").encode(errors="replace").decode()
