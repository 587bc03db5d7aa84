"""From rank 0 to the other ranks: the plan to all, token arrays to those that train them, or word to stop.

Everything goes over one gloo group whose timeout is the phase's deadline, so a rank never waits inside NCCL for a
rollout to end, and never for ever.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.config.layout import Layout
from megatron_rl.records import Plan, Sample, Selected, StepPlan
from megatron_rl.train.step.batch import TrainSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Rank 0's word that the run ends here. exit_code: None where a signal asked for it; a checkpoint is written then,
    and `TrainContext.stop_code` is the code."""

    exit_code: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Rank 0's word that weights go to the servers now, to be called `version`."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Rank 0 asks what the trainer makes of what each server made of some tokens: train/orchestrator/weight_check.py.

    token_ids: the same for all servers. start: of the first token that counts, at least 1. logprobs: of the tokens from
    there on, one list for each server.
    """

    token_ids: list[int]
    start: int
    logprobs: list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksums:
    """Rank 0 asks for the checksums of exported tensors. dtypes: by name, what each is converted to first."""

    dtypes: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextPhase:
    """Rank 0's word that it goes from one long phase to another, so that the others wait for the second one anew."""


Command = Stop | Push | Probe | Checksums | NextPhase
_COMMANDS: dict[str, type[Command]] = {kind.__name__: kind for kind in (Stop, Push, Probe, Checksums, NextPhase)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """shape: [layers, topk], of the experts at one position. missing: samples of the plan that have no record of them,
    because an earlier run sampled them without."""

    shape: tuple[int, int]
    missing: frozenset[int]

    def num_positions(self, selected: Selected) -> int:
        """Whose experts travel: all but the last, which predicts nothing."""
        return 0 if selected.index in self.missing else selected.num_tokens - 1


Work = list[list[list[TrainSequence]]]  # [optimizer step][micro-batch][sequence], of one data-parallel rank


def send_command(command: Command, control: Any) -> None:
    """Rank 0: what all ranks do next. The others get it from `receive`."""
    _broadcast(json.dumps({type(command).__name__: dataclasses.asdict(command)}).encode(), control)


def send_work(plan: Plan, samples: Sequence[Sample], layout: Layout, control: Any) -> tuple[Plan, Work]:
    """Rank 0: broadcast the plan, give every rank the arrays of its own samples, return rank 0's share."""
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
    """The other ranks: wait for rank 0's plan and this rank's samples, or for another command."""
    ((name, content),) = json.loads(_broadcast(None, control)).items()
    if name in _COMMANDS:
        return _COMMANDS[name](**content)
    plan = _plan_from_json(content["plan"])
    data_rank = layout.data_rank(rank)
    routing = None
    if content["routing"] is not None:
        layers, topk = content["routing"]["shape"]
        routing = Routing(shape=(layers, topk), missing=frozenset(content["routing"]["missing"]))
    mine = list(_placed(plan, data_rank))
    arrays: list[np.ndarray] = [
        np.empty(sum(s.num_tokens for s in mine), np.int32),
        np.empty(sum(s.num_loss_tokens for s in mine), np.float32),
        np.empty(len(mine), np.float64),
    ]
    if routing is not None:
        arrays.append(np.empty((sum(map(routing.num_positions, mine)), *routing.shape), np.uint8))
    for array in arrays:
        dist.recv(torch.from_numpy(array), src=0, group=control)
    return plan, _sequences(plan, data_rank, routing, arrays)


def _placed(plan: Plan, data_rank: int) -> list[Selected]:
    """What a data-parallel rank trains, in the command in which its arrays travel."""
    return [
        step.selected[position]
        for step in plan.steps
        for micro_batch in step.micro_batches[data_rank]
        for position in micro_batch
    ]


def _routing(plan: Plan, samples: Sequence[Sample]) -> Routing | None:
    """None when no sample of the plan has routed experts."""
    records = {s.index: samples[s.index].response.routed_experts for step in plan.steps for s in step.selected}
    shapes = {record.shape[1:] for record in records.values() if record is not None}
    if not shapes:
        return None
    ((layers, topk),) = shapes
    missing = frozenset(index for index, record in records.items() if record is None)
    return Routing(shape=(layers, topk), missing=missing)


def _gather(plan: Plan, samples: Sequence[Sample], data_rank: int, routing: Routing | None) -> list[np.ndarray]:
    """Tokens int32, rollout log-probs float32, advantages float64 and, where there are any, routed experts uint8
    [positions, layers, topk] of a rank's samples, end to end."""
    mine = _placed(plan, data_rank)
    tokens, logprobs = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for selected in mine:
        response = samples[selected.index].response
        tokens += [response.prompt_ids, response.output_ids[: selected.num_loss_tokens]]
        logprobs.append(response.rollout_logprobs[: selected.num_loss_tokens])
    advantages = np.array([samples[selected.index].advantage for selected in mine], np.float64)
    arrays: list[np.ndarray] = [np.concatenate(tokens), np.concatenate(logprobs), advantages]
    if routing is not None:
        routed = [np.zeros((0, *routing.shape), np.uint8)]
        for selected in mine:
            record = samples[selected.index].response.routed_experts
            if record is not None:
                routed.append(record[: routing.num_positions(selected)])
        arrays.append(np.concatenate(routed))
    return arrays


def _sequences(plan: Plan, data_rank: int, routing: Routing | None, arrays: Sequence[np.ndarray]) -> Work:
    """Inverse of `_gather`."""
    tokens, logprobs, advantages, *rest = arrays
    work: Work = []
    token, logprob, sample, routed = 0, 0, 0, 0
    for step in plan.steps:
        work.append([])
        for micro_batch in step.micro_batches[data_rank]:
            work[-1].append([])
            for position in micro_batch:
                selected = step.selected[position]
                count = selected.num_loss_tokens
                known = routing.num_positions(selected) if routing else 0
                work[-1][-1].append(
                    TrainSequence(
                        token_ids=tokens[token : token + selected.num_tokens],
                        loss_positions=np.arange(selected.num_prompt_tokens, selected.num_tokens, dtype=np.int32),
                        weight=selected.loss_scale,
                        advantage=float(advantages[sample]),
                        rollout_logprobs=logprobs[logprob : logprob + count],
                        num_stale_tokens=selected.num_stale_tokens,
                        routed_experts=rest[0][routed : routed + known] if known else None,
                        traced_as=selected.index if selected.index in plan.traced else None,
                    )
                )
                token, logprob, sample = token + selected.num_tokens, logprob + count, sample + 1
                routed += known
    return work


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
