"""Writes token traces: the log-probs of server and trainer for each token of a few responses of every step
(docs/traces.md).

Rank 0 chooses the samples, the ranks that hold their tokens keep the log-probs of the forward pass that trains, and
rank 0 writes them down after the step.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_rl.c3po.plan import Schedule

_DECIMALS = 4
_ILL_FORMED = "\ufffd"  # what decoders make of bytes that are no character
_LONGEST_CHARACTER = 4  # bytes in UTF-8, and so the most tokens that one character is divided over


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedTokens:
    """Says which R of the M loss tokens of a micro-batch are traced.

    index: int64 [R], among the M, on their device. samples: int64 [R], each one's sample (`Plan.traced`). tokens: int64
    [R], its place among the loss tokens of its sample, from 0.
    """

    index: Tensor
    samples: np.ndarray
    tokens: np.ndarray


Kept = tuple[TracedTokens, Tensor]  # with their log-probs [R]


def chosen(schedule: Schedule, num_groups: int) -> tuple[int, ...]:
    """Choose the samples to trace. Return positions in `schedule.samples`, in ascending order of (prompt, sample
    index): all samples of `num_groups` groups that have a token with loss. Groups that newer weights sampled are chosen
    first (what an earlier phase left over has lost a part of its group), and of these the ones with earlier prompts."""
    samples = schedule.samples
    trained = {samples[s.index].response.prompt_id for step in schedule.plan.steps for s in step.selected}
    oldest: dict[int, int] = {}
    for sample in samples:
        for version in sample.response.policy_versions[:1].tolist():
            oldest[sample.response.prompt_id] = min(version, oldest.get(sample.response.prompt_id, version))
    groups = set(sorted(trained, key=lambda prompt: (-oldest[prompt], prompt))[:num_groups])
    found = [i for i, sample in enumerate(samples) if sample.response.prompt_id in groups]
    return tuple(sorted(found, key=lambda i: samples[i].id))


def gather(mine: Sequence[Kept], control: Any) -> dict[int, np.ndarray]:
    """Gather the log-probs float64 [num_loss_tokens] of each traced sample on rank 0; elsewhere return nothing.
    Collective over the gloo group `control`. mine: each token is in those of one rank."""
    tables = [np.zeros((0, 3))]
    tables += [np.column_stack([traced.samples, traced.tokens, x.double().cpu().numpy()]) for traced, x in mine]
    is_first = dist.get_rank() == 0
    gathered: list[Any] | None = [None] * dist.get_world_size(control) if is_first else None
    dist.gather_object(np.concatenate(tables), gathered, dst=0, group=control)
    if gathered is None:
        return {}
    samples, tokens, logprobs = np.concatenate(gathered).T
    found = {}
    for sample in np.unique(samples):
        (places,) = np.nonzero(samples == sample)
        order = places[tokens[places].argsort()]
        assert np.array_equal(tokens[order], np.arange(len(order))), "a token is missing, or two ranks hold it"
        found[int(sample)] = logprobs[order]
    return found


def lines(
    schedule: Schedule, found: Sequence[Mapping[int, np.ndarray]], decode: Callable[[Sequence[int]], str]
) -> Iterator[str]:
    """Yield one JSON row per sample of `schedule.plan.traced`, each made when it is asked for.

    found: of each optimizer step, what `gather` returned.
    """
    for index in schedule.plan.traced:
        yield json.dumps(_row(schedule, index, found, decode), ensure_ascii=False) + "\n"


def _row(
    schedule: Schedule, index: int, found: Sequence[Mapping[int, np.ndarray]], decode: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    """Make the row of one sample. A token that the policy did not sample has no log-probs and no version. segments:
    where each of them begins, in a response that has several."""
    response = schedule.samples[index].response
    step = next((number for number, logprobs in enumerate(found) if index in logprobs), None)
    trained = [] if step is None else found[step][index].tolist()
    trained += [math.nan] * (response.num_policy_tokens - len(trained))
    masks = [segment.policy_mask for segment in response.segments]
    is_policy = np.concatenate([np.zeros(0, bool), *masks]).tolist()
    given = response.teacher_logprobs
    teacher = [math.nan] * response.num_policy_tokens if given is None else given.tolist()
    sampled = iter(
        zip(response.rollout_logprobs.tolist(), trained, response.policy_versions.tolist(), teacher, strict=True)
    )
    columns = [next(sampled) if own else (math.nan, math.nan, None, math.nan) for own in is_policy]
    starts = [0, *accumulate(map(len, masks[:-1]))]
    return {
        "position": response.prompt_id,
        "sample_index": response.sample_index,
        "tokens": [piece for segment in response.segments for piece in pieces(segment.output_ids.tolist(), decode)],
        "rollout_logprobs": [_rounded(logprob) for logprob, _, _, _ in columns],
        "train_logprobs": [_rounded(logprob) for _, logprob, _, _ in columns],
        **({} if given is None else {"teacher_logprobs": [_rounded(logprob) for _, _, _, logprob in columns]}),
        "policy_versions": [
            [version, len(list(run))] for version, run in groupby(version for _, _, version, _ in columns)
        ],
        "optimizer_step": step,
        **({"segments": starts} if len(starts) > 1 else {}),
    }


def _rounded(value: float) -> float | None:
    return round(value, _DECIMALS) if math.isfinite(value) else None


def pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Return the part of `decode(ids)` that each token adds; joined they are that text.

    Where several tokens share a character the last one has it and the others have "". A token's text depends on its
    neighbours (bytes of one character, a space that a first token loses), so what it adds behind the ones before it is
    compared with the whole text, and waits for the next token where it is not how that goes on.
    """
    text = decode(ids)
    alone: dict[int, str] = {}
    found: list[str] = []
    given = 0  # characters
    before = read = 0  # the tokens up to `read` have brought them; those from `before` on are context
    for end in range(1, len(ids)):
        waiting = end - read
        token = ids[end - 1]
        if token not in alone:
            alone[token] = decode([token])
        piece = alone[token]
        # Nearly every token is done with here: its text by itself is whole, and is how the text goes on.
        if waiting > 1 or not piece or _ILL_FORMED in piece or not text.startswith(piece, given):
            # Well-formed text waits for fewer tokens than a character has bytes. What is not may need all the context
            # there is; ever more rarely, since that takes as long as the response is.
            anew = waiting >= _LONGEST_CHARACTER and waiting & (waiting - 1) == 0
            known = text[:given] if anew else decode(ids[before:read])
            longer = decode(ids[0 if anew else before : end])
            piece = longer[len(known) :] if longer.startswith(known) else ""
        if piece and text.startswith(piece, given):
            given += len(piece)
            before, read = read, end
        else:
            piece = ""
        found.append(piece)
    return [*found, text[given:]] if ids else []
