"""Checks that weights arrived: compares a server's log-probs of some tokens with the trainer's own, after an update."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.sync.all_ranks import gather_objects
from megatron_rl.sync.export import export_tensors
from megatron_rl.tensor_bytes import checksum
from megatron_rl.train.orchestrator.commands import Probe
from megatron_rl.train.step.batch import TrainSequence
from megatron_rl.train.step.trainer import Trainer


def mean_differences(trainer: Trainer, probe: Probe, control: Any) -> list[float]:
    """Return the mean |train - server log-prob| over the tokens that count, for each server; the same on every rank.
    Collective.

    The mean is taken because at a near-tie of the router one token may rightly differ.
    """
    tokens = np.array(probe.token_ids, np.int32)
    sequences = [
        TrainSequence(
            token_ids=tokens,
            loss_positions=np.arange(probe.start, len(tokens), dtype=np.int32),
            weight=1.0,
            rollout_logprobs=np.array(logprobs, np.float32),
            num_stale_tokens=0,
        )
        for logprobs in probe.logprobs
    ]
    batches = [trainer.micro_batch([sequence]) for sequence in sequences]
    # The trainer's side is the same for every server, so it is computed once; the schedule wants whole rounds.
    rounds = [batches[0], *[trainer.micro_batch([])] * (trainer.model.layout.micro_batch_multiple - 1)]
    found = trainer.logprobs(rounds)
    sums = torch.zeros(len(batches), 2, dtype=torch.float64)
    if found:
        for i, batch in enumerate(batches):
            difference = (found[0].double() - batch.rollout_logprobs.double()).abs()
            sums[i] = torch.tensor([float(difference.sum()), float(len(difference))])
    # Ranks that hold the same tokens count them all, in both columns.
    dist.all_reduce(sums, group=control)
    return (sums[:, 0] / sums[:, 1]).tolist()


def weight_checksums(trainer: Trainer, dtypes: dict[str, str], control: Any) -> dict[str, str]:
    """Return the checksum of every exported Hugging Face tensor, by its name, on every rank. Collective.

    dtypes: what a tensor is converted to first; one that is not named stays as it is.
    """
    mine = {
        name: checksum(tensor.to(getattr(torch, dtypes[name])) if name in dtypes else tensor)
        for name, tensor in export_tensors(trainer.model)
    }
    return {name: value for part in gather_objects(mine, control) for name, value in part.items()}


def differing(ours: dict[str, str], theirs: dict[str, str]) -> tuple[list[str], list[str]]:
    """Find the tensors whose checksums differ, and those of ours that could not be compared; names in order."""
    names = sorted(name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name])
    return names, sorted(ours.keys() - theirs.keys())


def told_difference(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """Say in words which tensors differ by these checksums."""
    names, lost = differing(ours, theirs)
    text = f"{len(names)} of {len(ours)} tensors differ: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return text + (f" ({len(lost)} could not be compared: {', '.join(lost[:3])})" if lost else "")
