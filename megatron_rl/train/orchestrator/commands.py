"""Sends from rank 0 to the other ranks: the plan to all, token arrays to those that train them, or a command such as
stop.

Everything goes over one gloo group whose timeout is the phase's deadline, so a rank never waits inside NCCL for a
rollout to end, and never for ever.
"""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.config.layout import Layout
from megatron_rl.records import Plan, Sample, Segment, Selected, StepPlan
from megatron_rl.train.step.batch import TrainSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Tells the other ranks that the run ends here. exit_code: None where a signal asked for it; a checkpoint is
    written then, and `TrainContext.stop_code` is the code."""

    exit_code: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Tells the other ranks that weights go to the servers now, to be called `version`."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Asks how far the trainer's log-probs of some tokens are from each server's: train/orchestrator/weight_check.py.

    token_ids: the same for all servers. start: of the first token that counts, at least 1. logprobs: of the tokens from
    there on, one list for each server.
    """

    token_ids: list[int]
    start: int
    logprobs: list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksums:
    """Asks for the checksums of exported tensors. dtypes: by name, what each is converted to first."""

    dtypes: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextPhase:
    """Tells the other ranks that rank 0 goes from one long phase to another, so that their wait for the second one
    starts anew."""


Command = Stop | Push | Probe | Checksums | NextPhase
_COMMANDS: dict[str, type[Command]] = {kind.__name__: kind for kind in (Stop, Push, Probe, Checksums, NextPhase)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Describes the routed experts that travel with a plan. shape: [layers, topk], of the experts at one position.
    missing: (sample, segment) of those of the plan without a record of them, because an earlier run sampled them
    without."""

    shape: tuple[int, int]
    missing: frozenset[tuple[int, int]]

    def num_positions(self, selected: Selected) -> int:
        """Count the positions whose experts travel: all but the last, which predicts nothing."""
        return 0 if (selected.index, selected.segment) in self.missing else selected.num_tokens - 1


Work = list[list[list[TrainSequence]]]  # [optimizer step][micro-batch][sequence], of one data-parallel rank


def send_command(command: Command, control: Any) -> None:
    """Tell the other ranks what all ranks do next; they get it from `receive`. Runs on rank 0."""
    _broadcast(json.dumps({type(command).__name__: dataclasses.asdict(command)}).encode(), control)


def send_work(plan: Plan, samples: Sequence[Sample], layout: Layout, control: Any) -> tuple[Plan, Work]:
    """Broadcast the plan, give every rank the arrays of its own samples, and return rank 0's share. Runs on rank 0."""
    routing = _routing(plan, samples)
    described = None if routing is None else {"shape": routing.shape, "missing": sorted(routing.missing)}
    content = {"plan": dataclasses.asdict(plan), "routing": described}
    _broadcast(json.dumps({"plan": content}).encode(), control)
    ranks: dict[int, list[int]] = defaultdict(list)
    for rank in range(1, layout.world_size):
        ranks[layout.data_rank(rank)].append(rank)
    for data_rank, receivers in ranks.items():
        if data_rank:
            _send_share(_gather(plan, samples, data_rank, routing), receivers, control)
    own = _gather(plan, samples, 0, routing)
    _send_share(own, ranks[0], control)
    return plan, _sequences(plan, 0, routing, own)


def _send_share(arrays: Sequence[np.ndarray], receivers: Sequence[int], control: Any) -> None:
    """Send one data-parallel rank's arrays to all that train them. One share at a time is copied together: with routed
    experts all of them at once would be as large as the samples."""
    for rank in receivers:
        for array in arrays:
            dist.send(torch.from_numpy(array), dst=rank, group=control)


def receive(rank: int, layout: Layout, control: Any) -> tuple[Plan, Work] | Command:
    """Wait for rank 0's plan and this rank's samples, or for another command. Runs on the other ranks."""
    ((name, content),) = json.loads(_broadcast(None, control)).items()
    if name in _COMMANDS:
        return _COMMANDS[name](**content)
    plan = _plan_from_json(content["plan"])
    data_rank = layout.data_rank(rank)
    routing = None
    if content["routing"] is not None:
        layers, topk = content["routing"]["shape"]
        missing = frozenset((index, segment) for index, segment in content["routing"]["missing"])
        routing = Routing(shape=(layers, topk), missing=missing)
    mine = list(_placed(plan, data_rank))
    arrays: list[np.ndarray] = [
        np.empty(sum(s.num_tokens for s in mine), np.int32),
        np.empty(sum(s.num_loss_tokens for s in mine), np.float32),
        np.empty(sum(s.num_loss_tokens for s in mine), np.float64),
        np.empty(sum(s.num_output_tokens for s in mine if s.has_gaps), bool),
    ]
    if routing is not None:
        arrays.append(np.empty((sum(map(routing.num_positions, mine)), *routing.shape), np.uint8))
    for array in arrays:
        dist.recv(torch.from_numpy(array), src=0, group=control)
    return plan, _sequences(plan, data_rank, routing, arrays)


def _placed(plan: Plan, data_rank: int) -> list[Selected]:
    """List what a data-parallel rank trains, in the order in which its arrays travel."""
    return [
        step.selected[position]
        for step in plan.steps
        for micro_batch in step.micro_batches[data_rank]
        for position in micro_batch
    ]


def _routing(plan: Plan, samples: Sequence[Sample]) -> Routing | None:
    """Describe the routed experts of a plan; None when no sample of it has any."""
    records = {(s.index, s.segment): _segment(samples, s).routed_experts for step in plan.steps for s in step.selected}
    shapes = {record.shape[1:] for record in records.values() if record is not None}
    if not shapes:
        return None
    ((layers, topk),) = shapes
    missing = frozenset(place for place, record in records.items() if record is None)
    return Routing(shape=(layers, topk), missing=missing)


def _segment(samples: Sequence[Sample], selected: Selected) -> Segment:
    return samples[selected.index].response.segments[selected.segment]


def _gather(plan: Plan, samples: Sequence[Sample], data_rank: int, routing: Routing | None) -> list[np.ndarray]:
    """Collect a rank's sequences end to end. The arrays are: tokens int32; rollout log-probs float32 and advantages
    float64 of loss tokens; where sequences have gaps, which output tokens are the policy's, bool; and, where there are
    any, routed experts uint8 [positions, layers, topk]."""
    mine = _placed(plan, data_rank)
    tokens, logprobs, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)], [np.zeros(0, bool)]
    advantages = [np.zeros(0, np.float64)]
    for selected in mine:
        segment = _segment(samples, selected)
        tokens += [segment.prompt_ids, segment.output_ids[: selected.num_output_tokens]]
        logprobs.append(segment.rollout_logprobs[: selected.num_loss_tokens])
        advantages.append(samples[selected.index].token_advantages(selected.segment)[: selected.num_loss_tokens])
        if selected.has_gaps:
            masks.append(segment.policy_mask[: selected.num_output_tokens])
    arrays: list[np.ndarray] = [np.concatenate(parts) for parts in (tokens, logprobs, advantages, masks)]
    if routing is not None:
        routed = [np.zeros((0, *routing.shape), np.uint8)]
        for selected in mine:
            record = _segment(samples, selected).routed_experts
            if record is not None:
                routed.append(record[: routing.num_positions(selected)])
        arrays.append(np.concatenate(routed))
    return arrays


