"""Answers the requests of one trajectory: each is answered by the policy, and recorded token by token."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from megatron_rl.data.messages import Message
from megatron_rl.gateway.chat_tokens import ChatTokens
from megatron_rl.gateway.history import Continued, History
from megatron_rl.gateway.parsers import Said
from megatron_rl.gateway.policy import Begun, Policy
from megatron_rl.gateway.recording import Place, Recording, Turn
from megatron_rl.gateway.requests import ChatRequest, Options, TextRequest
from megatron_rl.records import Segment
from megatron_rl.rollout.client import RequestRefused, SampleRequest
from megatron_rl.rollout.embedded.fields import RequestError
from megatron_rl.rollout.pool import Place as ServerPlace

# Why a trajectory ends, beside its agent's own end: words of Response.finish_reason.
LENGTH, TURNS, SECONDS = "length", "turns", "seconds"


class TrajectoryEnded(RequestError):
    """Says that no further request of this trajectory is answered."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits one trajectory. sequence_tokens: of what the policy reads and writes for a request. policy_tokens: that it
    writes in all. turns: requests."""

    sequence_tokens: int
    policy_tokens: int
    turns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Says which sample of which prompt a trajectory is. seed: of the run."""

    seed: int
    prompt_id: int
    sample_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Holds the answer to one request. id: the same whenever the same is sampled for the same. token_texts: where
    log-probs were asked for."""

    id: str
    turn: Turn
    said: Said
    finish_reason: str
    token_texts: tuple[str, ...] = ()


# A turn that was sampled before a kill, if what was asked for is the same: by the digest of that.
Recall = Callable[[str], Turn | None]
Keep = Callable[[str, Turn], None]


def recalls_nothing(digest: str) -> None:
    """Return None: nothing was sampled before."""
    del digest


def keeps_nothing(digest: str, turn: Turn) -> None:
    """Keep nothing: nobody goes on with the turn after a kill."""
    del digest, turn


class Trajectory:
    """Answers requests, several at a time where their tokens are sure to fit. `end()` has the rest refused."""

    def __init__(
        self,
        seat: Seat,
        limits: Limits,
        policy: Policy,
        chat: ChatTokens,
        *,
        as_sampled: bool = True,
        recall: Recall = recalls_nothing,
        keep: Keep = keeps_nothing,
        server: ServerPlace | None = None,
    ) -> None:
        """Begin without turns. as_sampled: a conversation goes on behind the tokens that were sampled; else as the
        template writes them. recall, keep: turns over kills. server: which one this trajectory keeps to."""
        self._seat, self._limits, self._policy, self._chat = seat, limits, policy, chat
        self._as_sampled, self._recall, self._keep = as_sampled, recall, keep
        self.recording, self._history = Recording(), History()
        self.ended = self._why = ""
        self.last_text = ""  # what rewards judge
        self.counts: Counter[str] = Counter()
        self._server = server or ServerPlace()
        self._in_flight: list[tuple[str, Begun]] = []
        self._asked: set[str] = set()
        self._reserved_tokens = 0
        self._freed = asyncio.Event()

    def end(self, code: str, why: str) -> None:
        """Answer no further request. code: a word. The first end counts."""
        if not self.ended:
            self.ended, self._why = code, why
            self._freed.set()

    @property
    def is_sampling(self) -> bool:
        return any(begun.is_running for _, begun in self._in_flight)

    def pause(self) -> tuple[Segment, ...]:
        """Return all that was sampled so far, once nothing runs, turns that have not ended included. These are kept as
        well."""
        recording = deepcopy(self.recording)
        for digest, begun in self._in_flight:
            if len(begun.output_ids):
                turn = begun.turn("")
                self._keep(digest, turn)
                recording.add(turn)
        # All of it goes through the weights of the next phase again, and has their experts then.
        return tuple(replace(segment, routed_experts=None) for segment in recording.segments())

    async def chat(self, request: ChatRequest) -> Answer:
        """Answer a conversation."""
        self._check_open()
        messages, tools = request.messages, request.tools
        context = await self._context(messages, tools)
        forced = ""
        if request.tool is not None:
            if self._chat.parser.forced is None:
                raise RequestError(
                    "tool_choice must be auto or none: it is not known how this model begins a call; if it writes "
                    "calls as hermes, llama3 or ling does, set rollout.tool_parser to that"
                )
            forced = self._chat.parser.forced(request.tool)
            context = np.concatenate([context, await self._chat.encode(forced)])
        turn, digest, place = await self._sampled(context, request.options)
        text, _ = await self._text(turn, request.options.stop)
        said = await self._chat.read(forced + text, context, tools)
        answer = answer_message(said, digest)
        self._history.add(messages, tools, answer, place)
        self.last_text = forced + text
        self.counts["tool_calls"] += len(said.calls)
        self.counts["broken_tool_calls"] += said.num_broken
        reason = "tool_calls" if said.calls and turn.finish_reason == "stop" else turn.finish_reason
        return await self._answer(digest, turn, said, reason, request.options)

    async def complete(self, request: TextRequest) -> Answer:
        """Answer a bare text, or token ids."""
        self._check_open()
        prompt = request.prompt
        if isinstance(prompt, str):
            found = self._history.find_text(prompt) if self._as_sampled else None
            if found is None:
                context = await self._chat.encode(prompt, begins=True)
            else:
                rest, place = found
                parts = [self.recording.ids_up_to(place)]
                parts += [await self._chat.encode(rest)] if rest else []
                context = np.concatenate(parts)
        else:
            context = np.array(prompt, np.int32)
        if not len(context):
            raise RequestError("prompt must be a text of at least one token")
        turn, digest, place = await self._sampled(context, request.options)
        text, cut_off = await self._text(turn, request.options.stop)
        if isinstance(prompt, str):
            self._history.add_text(prompt + text, cut_off, place)
        self.last_text = text
        return await self._answer(digest, turn, Said(content=text), turn.finish_reason, request.options)

    async def _answer(self, digest: str, turn: Turn, said: Said, reason: str, options: Options) -> Answer:
        texts = await self._chat.texts_of(turn.output_ids) if options.logprobs else []
        return Answer(id=digest[:32], turn=turn, said=said, finish_reason=reason, token_texts=tuple(texts))

    async def _context(self, messages: Sequence[Message], tools: str) -> np.ndarray:
        """Return what the policy reads: recorded tokens as far as they go, and the template's behind them."""
        found = self._history.find(messages, tools) if self._as_sampled else None
        if found is not None:
            try:
                return await self._continued(found, messages, tools)
            except RequestError:  # the template cannot; all of it anew is a segment of its own
                self.counts["uncontinued"] += 1
        return await self._chat.context(messages, tools)

    async def _continued(self, found: Continued, messages: Sequence[Message], tools: str) -> np.ndarray:
        known = self.recording.ids_up_to(found.place)
        behind = await self._chat.behind(messages, tools, found.count - 1)
        if len(behind) and behind[0] == known[-1] and int(known[-1]) in self._policy.end_ids:
            behind = behind[1:]  # the policy has ended its turn itself
        return np.concatenate([known, behind])

    async def _sampled(self, context: np.ndarray, options: Options) -> tuple[Turn, str, Place]:
        """Return a turn behind the context, a digest of what was asked for, and where the turn is recorded."""
        max_tokens = await self._reserve(len(context), options.max_tokens)
        digest = self._digest(context, options)
        begun = Begun.of(context)
        self._in_flight.append((digest, begun))
        try:
            turn = self._recall(digest)
            if turn is not None:
                begun.go_on_from(turn)
            if turn is None or not turn.finish_reason:
                turn = await self._policy.sample(begun, self._request(digest, options, max_tokens), self._server)
                self._check_open()
            else:
                turn = begun.turn(turn.finish_reason, turn.routed_experts)
            self._keep(digest, turn)
            return turn, digest, self.recording.add(turn)
        except RequestRefused as error:
            raise RequestError(f"the generation server refuses this request: {error}") from None
        except BaseException:
            self._asked.discard(digest)  # nobody was told anything: asked again, it is the same
            raise
        finally:
            self._in_flight = [one for one in self._in_flight if one[1] is not begun]
            self._reserved_tokens -= max_tokens
            self._freed.set()

    def _request(self, digest: str, options: Options, max_tokens: int) -> SampleRequest:
        return SampleRequest(
            input_ids=(),
            seed=int(digest[:8], 16) & 0x7FFF_FFFF,
            max_new_tokens=max_tokens,
            stop=options.stop,
        )

    async def _reserve(self, num_context_tokens: int, wanted: int | None) -> int:
        """Return how many tokens the turn may have. Wait while requests in flight may take all that are left."""
        while True:
            self._check_open()
            if self.recording.num_turns + len(self._in_flight) >= self._limits.turns:
                self.end(TURNS, f"it has had {self._limits.turns} turns (rollout.max_turns)")
                self._check_open()
            left = self._limits.policy_tokens - self.recording.num_policy_tokens
            room = self._limits.sequence_tokens - num_context_tokens
            if left <= 0 or room <= 0:
                what = (
                    f"{num_context_tokens} tokens of context leave no room in the {self._limits.sequence_tokens} of "
                    "rollout.max_prompt_tokens + max_response_tokens"
                    if room <= 0
                    else f"it has had its {self._limits.policy_tokens} tokens (rollout.max_response_tokens)"
                )
                self.end(LENGTH, what)
                self._check_open()
            free = left - self._reserved_tokens
            if free > 0:
                break
            self._freed.clear()
            await self._freed.wait()
        num_tokens = min(free, room, wanted or free)
        self._reserved_tokens += num_tokens
        return num_tokens

    def _digest(self, context: np.ndarray, options: Options) -> str:
        """Return a digest of everything that decides what is sampled but the weights. The same request again is another
        one, unless it names a seed."""
        of_seat = [self._seat.seed, self._seat.prompt_id, self._seat.sample_index]
        whole = hashlib.blake2b(json.dumps([*of_seat, options.max_tokens, options.stop, options.seed]).encode())
        whole.update(context.tobytes())
        if options.seed is not None:
            return whole.hexdigest()[:64]
        digests = (hashlib.blake2b(whole.digest() + str(n).encode()).hexdigest()[:64] for n in count())
        digest = next(digest for digest in digests if digest not in self._asked)
        self._asked.add(digest)
        return digest

    async def _text(self, turn: Turn, stops: Sequence[str]) -> tuple[str, str]:
        """Return (what the client is told, what a stop string cuts off)."""
        text = await self._chat.text_of(turn.output_ids)
        starts = [start for stop in stops if (start := text.find(stop)) >= 0]
        end = min(starts, default=len(text))
        return text[:end], text[end:]

    def _check_open(self) -> None:
        if self.ended:
            raise TrajectoryEnded(self.ended, f"this trajectory has ended: {self._why}")


def answer_message(said: Said, digest: str) -> Message:
    """Return the message that the client is given, and sends back with what follows it."""
    more: dict[str, object] = {"reasoning_content": said.reasoning} if said.reasoning else {}
    if said.calls:
        more["tool_calls"] = [
            {
                "id": call_id(digest, index),
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for index, call in enumerate(said.calls)
        ]
    return Message(role="assistant", content=said.content, more=json.dumps(more, ensure_ascii=False) if more else "")


def call_id(digest: str, index: int) -> str:
    """Return the id of a call: nine letters and digits, since Mistral's templates refuse any other.

    It is the same whenever the same is sampled: programs send it back, and templates may show it.
    """
    return hashlib.sha256(f"{digest} {index}".encode()).hexdigest()[:9]
