"""Samples from the policy as trajectories ask it: token ids in, token ids out, over the rollout phases of a run.

Between two phases nothing is sampled. What was asked for then waits, and what the end of a phase has cut short goes on
under the next weights; whoever asked only notices the time.
"""

import asyncio
import time
from dataclasses import dataclass, replace

import numpy as np

from megatron_rl.gateway.recording import Turn
from megatron_rl.rollout.client import Completion, RequestRefused, SampleRequest, ServerError
from megatron_rl.rollout.pool import Place, ServerPool


class PhaseClock:
    """Knows whether a rollout phase runs, under which weights, and the seconds that phases have run so far."""

    def __init__(self) -> None:
        self.policy_version = -1
        self._is_open, self.closed = asyncio.Event(), asyncio.Event()
        self._opened, self._seconds = 0.0, 0.0

    @property
    def is_open(self) -> bool:
        return self._is_open.is_set()

    @property
    def seconds(self) -> float:
        return self._seconds + (time.monotonic() - self._opened if self.is_open else 0.0)

    def open(self, policy_version: int) -> None:
        """Note that a phase runs."""
        self.closed.clear()
        if not self.is_open:
            self._opened = time.monotonic()
        self.policy_version = policy_version
        self._is_open.set()

    def close(self) -> None:
        """End the phase: nothing new is asked for. What runs is for whoever ends the phase to stop."""
        self._seconds = self.seconds
        self._is_open.clear()
        self.closed.set()

    async def wait_open(self) -> int:
        """Wait until a phase runs, and return the version of its weights."""
        await self._is_open.wait()
        return self.policy_version


@dataclass(slots=True, eq=False)
class Begun:
    """Holds what there is of a turn that is being sampled."""

    context_ids: np.ndarray
    output_ids: np.ndarray
    logprobs: np.ndarray
    policy_versions: np.ndarray
    is_running: bool = False  # on a server

    @classmethod
    def of(cls, context_ids: np.ndarray) -> "Begun":
        nothing = np.zeros(0, np.int32)
        return cls(context_ids, nothing, np.zeros(0, np.float32), nothing)

    def add(self, more: Completion, policy_version: int) -> None:
        self.output_ids = np.concatenate([self.output_ids, more.output_ids])
        self.logprobs = np.concatenate([self.logprobs, more.logprobs])
        versions = np.full(len(more.output_ids), policy_version, np.int32)
        self.policy_versions = np.concatenate([self.policy_versions, versions])

    def go_on_from(self, turn: Turn) -> None:
        """Take over what was sampled of the turn before a kill."""
        self.output_ids, self.logprobs, self.policy_versions = turn.output_ids, turn.logprobs, turn.policy_versions

    def turn(self, finish_reason: str, routed_experts: np.ndarray | None = None) -> Turn:
        return Turn(
            context_ids=self.context_ids,
            output_ids=self.output_ids,
            logprobs=self.logprobs,
            policy_versions=self.policy_versions,
            finish_reason=finish_reason,
            routed_experts=routed_experts,
        )


class Policy:
    """Samples turns from a run's servers, as its sampler does: with its temperature, retries and weights."""

    def __init__(self, servers: ServerPool, temperature: float, end_ids: tuple[int, ...], top_p: float = 1.0) -> None:
        self._servers, self.temperature, self.end_ids, self._top_p = servers, temperature, end_ids, top_p
        self.clock = PhaseClock()
        # The failure of the servers, if any: the run raises it, and no agent is at fault.
        self.failure: Exception | None = None
        self.failed = asyncio.Event()

    def open(self, policy_version: int) -> None:
        """Begin a rollout phase; what was wrong before is forgotten."""
        self.failure = None
        self.failed.clear()
        self.clock.open(policy_version)

    async def sample(self, begun: Begun, wanted: SampleRequest, place: Place) -> Turn:
        """Sample on from what there is, until the turn has ended. Raise RequestRefused where no server takes the
        request.

        wanted: of the whole turn. Other faults of servers are kept for the run, and this waits until it is cancelled.
        """
        while True:
            version = await self.clock.wait_open()
            begun.is_running = True
            try:
                more = await self._servers.generate(
                    self._rest(begun, wanted), self.temperature, lambda: not self.clock.is_open, place
                )
            except RequestRefused:
                raise
            except ServerError as error:
                if not self.clock.is_open:
                    continue  # its server was lost at the end of the phase; it goes on from where it was
                self.failure = error
                self.failed.set()
                await asyncio.Event().wait()
            finally:
                begun.is_running = False
            begun.add(more, version)
            if reason := self._ended(begun, more.finish_reason, wanted.max_new_tokens):
                return begun.turn(reason, more.routed_experts)
            while self.clock.is_open:  # the server has cut it short before this side heard that the phase ends
                await asyncio.sleep(0.01)

    def _rest(self, begun: Begun, wanted: SampleRequest) -> SampleRequest:
        return replace(
            wanted,
            input_ids=[*begun.context_ids.tolist(), *begun.output_ids.tolist()],
            max_new_tokens=wanted.max_new_tokens - len(begun.output_ids),
            top_p=self._top_p,
        )

    def _ended(self, begun: Begun, told: str, max_tokens: int) -> str:
        """Return why a turn has ended; "" where it has not. SGLang calls a response aborted even if that was its last
        token."""
        if told in ("stop", "length"):
            return told
        if len(begun.output_ids) >= max_tokens:
            return "length"
        return "stop" if len(begun.output_ids) and int(begun.output_ids[-1]) in self.end_ids else ""
