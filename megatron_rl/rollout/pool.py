"""Uses several generation servers as one: work goes to the least busy, and what a lost server owed is sent again.

A server that dies, hangs or answers nonsense is taken out; it comes back once it is ready and has the current weights.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.keys import KeyOf, no_key
from megatron_rl.rollout.client import (
    MOST_BODIES,
    Completion,
    GenerationClient,
    SampleRequest,
    ServerError,
    ServerLost,
    gather_all,
)
from megatron_rl.rollout.loop_lag import LoopLag
from megatron_rl.rollout.member import Member, SignOfLife, is_running, unless_lost
from megatron_rl.rollout.routing import RoutedShape
from megatron_rl.rollout.server import SGLANG_SPARE_TOKENS
from megatron_rl.rollout.versions import capabilities

log = logging.getLogger(__name__)

_SENDS = 4  # of the same work, before the run is given up: what four servers failed at is not their fault
_START_SECONDS = 30.0  # before a first token, on top of the time for tokens
_LOOK_EVERY_SECONDS = 5.0
_ASK_AGAIN_SECONDS = 0.3

# Parts of a server's memory, by SGLang's names: the weights, which are resumed first, and what only generating needs.
WEIGHTS, WORKSPACE = ("weights",), ("kv_cache", "cuda_graph")


class WeightsNeeded(ServerError):
    """Says that no server can serve until weights are pushed again: those that came back have others."""


T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Place:
    """Remembers which server gets the responses of one group, so that their common prompt is processed once.

    most: requests that this server may have; beyond them the next response goes to the least busy one, and the rest
    follow.
    """

    most: float = math.inf
    member: Member | None = None


@dataclass(slots=True)
class Counts:
    """Counts what went wrong since the last look, for the log of a step."""

    num_resent: int = 0
    num_taken_out: int = 0


@dataclass(slots=True, eq=False)
class ServerPool:
    """Shares work among servers. Use it in one event loop; `close()` ends its tasks and connections.

    replace: ends a server's process for good reason and has another started at the same url; None where servers are not
    ours. `load_from_disk` and `assume` say what weights must answer. routed: ask for routed experts of this shape.
    key_of: tells the key of the server at a url. keeps_weights: servers keep the weights that they start with.
    """

    urls: Sequence[str]
    rollout: RolloutSection
    replace: Callable[[str, str], None] | None = None
    routed: RoutedShape | None = None
    key_of: KeyOf = no_key
    keeps_weights: bool = False
    counts: Counts = field(default_factory=Counts)
    lag: LoopLag = field(default_factory=LoopLag)
    _members: list[Member] = field(default_factory=list)
    _version: str = "0"
    _weights: Path | None = None
    _asleep: bool = False

    async def connect(self) -> None:
        """Connect to the servers. Raise ServerLost when one of them is not ready, and ValueError for one that takes too
        short inputs, or cannot return routed experts where they are asked for."""
        self.lag.start()
        bodies = asyncio.Semaphore(MOST_BODIES)
        for url in self.urls:
            client = GenerationClient(url, key_of=self.key_of, bodies=bodies, lag=self.lag)
            self._members.append(Member(client=client))
        for member in self._members:
            if not await member.client.is_ready():
                raise ServerLost(
                    f"no generation server is ready at {member.client.url}; start it, or correct rollout.urls"
                )
            info = await member.client.server_info()
            self._check_length(member.client.url, info)
            if self.routed is not None:
                version = str(info.get("version", ""))
                if not capabilities(version).routed_experts:
                    raise ValueError(
                        f"rollout.router_replay needs SGLang 0.5.22 or later, {member.client.url} runs {version}; "
                        "update it or set rollout.router_replay = false"
                    )

    def _check_length(self, url: str, info: Mapping[str, Any]) -> None:
        """Raise ValueError when the server takes no input of all tokens of the longest sequence but one: a response
        that goes on, or the probe of its weights."""
        # SGLang reports a bound from context and cache. The embedded server takes inputs up to its context length.
        bound, longest = info.get("max_req_input_len") or info.get("context_length"), self.rollout.max_sequence_tokens
        if isinstance(bound, int) and bound < longest:
            raise ValueError(
                f"{url} takes inputs of less than {bound} tokens, and this run has some of {longest - 1} "
                "(rollout.max_prompt_tokens + max_response_tokens - 1); start it with --context-length "
                f"{longest + SGLANG_SPARE_TOKENS} or more, and as much cache for tokens, or shorten one of them"
            )

    async def close(self) -> None:
        self.lag.close()
        for member in self._members:
            tasks = [task for task in (member.watch, member.recovery) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await member.client.close()

    @property
    def num_slots(self) -> int:
        """The number of responses that can run at once, on the servers that are not out for good."""
        able = sum(m.out is None or is_running(m.recovery) for m in self._members)
        return max(1, able) * self.rollout.max_running_requests

    @property
    def serving(self) -> list[Member]:
        return [member for member in self._members if member.out is None]

    @property
    def _recoveries(self) -> "list[asyncio.Task[None]]":
        """The tasks of the members that are coming back."""
        return [m.recovery for m in self._members if m.recovery is not None and not m.recovery.done()]

    def client(self, url: str) -> GenerationClient:
        return next(member.client for member in self._members if member.client.url == url)

    # Generation ----------------------------------------------------------------------------------------------------

    async def generate(
        self,
        wanted: SampleRequest,
        temperature: float,
        may_abort: Callable[[], bool] = lambda: False,
        place: Place | None = None,
    ) -> Completion:
        """Sample one response on a server that has confirmed the current weights.

        Lost work is sent again, to the server that is then the least busy; seeds make it the same work. RequestRefused
        is final. Raises ServerLost after several servers failed, and WeightsNeeded when none is left until the next
        push.

        may_abort: true once `abort_all` has been called for this work: then what comes back may be cut short, and lost
        work is not sent again. A server that cuts short what nobody aborted is lost: it shuts down, or its model gives
        no numbers. place: of its group.
        """

        async def ask(member: Member, seconds: float) -> Completion:
            generated = await member.client.generate(
                wanted, temperature=temperature, timeout_seconds=seconds, routed=self.routed
            )
            self._confirm(member, generated, may_abort())
            return generated

        return await self._ask_one(ask, wanted.max_new_tokens, may_abort, place or Place())

    async def score(self, input_ids: Sequence[int], start: int) -> np.ndarray:
        """Ask one server for the log-probs float32 [n - start] of the tokens from `start` on, at temperature 1."""

        def ask(member: Member, seconds: float) -> Coroutine[Any, Any, np.ndarray]:
            return member.client.input_logprobs(input_ids, start, seconds)

        return await self._ask_one(ask, len(input_ids), lambda: False, Place())

    async def _ask_one(
        self,
        ask: Callable[[Member, float], Coroutine[Any, Any, T]],
        num_tokens: int,
        may_abort: Callable[[], bool],
        place: Place,
    ) -> T:
        """Have `ask` ask a server within so many seconds, and another one where it is lost. num_tokens: the size of the
        work, by which it is divided among servers, and its time limited."""
        failure: ServerError | None = None
        tried: set[Member] = set()
        for attempt in range(_SENDS):
            member = await self._choose(failure, tried, place)
            tried.add(member)
            self.counts.num_resent += attempt > 0
            num_losses = member.num_losses
            with self._busy(member, num_tokens):
                waves = math.ceil(member.outstanding_requests / self.rollout.max_running_requests)
                seconds = _START_SECONDS + waves * num_tokens * self.rollout.token_deadline_seconds
                try:
                    async with unless_lost(member):
                        answer = await ask(member, seconds)
                except ServerLost as error:
                    failure = error
                    if member.num_losses == num_losses:  # else it says nothing of the one that has come back
                        self.mark_down(member, str(error))
                    if may_abort():
                        raise
                else:
                    return answer
        assert failure is not None
        raise ServerLost(f"the same request failed {_SENDS} times, the last time so: {failure}")

    async def abort_all(self) -> None:
        """Have what is in flight answered now, with what it has. A request that a server has yet to read is not hit."""
        await self._each(lambda client: client.abort_all())

    async def flush_caches(self, members: Sequence[Member]) -> None:
        """Have these servers forget what they share between prompts."""
        await self._each(lambda client: client.flush_cache(), members=members)

    async def input_logprobs(self, input_ids: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the log-probs float32 [n - 1] of all tokens but the first, of every server that gets work, by its url.

        A server that is lost meanwhile is left out. Raises WeightsNeeded or ServerLost when none is left.
        """
        for _ in range(_SENDS):
            await self._choose(None)
            found = await self._each(lambda client: client.input_logprobs(input_ids))
            if found:
                return found
        raise ServerLost("no generation server tells log-probs of given tokens")

    async def _each(
        self,
        ask: Callable[[GenerationClient], Coroutine[Any, Any, Any]],
        sign_of_life: SignOfLife = GenerationClient.is_healthy,
        members: Sequence[Member] | None = None,
        failures: type[ServerError] = ServerLost,
    ) -> dict[str, Any]:
        """Return what every serving member answers, by its url, in their order. A member that fails is taken out, and
        so is one that gives no sign of life for too long. members: these instead. failures: what counts as failing, the
        rest is raised."""

        async def one(member: Member) -> list[tuple[str, Any]]:
            num_losses = member.num_losses
            try:
                with self._busy(member, 0, sign_of_life):
                    async with unless_lost(member):
                        return [(member.client.url, await ask(member.client))]
            except failures as error:
                if member.num_losses == num_losses:
                    self.mark_down(member, str(error))
                return []

        asked = self.serving if members is None else members
        return dict(itertools.chain(*await gather_all(one(member) for member in asked)))

    @contextlib.contextmanager
    def _busy(
        self,
        member: Member,
        num_tokens: int,
        sign_of_life: SignOfLife = GenerationClient.is_healthy,
    ) -> Iterator[None]:
        """Count a request, and watch the server while it has any."""
        member.sign_of_life = sign_of_life
        member.outstanding_tokens += num_tokens
        member.outstanding_requests += 1
        if not is_running(member.watch):
            member.watch = asyncio.create_task(self._watch(member))
        try:
            yield
        finally:
            member.outstanding_tokens -= num_tokens
            member.outstanding_requests -= 1

    async def _choose(
        self, failure: ServerError | None, tried: Set[Member] = frozenset(), place: Place | None = None
    ) -> Member:
        """Return the member of the place, or the serving one with the least outstanding tokens, if possible none of
        `tried`: one that comes back at once may fail again. Wait for one that is coming back where none serves."""
        place = place or Place()
        while True:
            known = place.member
            if known and known.out is None and known not in tried and known.outstanding_requests < place.most:
                return known
            if serving := self.serving:
                place.member = min(serving, key=lambda m: (m in tried, m.outstanding_tokens))
                return place.member
            if not (coming := self._recoveries):
                break
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
        reasons = "; ".join(str(m.out) for m in self._members)
        if self._weights is None and any(m.needs_weights for m in self._members):
            raise WeightsNeeded(f"no generation server has the current weights ({reasons})")
        raise ServerLost(f"no generation server is left: {reasons}") from failure

    def _confirm(self, member: Member, generated: Completion, may_abort: bool) -> None:
        if generated.finish_reason == "abort" and not may_abort:
            raise ServerLost(f"{member.client.url} cut a response short that nobody aborted: {generated.message}")
        wrong = set(generated.weight_versions) - {self._version}
        if wrong and len(generated.output_ids):
            raise ServerLost(
                f"{member.client.url} answered with weights {wrong.pop()!r}, expected {self._version!r}: it was "
                "restarted, or somebody else updates it"
            )

    # Weights -------------------------------------------------------------------------------------------------------

    async def load_from_disk(self, directory: Path, version: str) -> None:
        """Have every serving member load `directory` and answer as `version`. A member that fails is taken out and
        refilled.

        Raises RequestRefused when a server will not have these weights, and ServerLost when no server is left.
        """
        self._weights, self._version = directory, version
        await self.look_again()
        seconds = self.rollout.ready_deadline_seconds
        await self._each(
            lambda client: client.update_weights_from_disk(directory, version, seconds),
            # SGLang makes no tokens while it loads, for as long as that takes.
            sign_of_life=GenerationClient.is_there,
        )
        await self._choose(None)

    def assume(self, directory: Path | None, version: str) -> None:
        """Note that the serving members have these weights and answer as `version`. directory: where one that comes
        back finds them; None for weights that were sent to it, then it waits for a push."""
        self._weights, self._version = directory, version

    # Memory --------------------------------------------------------------------------------------------------------

    async def release_memory(self) -> None:
        """Have servers give back what they hold on their GPUs, until `resume_memory`. A server that cannot is taken
        out.

        Nothing must run. A server that is just coming back is waited for if it is ready; one that is not is for its
        supervisor.
        """
        while coming := [m.recovery for m in self._members if is_running(m.recovery) and await m.client.is_ready()]:
            await asyncio.wait([task for task in coming if task is not None])
        self._asleep = True  # not before: who is asleep gets no weights, and would be waited for in vain
        awake = [m for m in self._members if (m.out is None or m.needs_weights) and not m.released]
        for member in awake:
            if member.watch is not None:  # its question after the server's health would be a request that runs
                member.watch.cancel()
                await asyncio.gather(member.watch, return_exceptions=True)
        parts = (*WEIGHTS, *WORKSPACE)
        released = await self._each(
            lambda client: client.release_memory(parts), GenerationClient.is_there, awake, ServerError
        )
        for member in awake:
            if member.client.url in released:
                member.released = frozenset(parts)

    async def resume_memory(self, parts: Sequence[str]) -> None:
        """Have the servers that released these parts take them again. A server that cannot is taken out. Weights hold
        nothing then."""
        self._asleep = False
        asked = [member for member in self._members if member.released.issuperset(parts)]
        resumed = await self._each(
            lambda client: client.resume_memory(parts), GenerationClient.is_there, asked, ServerError
        )
        for member in asked:
            if member.client.url in resumed:
                member.released -= set(parts)

    # Servers that fail ---------------------------------------------------------------------------------------------

    def mark_down(self, member: Member, reason: str) -> None:
        """Take a member out: no more work for it until it has recovered, and what it has in flight is lost.
        Idempotent."""
        if member.out is not None and not member.needs_weights:
            return
        log.warning("a generation server is taken out: %s", reason)
        self.counts.num_taken_out += 1
        member.out, member.needs_weights = reason, False
        member.num_losses += 1
        member.released = frozenset()  # the process that comes back has all of its memory
        now = asyncio.get_running_loop().time()
        while member.in_flight:
            member.in_flight.pop().reschedule(now)
        member.recovery = asyncio.create_task(self._recover(member, reason))
        if not self.serving:
            log.warning("no generation server is left; work waits for one to come back")

    async def _recover(self, member: Member, reason: str | None = None) -> None:
        """Wait until a member is ready, give it the current weights, and put it back. reason: to end its process
        first."""
        if reason is not None and self.replace is not None:
            await asyncio.to_thread(self.replace, member.client.url, reason)
        seconds = self.rollout.ready_deadline_seconds
        give_up = time.monotonic() + seconds
        trouble = ""
        while time.monotonic() < give_up:
            if self._asleep:  # nothing is started meanwhile
                give_up = time.monotonic() + seconds
            elif await member.client.is_ready() and not self._asleep:
                if self.keeps_weights:
                    self.mark_up(member)
                    return
                if self._weights is None:
                    member.needs_weights = True
                    return
                version = self._version
                try:
                    await member.client.update_weights_from_disk(self._weights, version, seconds)
                except ServerError as error:  # refused too: the folder may just be replaced by the next weights
                    trouble = f": {error}"
                else:
                    if version == self._version:
                        self.mark_up(member)
                        return
                    continue  # newer weights came while it loaded these
            await asyncio.sleep(_ASK_AGAIN_SECONDS)
        member.out = f"{member.out}; it did not come back within {seconds:g} s{trouble}"
        log.error("%s", member.out)

    async def look_again(self) -> None:
        """Give members that were given up and are there after all another chance."""
        for member in self._members:
            given_up = member.out is not None and not member.needs_weights and not is_running(member.recovery)
            if given_up and await member.client.is_ready():
                member.recovery = asyncio.create_task(self._recover(member))

    def mark_up(self, member: Member) -> None:
        """Note that a member has the current weights and serves."""
        log.info("the generation server %s serves again", member.client.url)
        member.out, member.needs_weights = None, False

    @property
    def returned(self) -> list[Member]:
        """The members that are ready but for the current weights."""
        return [member for member in self._members if member.needs_weights]

    async def recovered(self) -> list[Member]:
        """Return `returned`, for a push. A server that is still being restarted gets weights when it is back. It is
        waited for only where nobody else would get any, or with rollout.release_memory: then there is no memory for a
        push while the others generate."""
        await self.look_again()
        while (coming := self._recoveries) and (self.rollout.release_memory or not (self.serving or self.returned)):
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
        return self.returned

    async def _watch(self, member: Member) -> None:
        """Watch a member while it has work. Take it out when it has not been healthy for `rollout.silence_seconds`."""
        last_sign = self.lag.clock()
        pause = min(_LOOK_EVERY_SECONDS, self.rollout.silence_seconds / 4)
        while member.outstanding_requests and member.out is None:
            await asyncio.sleep(pause)
            left = last_sign + self.rollout.silence_seconds - self.lag.clock()
            if await member.sign_of_life(member.client, max(1.0, left)):
                last_sign = self.lag.clock()
            elif self.lag.clock() - last_sign > self.rollout.silence_seconds and member.outstanding_requests:
                self.mark_down(
                    member,
                    f"{member.client.url} has given no sign of life for {self.rollout.silence_seconds:g} s "
                    "(rollout.silence_seconds)",
                )
