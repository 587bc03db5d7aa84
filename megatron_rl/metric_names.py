"""This module lists every number of a step in metrics.jsonl, with its unit, what it is taken over, and what it means.

`python -m megatron_rl.metric_names` prints docs/metrics.md. A test holds that runs write nothing else.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

# name | unit | over | meaning. A name with a * is written for each domain, metric/domain, where there are several; one
# with /* for each of its own names alone. An indented line goes on with the one above.
_TABLE = """
# Every run
step | | | Step, counted from 0.
num_starts | | | Number of times that the run had been started when the row was written. 1: never resumed.
loss | nats | last optimizer step | Loss that the optimizer minimises. In reinforcement learning its sign says little.
entropy | nats per token | last optimizer step, loss tokens | Entropy of the policy at its sampling temperature.
grad_norm | | last optimizer step | Global gradient norm before clipping.
learning_rate | | last optimizer step | Learning rate.
num_loss_tokens* | tokens | last optimizer step | Number of tokens that carried loss.
num_skipped_steps | optimizer steps | step | Number of optimizer steps that were skipped because loss or gradient was
  not finite. Weights stay as they were.
load_balance_loss | | last optimizer step | Load-balancing loss of the router, before its coefficient. 1: perfect
  balance.
z_loss | | last optimizer step | Z-loss of the router, before its coefficient.
step_seconds | s | rank 0 | Time of the whole step, without validation.
trained_tokens_per_second | tokens/s | all ranks | Tokens of forward passes per second of training.
num_failed_saves | checkpoints | run | Number of checkpoints that could not be written so far.
num_alarms | | step | Number of warnings about this step.
peak_memory_gb | GiB | rank 0 | Peak memory of this rank's GPU in the step. Not on a CPU.

# Fine-tuning
validation_loss | nats | all of data.validation | Loss per target token.
validation_entropy | nats per token | all of data.validation | Entropy per target token.

