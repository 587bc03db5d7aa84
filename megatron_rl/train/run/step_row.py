"""Makes those parts of a step's row in metrics.jsonl that reinforcement learning and fine-tuning share."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.train.step.trainer import StepResult


def step_row(
    step: int,
    results: Sequence[StepResult],
    train_seconds: float,
    step_seconds: float,
    num_failed_saves: int,
    memory: Mapping[str, float],
) -> dict[str, Any]:
    """Make the row of the optimizer steps of one step; where there are several, most numbers are the last one's.

    train_seconds: of the optimizer steps. step_seconds: of everything. memory: as `TrainContext.memory_metrics`.
    """
    last = results[-1]
    return {
        "step": step,
        **last.metrics,
        # Taken from the first optimizer step: only its tokens were sampled by the trained weights themselves.
        **{name: value for name, value in results[0].metrics.items() if name.startswith("logprob_difference")},
        "num_loss_tokens": last.num_loss_tokens,
        "num_skipped_steps": sum(result.skipped for result in results),
        "grad_norm": last.grad_norm,
        "learning_rate": last.learning_rate,
        "step_seconds": step_seconds,
        "trained_tokens_per_second": sum(result.num_forward_tokens for result in results) / train_seconds,
        "num_failed_saves": num_failed_saves,
        **memory,
    }


def token_counts(results: Sequence[StepResult]) -> dict[str, Any]:
    """Count the tokens of several optimizer steps."""
    trained = sum(result.num_forward_tokens for result in results)
    padding = sum(result.num_padding_tokens for result in results)
    return {
        "num_loss_tokens_by_step": [result.num_loss_tokens for result in results],
        "num_forward_tokens": trained,
        "padding_share": padding / max(1, trained + padding),
    }
