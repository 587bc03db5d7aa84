"""Computes a candidate's numbers from the file of its responses alone."""

from pathlib import Path
from statistics import fmean

import numpy as np

from megatron_rl.evaluation.statistics import estimate
from megatron_rl.reward.verdict import GAVE_UP
from megatron_rl.rollout.rollout_file import read_groups
from megatron_rl.rollout.standalone import no_advantages
from megatron_rl.selection.candidates import Candidate
from megatron_rl.selection.choice import Measured
from megatron_rl.selection.entropy import token_entropy


def measure(candidate: Candidate, path: Path, num_prompts: int) -> Measured:
    """Measure a candidate by the first `num_prompts` positions of the file, which must all be there, with equally many
    responses."""
    groups = [group for group in read_groups(path, no_advantages)[0] if group.prompt_id < num_prompts]
    assert [group.prompt_id for group in groups] == list(range(num_prompts)), path
    samples = [sample for group in groups for sample in group.samples]
    size = len(groups[0].samples)
    logprobs = [np.concatenate([s.response.rollout_logprobs for s in g.samples]) for g in groups]
    return Measured(
        candidate=candidate,
        num_prompts=num_prompts,
        samples_per_prompt=size,
        num_tokens=sum(map(len, logprobs)),
        entropy=token_entropy([-float(lp.sum(dtype=np.float64)) for lp in logprobs], list(map(len, logprobs))),
        accuracy=estimate(
            [fmean(sample.reward for sample in group.samples) for group in groups],
            size,
            is_share=all(0 <= sample.reward <= 1 for sample in samples),
        ),
        truncated_share=fmean(sample.response.finish_reason == "length" for sample in samples),
        error_share=fmean(sample.reason in GAVE_UP for sample in samples),
    )
