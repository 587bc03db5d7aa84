"""Generates by continuous batching, in the thread that owns the model, the KV cache and every running sequence.

Other threads talk to it through `submit` and the methods that give a future; it answers through the `deliver` callback.
Between two steps it runs what they left (aborts, pauses, weight swaps), so those never see a half-done step.

The engine says what happens in which order. Each thing that it owns has a manager: commands.py (what others ask for),
waiting.py (who waits), slots.py (who runs), slot_memory.py (what is kept for them), prefix_cache.py (what of it an
identical prompt can use), runner.py (network and weights), prefill.py and decode.py (the two kinds of passes).
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rl.families import Architecture
from megatron_rl.rollout.embedded.commands import CommandQueue
from megatron_rl.rollout.embedded.decode import Decode, Drawn
from megatron_rl.rollout.embedded.invariance import RowCounts, decode_row_counts
from megatron_rl.rollout.embedded.prefill import Prefill
from megatron_rl.rollout.embedded.prefix_cache import PrefixCache
from megatron_rl.rollout.embedded.runner import ModelRunner
from megatron_rl.rollout.embedded.sequence import Event, Sequence
from megatron_rl.rollout.embedded.slot_memory import SlotMemory
from megatron_rl.rollout.embedded.slots import SlotTable
from megatron_rl.rollout.embedded.texts import Detokenizer
from megatron_rl.rollout.embedded.waiting import SHARE, WaitingQueue
from megatron_rl.rollout.embedded.weights import ModelWeights

log = logging.getLogger(__name__)

BUSY_GATHER_SECONDS = 0.006
IDLE_GATHER_SECONDS = 0.15

PAUSE_MODES = ("abort", "retract", "in_place")


class EngineStopped(RuntimeError):
    """Says that the engine takes no more work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    model_path: str
    dtype: torch.dtype
    max_running_requests: int
    context_length: int
    weight_version: str = "default"
    update_timeout_seconds: float = 120.0
    hold_timeout_seconds: float = 600.0  # see hold.py
    weights_roots: tuple[str, ...] = ()  # see weight_roots.py

    @property
    def num_slots(self) -> int:
        """The number of slots: one for each sequence that may run, and what fills up a decode step."""
        return decode_row_counts(self.max_running_requests)[-1]


