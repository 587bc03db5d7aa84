"""Computes the numbers of a benchmark from its judged responses alone."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Any

from megatron_rl.evaluation.responses import Judged
from megatron_rl.evaluation.statistics import Estimate, estimate, majority_at, pass_at
from megatron_rl.evaluation.votes import count_votes
from megatron_rl.reward.verdict import GAVE_UP


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """Holds the numbers of a benchmark; docs/evaluation.md defines each.

    average: the mean score, avg@k with k = samples_per_prompt. majority_at: None where some answers are programs.
    by_kind: avg@k of each kind of prompt. reasons: how many responses got which verdict; error_share: no verdict.
    """

    num_prompts: int
    samples_per_prompt: int
    average: Estimate
    pass_at: dict[int, Estimate]
    majority_at: dict[int, Estimate] | None
    by_kind: dict[str, Estimate]
    reasons: dict[str, int]
    response_tokens_mean: float
    response_tokens_max: int
    truncated_share: float
    no_answer_share: float
    error_share: float


def summarise(rows: Sequence[Judged], at: Sequence[int]) -> BenchmarkResult:
    """Compute the numbers of a benchmark. at: every k of pass@k and maj@k. Each prompt must have equally many rows, at
    least the largest k."""
    groups = [list(group) for _, group in groupby(sorted(rows, key=_prompt), key=_prompt)]
    votes = [count_votes(group) for group in groups]
    size = len(groups[0])
    assert all(len(group) == size for group in groups), "a prompt lacks samples"
    are_shares = all(0 <= row.score <= 1 for row in rows)
    has_programs = any(row.judged_as == "code" for row in rows)
    return BenchmarkResult(
        num_prompts=len(groups),
        samples_per_prompt=size,
        average=_average(groups, are_shares),
        pass_at={k: estimate([pass_at(k, size, v.num_correct) for v in votes], size) for k in at},
        majority_at=None
        if has_programs
        else {k: estimate([majority_at(k, v.num_correct, v.others, v.num_silent) for v in votes], size) for k in at},
        by_kind={
            kind: _average([group for group in groups if group[0].kind == kind], are_shares)
            for kind in sorted({row.kind for row in rows})
        },
        reasons=dict(sorted(Counter(row.reason for row in rows).items())),
        response_tokens_mean=fmean(row.num_tokens for row in rows),
        response_tokens_max=max(row.num_tokens for row in rows),
        truncated_share=fmean(row.finish_reason == "length" for row in rows),
        no_answer_share=fmean(row.reason == "no_answer" for row in rows),
        error_share=fmean(row.reason in GAVE_UP for row in rows),
    )


def finite(value: Any) -> Any:
    """Return a record without what JSON has no number for: the ends of the interval of a single prompt's scores are
    nowhere."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _prompt(row: Judged) -> str:
    return row.prompt_id


def _average(groups: Sequence[Sequence[Judged]], are_shares: bool) -> Estimate:
    return estimate([fmean(row.score for row in group) for group in groups], len(groups[0]), are_shares)