def _sequences(plan: Plan, data_rank: int, routing: Routing | None, arrays: Sequence[np.ndarray]) -> Work:
    """Make the sequences of the arrays; the inverse of `_gather`."""
    tokens, logprobs, advantages, masks, *rest = map(_Parts, arrays)

    def sequence(selected: Selected, traced_from: int) -> TrainSequence:
        mask = masks.take(selected.num_output_tokens) if selected.has_gaps else np.ones(selected.num_loss_tokens, bool)
        known = routing.num_positions(selected) if routing else 0
        return TrainSequence(
            token_ids=tokens.take(selected.num_tokens),
            loss_positions=selected.num_prompt_tokens + np.flatnonzero(mask).astype(np.int32),
            weight=selected.loss_scale,
            advantages=advantages.take(selected.num_loss_tokens),
            rollout_logprobs=logprobs.take(selected.num_loss_tokens),
            num_stale_tokens=selected.num_stale_tokens,
            routed_experts=rest[0].take(known) if known else None,
            traced_as=selected.index if selected.index in plan.traced else None,
            traced_from=traced_from,
        )

    work: Work = []
    for step in plan.steps:
        starts = _first_loss_tokens(step)
        work.append(
            [
                [sequence(step.selected[position], starts[position]) for position in micro_batch]
                for micro_batch in step.micro_batches[data_rank]
            ]
        )
    return work


class _Parts:
    """Gives an array away part by part."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self._taken = array, 0

    def take(self, count: int) -> np.ndarray:
        self._taken += count
        return self._array[self._taken - count : self._taken]


def _first_loss_tokens(step: StepPlan) -> list[int]:
    """Count, for each sequence of a step, the loss tokens that its sample has in earlier ones."""
    so_far: Counter[int] = Counter()
    found = []
    for selected in step.selected:
        found.append(so_far[selected.index])
        so_far[selected.index] += selected.num_loss_tokens
    return found


def _plan_from_json(plan: dict[str, Any]) -> Plan:
    return Plan(
        steps=tuple(
            StepPlan(
                denominator=step["denominator"],
                selected=tuple(Selected(**selected) for selected in step["selected"]),
                micro_batches=tuple(tuple(tuple(mb) for mb in rank) for rank in step["micro_batches"]),
            )
            for step in plan["steps"]
        ),
        traced=tuple(plan["traced"]),
    )


def _broadcast(data: bytes | None, control: Any) -> bytes:
    size = torch.tensor([len(data) if data is not None else 0])
    dist.broadcast(size, src=0, group=control)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if data is not None:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(buffer, src=0, group=control)
    return buffer.numpy().tobytes()
