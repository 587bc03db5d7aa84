"""Gets rewards from a service: the responses to a prompt are posted together, and it answers with a score for each.

POST url {prompt, messages, answer, meta, domain, id, responses, finish_reasons, response_tokens}
     -> {"scores": [a number, or {"value": ..., "reason": ..., "details": ..., "parts": {...}}, ...]}
"""

import asyncio
import time
from collections.abc import Sequence

import httpx

from megatron_rl.config.reward import RewardSection
from megatron_rl.keys import bearer, hidden, key_in_environment
from megatron_rl.parsing import parse_json
from megatron_rl.proxies import proxy_for, told_of_proxy
from megatron_rl.reward.score import Attempt, Score, Task, of_group, of_task, verdict_of
from megatron_rl.reward.verdict import Verdict, make_verdict

_PAUSE_SECONDS = 1.0  # before the second try; doubles
_RETRY = {408, 429, 500, 502, 503, 504}
_SHOWN_CHARACTERS = 200


class _NoAnswer(Exception):
    """Says that the service gave no scores. is_busy: asking again may help."""

    def __init__(self, message: str, is_busy: bool) -> None:
        super().__init__(message)
        self.is_busy = is_busy


class ServiceReward:
    """Asks one service, `reward.service.concurrent` prompts at a time."""

    def __init__(self, url: str, section: RewardSection) -> None:
        """Prepare the requests. Raise ValueError when the environment lacks the key, or names a proxy that cannot be
        used."""
        self._url, self._section, self._service = url, section, section.service
        self._key = key_in_environment(self._service.api_key_variable, "reward.service.api_key_variable")
        self._proxy = proxy_for(url, section.key_of(url))
        self._tls = httpx.create_ssl_context()  # takes long to make
        self._room: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    async def verdicts(self, task: Task, attempts: Sequence[Attempt]) -> list[Verdict]:
        """Return one verdict for each response. Where the service fails, each is an error. Cancelling closes the
        connection."""
        loop = asyncio.get_running_loop()
        if self._room is None or self._room[0] is not loop:
            self._room = loop, asyncio.Semaphore(self._service.concurrent)
        async with self._room[1]:
            try:
                return await self._asked(of_task(task) | of_group(attempts), len(attempts))
            except _NoAnswer as problem:
                said = f"the service {self._url}{told_of_proxy(self._proxy)} {problem}"
                return [make_verdict("error", details=hidden(said, self._key))] * len(attempts)

    def close(self) -> None:
        """Do nothing: no connection is held between requests."""

    async def _asked(self, body: dict[str, object], count: int) -> list[Verdict]:
        limits = {"timeout": self._service.timeout_seconds, "trust_env": False, "proxy": self._proxy}
        async with httpx.AsyncClient(headers=bearer(self._key), verify=self._tls, **limits) as client:  # type: ignore[arg-type]
            for attempt in range(1, self._service.tries + 1):
                started = time.perf_counter()
                try:
                    found = await self._scores(client, body, count)
                    break
                except _NoAnswer as problem:
                    if not problem.is_busy or attempt == self._service.tries:
                        raise
                await asyncio.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        each = (time.perf_counter() - started) / count
        return [self._verdict(one, each) for one in found]

    async def _scores(self, client: httpx.AsyncClient, body: dict[str, object], count: int) -> list[object]:
        try:
            async with asyncio.timeout(self._service.timeout_seconds):
                reply = await client.post(self._url, json=body)
        except TimeoutError:
            seconds = self._service.timeout_seconds
            raise _NoAnswer(f"did not answer within {seconds:g} s (reward.service.timeout_seconds)", True) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _NoAnswer(f"cannot be asked ({type(error).__name__}: {error!s:.100})", True) from None
        if not reply.is_success:
            text = reply.text[:_SHOWN_CHARACTERS]
            raise _NoAnswer(f"answered HTTP {reply.status_code}: {text}", reply.status_code in _RETRY)
        try:
            scores = parse_json(reply.content)["scores"]
        except (ValueError, KeyError, TypeError):
            raise _NoAnswer(f'answered no {{"scores": [...]}}: {reply.text[:_SHOWN_CHARACTERS]}', False) from None
        if not isinstance(scores, list) or len(scores) != count:
            number = len(scores) if isinstance(scores, list) else repr(scores)[:_SHOWN_CHARACTERS]
            raise _NoAnswer(f"answered {number} scores for {count} responses; it must give one for each", False)
        return scores

    def _verdict(self, one: object, seconds: float) -> Verdict:
        try:
            score = Score(**one) if isinstance(one, dict) else one
            return verdict_of(score, self._section.passing_score, seconds)
        except (ValueError, TypeError) as error:
            return make_verdict("error", details=f"the service {self._url} answered {one!r:.80}: {error}")