class Engine:
    """Generates for submitted sequences until `stop`; `deliver` gets a list of events after each step."""

    def __init__(self, config: Architecture, options: EngineOptions, deliver: Callable[[list[Event]], None]) -> None:
        self.config = config
        self.options = options
        self.weight_version = options.weight_version
        self.model_path = options.model_path
        self.texts = Detokenizer(options.model_path)
        self.failure: BaseException | None = None
        self._deliver = deliver
        self._commands = CommandQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._paused = False
        self._doomed: dict[Sequence, str] = {}  # aborted during a pause, with the reason
        self._events: list[Event] = []
        self._arrivals = 0

        num_slots, length = options.num_slots, options.context_length
        with torch.inference_mode():
            self._runner = ModelRunner(
                config, options.model_path, dtype=options.dtype, num_slots=num_slots, context_length=length
            )
            self._memory = SlotMemory(config, num_slots, length)
        self._waiting = WaitingQueue()
        self._slots = SlotTable(num_slots, length)
        self._prefixes = PrefixCache()
        self._prefill = Prefill(self._runner, self._memory)
        self._decoder = Decode(self._runner, self._memory, self._slots)

    @property
    def row_counts(self) -> RowCounts:
        return self._runner.row_counts

    # From any thread -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Abort everything and end the thread."""

        def stop() -> None:
            self._paused = False
            self._abort_where(lambda _: True, "the server is shutting down")
            self._stopping = True

        if self._thread.is_alive():
            self._commands.put(stop)
            self._thread.join()

    def submit(self, sequences: list[Sequence]) -> None:
        def enqueue() -> None:
            for index, sequence in enumerate(sequences):
                self._arrivals += 1
                sequence.order, sequence.turn = self._arrivals, index // SHARE
            self._waiting.add(sequences)

        self._require_running()
        self._commands.put(enqueue)

    def abort(self, rid: str | None) -> "Future[int]":
        """Abort the sequences whose request id starts with `rid`, as SGLang does, or all for None. The future gets how
        many it hit.

        Those that stand still in a pause end when it does.
        """

        def chosen(sequence: Sequence) -> bool:
            return rid is None or sequence.rid.startswith(rid)

        return self._call(lambda: self._abort_where(chosen, "aborted by request"))

    def abort_sequences(self, sequences: list[Sequence]) -> "Future[int]":
        """Abort those of these sequences that have not ended yet."""
        gone = set(sequences)
        return self._call(lambda: self._abort_where(gone.__contains__, "the client is gone"))

    def is_alive(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    def pause(self, mode: str) -> "Future[None]":
        """Stop between two steps. abort: drop all; retract: recompute when resumed; in_place: keep the KV cache."""
        assert mode in PAUSE_MODES

        def pause() -> None:
            if mode == "abort":
                self._paused = False
                self._abort_where(lambda _: True, "aborted by pause_generation")
            elif mode == "retract":
                running = self._slots.running()
                for sequence in running:
                    self._release(sequence.used_slot)
                self._waiting.add(running)
            self._paused = True

        return self._call(pause)

    def resume(self) -> "Future[None]":
        def resume() -> None:
            self._paused = False
            doomed, self._doomed = self._doomed, {}
            for message in set(doomed.values()):
                those = {sequence for sequence, why in doomed.items() if why == message}
                self._abort_where(those.__contains__, message)

        return self._call(resume)

    def flush(self) -> "Future[bool]":
        """Forget shared prompts; False while sequences run or wait. In a pause those that wait hold no cache."""

        def flush() -> bool:
            if self._slots.num_active or (self._waiting and not self._paused):
                return False
            self._prefixes.clear()
            return True

        return self._call(flush)

    def load(self, model_path: Path) -> ModelWeights:
        """Read and check new weights in the caller's thread; the engine goes on with the old ones."""
        return self._runner.load(model_path)

    def swap(self, weights: ModelWeights, model_path: str | None, version: str | None) -> "Future[None]":
        """Serve other weights from the next step on. model_path: where they came from; None leaves it as it is."""

        def swap() -> None:
            self._runner.weights = weights
            self.model_path = model_path or self.model_path
            self._prefixes.clear()
            self._set_version(version)

        return self._call(swap)

    def set_version(self, version: str) -> "Future[None]":
        return self._call(lambda: self._set_version(version))

    def weights(self) -> "Future[ModelWeights]":
        """Return the weights that serve now."""
        return self._call(lambda: self._runner.weights)

    def load_state(self) -> dict[str, Any]:
        """Return the approximate load, read without waiting for the engine."""
        return {"running": self._slots.num_active, "waiting": len(self._waiting), "paused": self._paused}

    def _require_running(self) -> None:
        if self.failure is not None or self._stopping or not self._thread.is_alive():
            raise EngineStopped(f"the engine is not running: {self.failure or 'stopped'}")

    def _call(self, function: Callable[[], Any]) -> "Future[Any]":
        self._require_running()
        return self._commands.call(function)

    # In the engine thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._run_commands()
                    if not self._paused:
                        self._admit()
                        self._decode()
                    self._send_events()
        except BaseException as error:  # nothing above this frame could report it
            log.critical("the engine failed: %r", error, exc_info=True)
            self.failure = error
            self._send_events()
            self._deliver([])

    def _run_commands(self) -> None:
        self._commands.run(wait=self._paused or not (self._slots.num_active or self._waiting))
        if self._waiting and not self._paused:
            self._gather_arrivals()

    def _gather_arrivals(self) -> None:
        """Wait a moment for more requests while they keep coming and there is room.

        Clients send a batch one request after the other; taken one by one, each would cost a prefill pass and a
        partly filled decode step of its own.
        """
        room = self._room()
        self._commands.gather(
            BUSY_GATHER_SECONDS if self._slots.num_active else IDLE_GATHER_SECONDS,
            lambda: len(self._waiting) >= room or self._paused,
        )

    def _room(self) -> int:
        return self.options.max_running_requests - self._slots.num_active

    def _admit(self) -> None:
        """Give waiting sequences free slots, fill the cache for their tokens and draw their next token."""
        admitted: list[Sequence] = []
        leaders: dict[int, Sequence] = {}  # by slot: those whose tokens are in no other's
        followers: list[tuple[Sequence, int]] = []  # with the slot of their leader
        room = self._room()
        while self._waiting and len(admitted) < room:
            sequence = self._seat(self._waiting.take())
            admitted.append(sequence)
            key = self._prefixes.key(sequence)
            source = self._prefixes.find(key)
            if source is None or sequence.input_logprob_start is not None:
                leaders[sequence.used_slot] = sequence
                self._prefixes.add(key, sequence.used_slot)
            elif source in leaders:
                followers.append((sequence, source))
            else:  # at once: a later sequence of this round may take the source's slot
                self._copy_prompts([(sequence, source)])
        if not admitted:
            return
        self._prefill.run(list(leaders.values()))
        self._copy_prompts(followers)
        self._draw_first(admitted)

    def _seat(self, sequence: Sequence) -> Sequence:
        self._prefixes.drop(self._slots.take(sequence))
        if not sequence.versions:
            sequence.versions.append((self.weight_version, 0))
        return sequence

    def _copy_prompts(self, copies: list[tuple[Sequence, int]]) -> None:
        """Give sequences what the slots beside them hold for the same tokens."""
        if not copies:
            return
        self._memory.copy_prompts(
            [source for _, source in copies],
            [sequence.used_slot for sequence, _ in copies],
            max(sequence.num_tokens for sequence, _ in copies),
            routed=any(sequence.return_routed_experts for sequence, _ in copies),
        )

    def _draw_first(self, admitted: list[Sequence]) -> None:
        drawn = self._decoder.first(np.array([sequence.used_slot for sequence in admitted]))
        full = self._slots.num_output[drawn.slots] >= self._slots.max_output[drawn.slots]
        for slot in drawn.slots[full]:  # max_new_tokens = 0: only the prompt was wanted
            self._finish(int(slot), {"type": "length", "length": 0})
        self._record(drawn.where(~full))

    def _decode(self) -> None:
        """Draw one token for every running sequence."""
        if self._slots.num_active:
            self._compact()
            self._record(self._decoder.step())

    def _record(self, drawn: Drawn) -> None:
        """Keep the tokens that were drawn; end the sequences that are done."""
        finite = np.isfinite(drawn.logprobs)
        if not finite.all():
            for slot in drawn.slots[~finite]:
                self._memory.cache.clear_slot(int(slot))
                self._prefixes.drop(int(slot))
                self._finish(int(slot), {"type": "abort", "message": "the model's output is not finite"})
            drawn = drawn.where(finite)
        table = self._slots
        ended = table.record(drawn.slots, drawn.tokens, drawn.logprobs)
        # First, as in SGLang: a token may end a response and have the end of a stop string in it.
        strings = self._stop_strings(drawn.slots) if table.num_with_stops else {}
        for slot, matched in strings.items():
            self._finish(slot, {"type": "stop", "matched": matched})
        for slot in ended:
            token = int(table.token[slot])
            if int(slot) in strings:
                continue
            if token in table.stop[slot]:
                self._finish(int(slot), {"type": "stop", "matched": token})
            else:
                self._finish(int(slot), {"type": "length", "length": int(table.num_output[slot])})
        if table.num_streaming:
            for slot in drawn.slots:
                sequence = table.sequences[slot]
                if sequence is not None and sequence.stream:
                    self._emit(table.save(slot), None)

    def _stop_strings(self, slots: np.ndarray) -> dict[int, str]:
        """Return by slot the stop string that its last token has completed."""
        found = {}
        for slot in map(int, slots):
            sequence = self._slots.sequences[slot]
            if sequence is not None and sequence.params.stop:
                tail = self._slots.tail(slot, sequence.tail_tokens)
                if (matched := self.texts.matched(tail, sequence.params.stop)) is not None:
                    found[slot] = matched
        return found

    def _compact(self) -> None:
        """Move sequences to lower slots when that lets the step run with fewer rows."""
        table, fewer = self._slots, self._runner.decode_rows(self._slots.num_active)
        if fewer == self._runner.decode_rows(table.used):
            return
        sources, targets, longest = table.move_below(fewer)
        for target in targets:
            self._prefixes.drop(target)
        self._memory.copy(sources, targets, longest, routed=bool(table.num_routed))

    def _abort_where(self, chosen: Callable[[Sequence], bool], message: str) -> int:
        running = [sequence for sequence in self._slots.running() if chosen(sequence)]
        waiting = self._waiting.remove_where(chosen)
        for sequence in running:
            if self._paused:
                self._doomed.setdefault(sequence, message)
            else:
                self._finish(sequence.used_slot, {"type": "abort", "message": message})
        for sequence in waiting:
            self._emit(sequence, {"type": "abort", "message": f"Abort in waiting queue: {message}"}, queued=True)
        return len(running) + len(waiting)

    def _finish(self, slot: int, reason: dict[str, Any]) -> None:
        self._emit(self._release(slot), reason)

    def _release(self, slot: int) -> Sequence:
        """Free the slot; its sequence gets what the slot knows about it."""
        sequence = self._slots.release(slot)
        if sequence.return_routed_experts:
            # The last token was never put through the model.
            sequence.routed_experts = self._memory.routing.read(slot, sequence.num_tokens - 1)
        return sequence

    def _emit(self, sequence: Sequence, reason: dict[str, Any] | None, queued: bool = False) -> None:
        self._events.append(
            Event(
                sequence=sequence,
                output_ids=sequence.output_ids,
                output_logprobs=sequence.output_logprobs,
                finish_reason=reason,
                queued=queued,
                weight_version=self.weight_version,
                version_spans=sequence.version_spans(self.weight_version),
                routed_experts=None if reason is None else sequence.routed_experts,
            )
        )

    def _send_events(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._deliver(events)

    def _set_version(self, version: str | None) -> None:
        if version is None or version == self.weight_version:
            return
        self.weight_version = version
        for sequence in self._slots.running():
            sequence.versions.append((version, int(self._slots.num_output[sequence.used_slot])))
        for sequence in self._waiting:
            if sequence.versions:
                sequence.versions.append((version, len(sequence.output_ids)))
