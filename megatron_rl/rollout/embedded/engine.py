"""Continuous batching: the thread that owns the model, the KV cache and every running sequence.

Other threads talk to it through `submit` and `call`; it answers through the `deliver` callback. Between two steps it
runs what `call` left for it (aborts, pauses, weight swaps), so those never see a half-done step.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rl.config.bailing import BailingConfig
from megatron_rl.rollout.embedded.cache import BLOCK, KVCache
from megatron_rl.rollout.embedded.invariance import CHUNK, MIN_HEAD_ROWS, check_invariance, decode_row_counts
from megatron_rl.rollout.embedded.model import BailingModel, Batch
from megatron_rl.rollout.embedded.reading import load_weights
from megatron_rl.rollout.embedded.routing import RoutingRecord
from megatron_rl.rollout.embedded.sampling import sample
from megatron_rl.rollout.embedded.sequence import Event, Sequence
from megatron_rl.rollout.embedded.slots import SlotTable
from megatron_rl.rollout.embedded.waiting import SHARE, WaitingQueue
from megatron_rl.rollout.embedded.weights import ModelWeights

log = logging.getLogger(__name__)

ARRIVAL_GAP_SECONDS = 0.003
BUSY_GATHER_SECONDS = 0.006
IDLE_GATHER_SECONDS = 0.15

PAUSE_MODES = ("abort", "retract", "in_place")


class EngineStopped(RuntimeError):
    """The engine takes no more work."""


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


class Engine:
    """Generates for submitted sequences until `stop`; `deliver` gets a list of events after each step."""

    def __init__(self, config: BailingConfig, options: EngineOptions, deliver: Callable[[list[Event]], None]) -> None:
        self.config = config
        self.options = options
        self.weight_version = options.weight_version
        self.model_path = options.model_path
        self.failure: BaseException | None = None
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._paused = False
        self._doomed: dict[Sequence, str] = {}  # aborted during a pause, with the reason
        self._waiting = WaitingQueue()
        self._events: list[Event] = []
        self._arrivals = 0

        with torch.inference_mode():
            self._model = BailingModel(config, dtype=options.dtype, context_length=options.context_length)
            self._weights = load_weights(options.model_path, config, options.dtype)
            num_slots = decode_row_counts(options.max_running_requests)[-1]
            self.row_counts = check_invariance(self._model, self._weights, num_slots)
            self._cache = KVCache(**cache_shape(config, options))
            # Logits after each slot's prompt; identical prompts copy them along with the cache.
            self._prompt_logits = torch.zeros(num_slots, config.vocab_size)
        self._slots = SlotTable(num_slots, options.context_length)
        self._routing = RoutingRecord(
            num_slots=num_slots,
            context_length=options.context_length,
            num_layers=config.num_hidden_layers,
            topk=config.num_experts_per_tok,
        )
        # prompt, and whether its experts are on record -> slot whose cache still starts with it
        self._prefixes: dict[tuple[bytes, bool], int] = {}
        self._prefix_of_slot: dict[int, tuple[bytes, bool]] = {}
        if not self.row_counts.invariant:
            log.warning(
                "this machine's matrix products are not batch invariant for this model: results may depend "
                "on what else is in the batch"
            )

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
            self._inbox.put(stop)
            self._thread.join()

    def submit(self, sequences: list[Sequence]) -> None:
        def enqueue() -> None:
            for index, sequence in enumerate(sequences):
                self._arrivals += 1
                sequence.order, sequence.turn = self._arrivals, index // SHARE
            self._waiting.add(sequences)

        self._require_running()
        self._inbox.put(enqueue)

    def abort(self, rid: str | None) -> "Future[int]":
        """Abort the sequences whose request id starts with `rid`, as SGLang does, or all for None; how many it hit.

        Those that stand still in a pause end when it does.
        """

        def chosen(sequence: Sequence) -> bool:
            return rid is None or sequence.rid.startswith(rid)

        return self._call(lambda: self._abort_where(chosen, "aborted by request"))

    def abort_sequences(self, sequences: list[Sequence]) -> "Future[int]":
        """Abort these sequences, those that have not ended yet."""
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
                    self._release(_slot(sequence))
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
            self._forget_prefixes()
            return True

        return self._call(flush)

    def load(self, model_path: Path) -> ModelWeights:
        """Read and check new weights in the caller's thread; the engine goes on with the old ones."""
        with torch.inference_mode():
            return load_weights(model_path, self.config, self.options.dtype)

    def swap(self, weights: ModelWeights, model_path: str | None, version: str | None) -> "Future[None]":
        """Serve other weights from the next step on. model_path: where they came from; None leaves it as it is."""

        def swap() -> None:
            self._weights = weights
            self.model_path = model_path or self.model_path
            self._forget_prefixes()
            self._set_version(version)

        return self._call(swap)

    def set_version(self, version: str) -> "Future[None]":
        return self._call(lambda: self._set_version(version))

    def weights(self) -> "Future[ModelWeights]":
        """What serves now."""
        return self._call(lambda: self._weights)

    def load_state(self) -> dict[str, Any]:
        """Approximate load, read without waiting for the engine."""
        return {"running": self._slots.num_active, "waiting": len(self._waiting), "paused": self._paused}

    def _require_running(self) -> None:
        if self.failure is not None or self._stopping or not self._thread.is_alive():
            raise EngineStopped(f"the engine is not running: {self.failure or 'stopped'}")

    def _call(self, function: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # the fault boundary of a command: its caller gets it, the engine goes on
                future.set_exception(error)

        self._require_running()
        self._inbox.put(run)
        return future

    # In the engine thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._read_inbox()
                    if not self._paused:
                        self._admit()
                        self._decode()
                    self._send_events()
        except BaseException as error:  # nothing above this frame could report it
            log.critical("the engine failed: %r", error, exc_info=True)
            self.failure = error
            self._send_events()
            self._deliver([])

    def _read_inbox(self) -> None:
        if self._paused or not (self._slots.num_active or self._waiting):
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()
        if self._waiting and not self._paused:
            self._gather_arrivals()

    def _gather_arrivals(self) -> None:
        """Wait a moment for more requests while they keep coming and there is room.

        Clients send a batch one request after the other; taken one by one, each would cost a prefill pass and a
        partly filled decode step of its own.
        """
        limit = BUSY_GATHER_SECONDS if self._slots.num_active else IDLE_GATHER_SECONDS
        deadline = time.monotonic() + limit
        room = self.options.max_running_requests - self._slots.num_active
        while len(self._waiting) < room and not self._paused and time.monotonic() < deadline:
            try:
                self._inbox.get(timeout=ARRIVAL_GAP_SECONDS)()
            except queue.Empty:
                return

    def _admit(self) -> None:
        """Give waiting sequences free slots, fill the cache for their tokens and draw their next token."""
        admitted: list[Sequence] = []
        leaders: list[Sequence] = []
        copies: list[tuple[Sequence, int]] = []
        room = self.options.max_running_requests - self._slots.num_active
        while self._waiting and len(admitted) < room:
            sequence = self._waiting.take()
            slot = self._slots.take(sequence)
            self._drop_prefix(slot)
            if not sequence.versions:
                sequence.versions.append((self.weight_version, 0))
            admitted.append(sequence)
            ids = np.array(sequence.prompt + sequence.output_ids, np.int32)
            key = ids.tobytes(), sequence.return_routed_experts
            source = self._prefixes.get(key)
            if source is not None and sequence.input_logprob_start is None:
                if any(leader.slot == source for leader in leaders):
                    copies.append((sequence, source))
                else:  # at once: a later sequence of this round may take the source's slot
                    self._copy_prefixes([(sequence, source)])
                continue
            leaders.append(sequence)
            self._prefixes.setdefault(key, slot)
            if self._prefixes[key] == slot:
                self._prefix_of_slot[slot] = key
        if not admitted:
            return
        self._prefill(leaders)
        self._copy_prefixes(copies)
        self._draw_first(admitted)

    def _copy_prefixes(self, copies: list[tuple[Sequence, int]]) -> None:
        if not copies:
            return
        sources = [source for _, source in copies]
        targets = [_slot(sequence) for sequence, _ in copies]
        longest = max(len(sequence.prompt) + len(sequence.output_ids) for sequence, _ in copies)
        self._cache.copy_slots(sources, targets, longest)
        self._prompt_logits[targets] = self._prompt_logits[sources]
        if any(sequence.return_routed_experts for sequence, _ in copies):
            self._routing.copy_slots(sources, targets, longest)

    def _prefill(self, sequences: list[Sequence]) -> None:
        """Fill the cache with the sequences' tokens, CHUNK tokens an entry; keeps the logits after each last token."""
        entries = [
            (sequence, start)
            for sequence in sequences
            for start in range(0, len(sequence.prompt) + len(sequence.output_ids), CHUNK)
        ]
        sizes = self.row_counts.prefill_entries
        while entries:
            size = next((s for s in sizes if s >= len(entries)), sizes[-1])
            self._prefill_entries(entries[:size], size)
            del entries[:size]

    def _prefill_entries(self, entries: list[tuple[Sequence, int]], size: int) -> None:
        tokens = np.zeros((size, CHUNK), np.int64)
        positions = np.zeros((size, CHUNK), np.int64)
        following = np.zeros((size, CHUNK), np.int64)  # the token after each, for input log-probs
        blocks = np.full((size, CHUNK), self._cache.trash_block)
        slots = np.zeros(size, np.int64)
        last_rows: list[int] = []
        last_slots: list[int] = []
        for i, (sequence, start) in enumerate(entries):
            ids = sequence.prompt + sequence.output_ids
            count = min(CHUNK, len(ids) - start)
            tokens[i, :count] = ids[start : start + count]
            after = ids[start + 1 : start + 1 + count]
            following[i, : len(after)] = after
            positions[i, :count] = np.arange(start, start + count)
            blocks[i, :count] = positions[i, :count] // BLOCK
            slots[i] = _slot(sequence)
            if start + count == len(ids):
                last_rows.append(i * CHUNK + count - 1)
                last_slots.append(_slot(sequence))
        batch = Batch(
            tokens=torch.from_numpy(tokens).flatten(),
            positions=torch.from_numpy(positions).flatten(),
            write_blocks=torch.from_numpy(blocks).flatten(),
            write_slots=torch.from_numpy(slots).repeat_interleave(CHUNK),
            entry_slots=torch.from_numpy(slots),
            num_queries=CHUNK,
            num_blocks=int(positions.max()) // BLOCK + 1,
            routed=self._routing.new_rows(size * CHUNK) if any(s.return_routed_experts for s, _ in entries) else None,
        )
        hidden = self._model.hidden(self._weights, self._cache, batch)
        if batch.routed is not None:
            real = (blocks != self._cache.trash_block).flatten()
            self._routing.write(slots.repeat(CHUNK)[real], positions.flatten()[real], batch.routed[real])
        if last_rows:
            # A fixed number of rows, at least MIN_HEAD_ROWS: fillers repeat the first.
            fill = max(size, MIN_HEAD_ROWS) - len(last_rows)
            logits = self._model.logits(self._weights, hidden[last_rows + last_rows[:1] * fill])
            self._prompt_logits[last_slots] = logits[: len(last_rows)]
        if any(sequence.input_logprob_start is not None for sequence, _ in entries):
            logprobs = self._model.logits(self._weights, hidden).log_softmax(-1)
            taken = logprobs.gather(1, torch.from_numpy(following).view(-1, 1)).view(size, CHUNK)
            self._keep_input_logprobs(entries, taken)

    @staticmethod
    def _keep_input_logprobs(entries: list[tuple[Sequence, int]], taken: Tensor) -> None:
        """Append log-probs of prompt[1:] chunk by chunk; `taken` [entries, CHUNK] is of the token after each row."""
        for i, (sequence, start) in enumerate(entries):
            if sequence.input_logprob_start is None or sequence.output_ids:
                continue
            if start == 0:
                sequence.input_logprobs = [float("nan")]
            assert sequence.input_logprobs is not None
            missing = len(sequence.prompt) - len(sequence.input_logprobs)
            sequence.input_logprobs += taken[i, : min(CHUNK, missing)].tolist()

    def _draw_first(self, admitted: list[Sequence]) -> None:
        slots = np.array([_slot(sequence) for sequence in admitted])
        rows = self._rows_for(int(slots.max()) + 1)
        tokens, logprobs = sample(self._prompt_logits[:rows], self._slots.sampling_rows(rows))
        full = self._slots.num_output[slots] >= self._slots.max_output[slots]
        for slot in slots[full]:  # max_new_tokens = 0: only the prompt was wanted
            self._finish(int(slot), {"type": "length", "length": 0})
        self._record(slots[~full], tokens, logprobs)

    def _decode(self) -> None:
        """One token for every running sequence."""
        if not self._slots.num_active:
            return
        table = self._slots
        self._compact()
        rows = self._rows_for(table.used)
        active = table.active[:rows]
        positions = np.where(active, table.position[:rows], 0)
        batch = Batch(
            tokens=torch.from_numpy(np.where(active, table.token[:rows], 0)),
            positions=torch.from_numpy(positions),
            write_blocks=torch.from_numpy(np.where(active, positions // BLOCK, self._cache.trash_block)),
            write_slots=torch.arange(rows),
            entry_slots=None,
            num_queries=1,
            num_blocks=int(positions.max()) // BLOCK + 1,
            routed=self._routing.new_rows(rows) if table.num_routed else None,
        )
        logits = self._model.logits(self._weights, self._model.hidden(self._weights, self._cache, batch))
        if batch.routed is not None:
            self._routing.write(np.flatnonzero(active), positions[active], batch.routed[active])
        table.position[:rows][active] += 1
        tokens, logprobs = sample(logits, table.sampling_rows(rows))
        self._record(np.flatnonzero(active), tokens, logprobs)

    def _record(self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Keep the tokens drawn for `slots` out of tokens [rows]; end the sequences that are done."""
        if not len(slots):
            return
        finite = np.isfinite(logprobs[slots])
        if not finite.all():
            for slot in slots[~finite]:
                self._cache.clear_slot(int(slot))
                self._drop_prefix(int(slot))
                self._finish(int(slot), {"type": "abort", "message": "the model's output is not finite"})
            slots = slots[finite]
        table = self._slots
        for slot in table.record(slots, tokens[slots], logprobs[slots]):
            token = int(table.token[slot])
            if token in table.stop[slot]:
                self._finish(int(slot), {"type": "stop", "matched": token})
            else:
                self._finish(int(slot), {"type": "length", "length": int(table.num_output[slot])})
        if table.num_streaming:
            for slot in slots:
                sequence = table.sequences[slot]
                if sequence is not None and sequence.stream:
                    self._emit(table.save(slot), None)

    def _compact(self) -> None:
        """Move sequences to lower slots when that lets the step run with fewer rows."""
        table = self._slots
        fewer = self._rows_for(table.num_active)
        if fewer == self._rows_for(table.used):
            return
        sources = [int(s) for s in np.flatnonzero(table.active) if s >= fewer]
        longest = int(table.position[sources].max())
        targets = [table.move(slot) for slot in sources]
        for target in targets:
            self._drop_prefix(target)
        self._cache.copy_slots(sources, targets, longest)
        if table.num_routed:
            self._routing.copy_slots(sources, targets, longest)

    def _rows_for(self, slots: int) -> int:
        return next(count for count in self.row_counts.decode if count >= slots)

    def _abort_where(self, chosen: Callable[[Sequence], bool], message: str) -> int:
        running = [sequence for sequence in self._slots.running() if chosen(sequence)]
        waiting = self._waiting.remove_where(chosen)
        for sequence in running:
            if self._paused:
                self._doomed.setdefault(sequence, message)
            else:
                self._finish(_slot(sequence), {"type": "abort", "message": message})
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
            count = len(sequence.prompt) + len(sequence.output_ids) - 1
            sequence.routed_experts = self._routing.read(slot, count)
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
                version_spans=_spans(sequence, self.weight_version),
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
            sequence.versions.append((version, int(self._slots.num_output[_slot(sequence)])))
        for sequence in self._waiting:
            if sequence.versions:
                sequence.versions.append((version, len(sequence.output_ids)))

    def _forget_prefixes(self) -> None:
        self._prefixes.clear()
        self._prefix_of_slot.clear()

    def _drop_prefix(self, slot: int) -> None:
        key = self._prefix_of_slot.pop(slot, None)
        if key is not None:
            del self._prefixes[key]


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _spans(sequence: Sequence, current: str) -> list[dict[str, Any]]:
    """Which output tokens [start, end) each weight version drew; versions that drew none are left out.

    Without any token it is one empty span of the version that would have drawn the first, as in SGLang.
    """
    versions = sequence.versions or [(current, 0)]
    ends = [start for _, start in versions[1:]] + [len(sequence.output_ids)]
    spans = [
        {"version": version, "start": start, "end": end}
        for (version, start), end in zip(versions, ends, strict=True)
        if end > start
    ]
    return spans or [{"version": versions[-1][0], "start": 0, "end": 0}]


def cache_shape(config: BailingConfig, options: EngineOptions) -> dict[str, int]:
    return {
        "num_layers": config.num_hidden_layers,
        "num_slots": decode_row_counts(options.max_running_requests)[-1],
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "context_length": options.context_length,
    }
