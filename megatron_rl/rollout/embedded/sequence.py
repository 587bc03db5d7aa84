"""Describes one sequence being generated, and what the engine tells about it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_rl.rollout.embedded.protocol import SamplingParams


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Holds a prompt and what was generated for it; the engine thread owns it once it is submitted."""

    rid: str
    prompt: list[int]
    params: SamplingParams
    seed: int  # uint64, of this sample
    stop_ids: tuple[int, ...]
    input_logprob_start: int | None = None  # first prompt position whose log-prob is wanted; None: none
    stream: bool = False
    return_routed_experts: bool = False
    listener: Any = None  # the server's; the engine hands it back with every event
    order: int = 0
    turn: int = 0  # see waiting.py
    slot: int | None = None
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    input_logprobs: list[float] | None = None  # of prompt[start:]; position 0 has none and counts as nan
    versions: list[tuple[str, int]] = field(default_factory=list)  # (weight version, first output token under it)
    routed_experts: np.ndarray | None = None  # uint8 [prompt + output - 1, layers, topk], when it leaves its slot

    @property
    def tail_tokens(self) -> int:
        """The number of last tokens that hold any stop string whole: each that is part of one has at least a byte of
        it."""
        return max((len(stop.encode()) for stop in self.params.stop), default=0) + 1

    @property
    def tokens(self) -> list[int]:
        """The prompt and what follows it, as of when the sequence last had no slot."""
        return self.prompt + self.output_ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output_ids)

    @property
    def used_slot(self) -> int:
        """The slot of a sequence that has one."""
        assert self.slot is not None
        return self.slot

    def version_spans(self, current: str) -> list[dict[str, Any]]:
        """Return which output tokens [start, end) each weight version drew; versions that drew none are left out.

        Without any token it is one empty span of the version that would have drawn the first, as in SGLang.
        """
        versions = self.versions or [(current, 0)]
        ends = [start for _, start in versions[1:]] + [len(self.output_ids)]
        spans = [
            {"version": version, "start": start, "end": end}
            for (version, start), end in zip(versions, ends, strict=True)
            if end > start
        ]
        return spans or [{"version": versions[-1][0], "start": 0, "end": 0}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Holds the state of a sequence at one moment: progress when `finish_reason` is None (streams only), else its
    end."""

    sequence: Sequence
    output_ids: list[int]
    output_logprobs: list[float]
    finish_reason: dict[str, Any] | None
    queued: bool  # it ended while it waited for a slot
    weight_version: str
    version_spans: list[dict[str, Any]]
    routed_experts: np.ndarray | None  # of an end only