# Validation
validation/* | | responses to the benchmark of the name, mean | Score of the weights that the step starts from.
validation_low/* | | prompts of the benchmark | Lower end of the 95 % interval of that score.
validation_high/* | | prompts of the benchmark | Upper end of the 95 % interval of that score.
validation_seconds | s | rank 0 | Time of sampling and judging the benchmarks. Not part of step_seconds.

# Reward
reward* | | responses of the phase, mean | Reward. Of carried responses where a phase sampled none.
reward_part/* | | responses of the phase that have it, mean | Part of the reward by its name, before its weight.
uniform_group_share | share | groups of the phase | Share of groups whose responses all have the same reward. They teach
  nothing.
correct_share | share | responses of the phase | Share of responses that were judged correct.
no_answer_share | share | responses of the phase | Share of responses without an answer: no closed box, no closed block
  of code.
wrong_share | share | responses of the phase | Share of responses whose answer was judged wrong.
truncated_share | share | responses of the phase | Share of responses that were cut off at rollout.max_response_tokens.
too_slow_share | share | responses of the phase | Share of responses whose program exceeded its time limit.
reward_error_share | share | responses of the phase | Share of responses that could not be judged: errors, timeouts.
advantage_mean | | trained responses | Mean of the advantages.
advantage_std | | trained responses | Standard deviation of the advantages.
advantage_max | | trained responses | Largest absolute advantage.

# Rollout
num_prompts | prompts | phase | Number of completed groups.
num_samples* | responses | phase | Number of completed responses.
num_generated_tokens | tokens | phase | Number of sampled tokens, whatever became of them.
response_tokens_mean* | tokens | responses of the phase | Mean response length.
response_tokens_std | tokens | responses of the phase | Standard deviation of the response length.
response_tokens_p90 | tokens | responses of the phase | Response length that 90 % of the responses do not exceed.
response_tokens_max | tokens | responses of the phase | Maximum response length.
turns_mean | | responses of the phase | Mean number of turns. This and the next three are there where agents run.
segments_mean | | responses of the phase | Mean number of sequences that a response is trained as.
masked_token_share | share | output tokens of the phase | Share of tokens that the policy did not sample. They carry no
  loss.
no_token_share | share | responses of the phase | Share of responses of agents that never asked the policy.
num_tool_calls | | phase, where agents run | Number of tool calls that were found in the policy's output.
num_broken_tool_calls | | phase, where agents run | Number of tool calls that begin but are not complete.
num_new_segments | | phase, where agents run | Number of turns that did not continue what was sampled before: a changed
  history.
num_ended_by_limit | responses | phase, where agents run | Number of trajectories that a limit of tokens, turns or time
  ended.
num_failed_agents | responses | phase, where agents run | Number of agents that raised, crashed, or exceeded a limit.
num_unfinished | responses | phase | Number of responses that continue in the next phase (C3PO++).
num_unfinished_tokens | tokens | phase | Number of tokens that unfinished responses have so far.
num_dropped_unfinished | responses | phase | Number of unfinished responses dropped because they were kept over too many
  phases.
num_dropped_unfinished_tokens | tokens | phase | Number of tokens of these dropped responses.
num_resent_samples | responses | phase | Number of responses requested again because their server was lost.
num_lost_servers | | phase | Number of times that a server was marked down.

# Budget
budget_use | share | phase | Tokens with loss over the token budget of all optimizer steps. Empty without a budget.
num_loss_tokens_by_step | tokens | each optimizer step | Number of tokens that carried loss.
num_trained_samples | responses | phase | Number of responses of which at least one token carried loss.
num_cut_tokens | tokens | phase | Number of tokens of trained responses beyond the end of a budget.
num_carried | responses | phase | Number of responses left for the next phase.
num_dropped_over_budget | responses | phase | Number of responses beyond the budget that are not kept.
num_dropped_equal_rewards | responses | phase | Number of responses that dynamic sampling dropped with their uniform
  groups.
num_dropped_not_needed | responses | phase | Number of responses of groups beyond rollout.prompts_per_step.
num_dropped_stale | responses | phase | Number of carried responses older than budget.max_staleness.
num_dropped_truncated | responses | phase | Number of responses that carry no loss because they were cut off
  (algorithm.mask_truncated).
off_policy_token_share | share | first optimizer step | Share of loss tokens that older weights sampled.
num_micro_batches | | phase | Number of micro-batches of one data-parallel rank.
micro_batch_imbalance | | phase | Estimated time of the slowest ranks over that of ranks that are always busy. 1:
  perfect balance.
num_forward_tokens | tokens | step | Number of tokens of forward passes over all ranks, without padding.
padding_share | share | step | Share of padding among the tokens of forward passes.

# Policy
kl | nats per token | last optimizer step | Estimate of the KL divergence from the reference policy. 0 without one.
clip_low_share | share | last optimizer step, loss tokens | Share of tokens whose ratio was clipped from below.
clip_high_share | share | last optimizer step, loss tokens | Share of tokens whose ratio was clipped from above.
ratio_mean | | last optimizer step, loss tokens | Mean ratio of the probability under present weights to that under old
  ones.
ratio_min | | last optimizer step, loss tokens | Smallest ratio.
ratio_max | | last optimizer step, loss tokens | Largest ratio.
correction_masked_share | share | last optimizer step, loss tokens | Share of tokens that the off-policy correction
  masks.
correction_weight | | last optimizer step, loss tokens | Mean weight of the off-policy correction.
train_rollout_log_ratio_p001 | nats | last optimizer step, loss tokens | Log-prob of trainer less server: 0.1th
  percentile.
train_rollout_log_ratio_p50 | nats | last optimizer step, loss tokens | Log-prob of trainer less server: median.
train_rollout_log_ratio_p999 | nats | last optimizer step, loss tokens | Log-prob of trainer less server: 99.9th
  percentile.
logprob_difference_mean | nats | first optimizer step, fresh tokens | Absolute log-prob difference of trainer and
  server: mean.
logprob_difference_p999 | nats | first optimizer step, fresh tokens | Absolute log-prob difference of trainer and
  server: 99.9th percentile.
logprob_difference_max | nats | first optimizer step, fresh tokens | Absolute log-prob difference of trainer and server:
  maximum.
router_replay_changed_share | share | step | Share of expert choices that router replay changed.
lora_update_kept | | last optimizer step | Part of the adapters' update that bfloat16 weights keep. 1: all. 0: nothing.
lora_rounding_noise | | last optimizer step | Norm of the rounding error of bfloat16 weights over that of the update.

# Teacher
teacher_kl* | nats per token | responses of the phase, mean | Log-prob of the sampler less that of the teacher.
teacher_kl_from/* | nats per token | responses of the phase | Mean of teacher_kl over tokens from this position to four
  times it.
teacher_kl_max | nats | responses of the phase | Largest log-prob of a token under the sampler less that under the
  teacher.
teacher_disagreement_share | share | responses of the phase | Share of tokens whose log-prob under the sampler exceeds
  that under the teacher by 1 nat or more.
teacher_advantage_std | | trained responses | Standard deviation of what the teacher adds to the advantages of tokens.
teacher_coefficient | | step | Weight of the teacher's signal (beta), before the factors of domains.
teacher_seconds | s | phase | Time in which the teacher had something to score, during generation.
num_teacher_tokens | tokens | phase | Number of tokens of the sequences that the teacher read.
num_lost_teachers | | phase | Number of times that a server of the teacher was marked down.

# Seconds of a step
rollout_seconds | s | rank 0 | Time of sampling and scoring.
reward_wait_seconds | s | phase | Part of rollout_seconds: nothing was sampled, and rewards were waited for.
event_loop_lag_seconds | s | rank 0 | Longest delay of the event loop. Replies of servers had to wait for so long.
plan_seconds | s | rank 0 | Time of planning the optimizer steps and writing the responses.
train_seconds | s | rank 0 | Time of the optimizer steps.
update_weights_seconds | s | rank 0 | Time of sending weights to the servers and checking that they arrived.
export_seconds | s | rank 0 | Part of update_weights_seconds: gathering tensors.
send_seconds | s | rank 0 | Part of update_weights_seconds: sending tensors.
install_seconds | s | rank 0 | Part of update_weights_seconds: until the servers answer with the new weights.
resume_seconds | s | rank 0 | Time in which servers take their memory back.
release_seconds | s | rank 0 | Time in which servers release their memory.
offload_seconds | s | rank 0 | Time of moving gradients and optimizer states to host memory.
reload_seconds | s | rank 0 | Time of moving gradients and optimizer states back to the GPU.
generated_tokens_per_second | tokens/s | phase | Sampled tokens per second of rollout_seconds.
end_to_end_tokens_per_second | tokens/s | step | Sampled tokens per second of step_seconds.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Describes one number of a row.

    by_domain: it is also written for each domain. over: what it is taken over, or who measures it.
    """

    name: str
    by_domain: bool
    unit: str
    over: str
    meaning: str


def sections() -> dict[str, list[Metric]]:
    """Return the metrics under their headings."""
    found: dict[str, list[Metric]] = {}
    for line in _TABLE.replace("\n  ", " ").strip().splitlines():
        if line.startswith("# "):
            metrics = found[line[2:]] = []
        elif line:
            name, unit, over, meaning = (part.strip() for part in line.split("|"))
            by_domain = name.endswith("*") and not name.endswith("/*")
            name = name.removesuffix("*") if by_domain else name
            metrics.append(Metric(name=name, by_domain=by_domain, unit=unit, over=over, meaning=meaning))
    return found


def unknown(names: Iterable[str]) -> list[str]:
    """Return the names that no metric has."""
    known = {metric.name: metric for metrics in sections().values() for metric in metrics}
    families = {name.removesuffix("/*") for name, metric in known.items() if metric.by_domain or name.endswith("/*")}
    return [name for name in names if name not in known and name.partition("/")[0] not in families]


def markdown() -> str:
    """Return the text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "`metrics.jsonl` has a row for each step, trackers the same numbers. A number that is not finite is `null`.",
        "Names with `/domain` are written for each domain where there are several, those with `/*` for each benchmark",
        "or part of a reward. Fresh tokens are those of the weights that the step starts from. This page is made by",
        "`python -m megatron_rl.metric_names`.",
    ]
    for heading, metrics in sections().items():
        lines += ["", f"## {heading}", "", "| metric | meaning | unit | over |", "|---|---|---|---|"]
        for metric in metrics:
            name = f"`{metric.name}`" + (f", `{metric.name}/domain`" if metric.by_domain else "")
            lines.append(f"| {name} | {metric.meaning} | {metric.unit} | {metric.over} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
