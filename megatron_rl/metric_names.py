"""This module lists every number of a step in metrics.jsonl, with its unit, what it is taken over, and what it means.

`python -m megatron_rl.metric_names` prints docs/metrics.md. A test holds that runs write nothing else.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

# name | unit | over | meaning. A name with a * is written for each domain, metric/domain, where there are several; one
# with /* for each of its own names alone.
_TABLE = """
# Every run
step | | | the step, from 0
num_starts | | | how often the run had been started when the row was written; 1 if it was never resumed
loss | nats | last optimizer step | what the optimizer minimises; in reinforcement learning its sign says little
entropy | nats per token | last optimizer step, loss tokens | entropy of the policy at its sampling temperature
grad_norm | | last optimizer step | norm of the whole gradient before clipping
learning_rate | | last optimizer step | the learning rate that was used
num_loss_tokens* | tokens | last optimizer step | tokens that carried loss
num_skipped_steps | optimizer steps | step | skipped ones: loss or gradient was not finite, weights stay
load_balance_loss | | last optimizer step | the router's balance loss before its coefficient; 1 is perfect balance
z_loss | | last optimizer step | the router's z loss before its coefficient
step_seconds | s | rank 0 | the whole step, but for validation
trained_tokens_per_second | tokens/s | all ranks | tokens of forward passes over the seconds of training
num_failed_saves | checkpoints | run | those that could not be written so far
num_alarms | | step | warnings about this step
peak_memory_gb | GiB | rank 0 | the most that this rank's GPU held in the step; not on a CPU

# Fine-tuning
validation_loss | nats | all of data.validation | loss per target token
validation_entropy | nats per token | all of data.validation | entropy per target token

# Validation
validation/* | | responses to the benchmark of the name, mean | score of the weights that the step starts from
validation_low/* | | prompts of the benchmark | lower end of the 95 % interval of that
validation_high/* | | prompts of the benchmark | upper end of it
validation_seconds | s | rank 0 | sampling and judging benchmarks; no part of step_seconds

# Reward
reward* | | responses of the phase, mean | the reward; of carried responses where a phase sampled none
reward_part/* | | responses of the phase that have it, mean | a part of the reward by its name, before its weight
uniform_group_share | share | groups of the phase | groups whose responses all have the same reward, and teach nothing
correct_share | share | responses of the phase | responses that were judged correct
no_answer_share | share | responses of the phase | responses without an answer: no closed box, no closed block of code
wrong_share | share | responses of the phase | responses whose answer was judged wrong
truncated_share | share | responses of the phase | responses that ended at rollout.max_response_tokens
too_slow_share | share | responses of the phase | programs that ran out of their time
reward_error_share | share | responses of the phase | responses that could not be judged: errors, time-outs
advantage_mean | | trained responses | mean of the advantages
advantage_std | | trained responses | standard deviation of the advantages
advantage_max | | trained responses | the largest absolute advantage

# Rollout
num_prompts | prompts | phase | groups that were completed
num_samples* | responses | phase | responses that were completed
num_generated_tokens | tokens | phase | tokens that were sampled, whatever became of them
response_tokens_mean* | tokens | responses of the phase | mean length
response_tokens_std | tokens | responses of the phase | standard deviation of the length
response_tokens_p90 | tokens | responses of the phase | the length that nine in ten do not exceed
response_tokens_max | tokens | responses of the phase | the longest
turns_mean | | responses of the phase | turns of a response; this and the next three where there are trajectories
segments_mean | | responses of the phase | sequences that a response is trained as
masked_token_share | share | output tokens of the phase | tokens that the policy did not sample, which carry no loss
no_token_share | share | responses of the phase | responses of agents that asked the policy nothing
num_tool_calls | | phase, where agents run | calls of tools that were found in what the policy wrote
num_broken_tool_calls | | phase, where agents run | beginnings of calls that are no whole calls
num_new_segments | | phase, where agents run | turns that did not go on with what was sampled before: a changed history
num_ended_by_limit | responses | phase, where agents run | trajectories that a limit of tokens, turns or time ended
num_failed_agents | responses | phase, where agents run | agents that raised, crashed, or took too much of something
num_unfinished | responses | phase | responses that go on in the next phase (C3PO++)
num_unfinished_tokens | tokens | phase | tokens that those have so far
num_dropped_unfinished | responses | phase | unfinished ones that were kept over too many phases
num_dropped_unfinished_tokens | tokens | phase | tokens that those had
num_resent_samples | responses | phase | responses that were asked for again because their server was lost
num_lost_servers | | phase | how often a server was marked down

# Budget
budget_use | share | phase | tokens with loss over the token budget of all optimizer steps; empty without a budget
num_loss_tokens_by_step | tokens | each optimizer step | tokens that carried loss
num_trained_samples | responses | phase | responses of which at least one token carried loss
num_cut_tokens | tokens | phase | tokens of trained responses behind the end of a budget
num_carried | responses | phase | responses left for the next phase
num_dropped_over_budget | responses | phase | responses beyond the budget that are not kept
num_dropped_equal_rewards | responses | phase | responses of uniform groups that dynamic sampling dropped
num_dropped_not_needed | responses | phase | responses of groups beyond rollout.prompts_per_step
num_dropped_stale | responses | phase | carried responses older than budget.max_staleness
off_policy_token_share | share | first optimizer step | loss tokens that older weights sampled
num_micro_batches | | phase | micro-batches of one data-parallel rank
micro_batch_imbalance | | phase | time at the barriers over time of work; 1 is perfect
num_forward_tokens | tokens | step | tokens of forward passes over all ranks, padding left out
padding_share | share | step | padding among the tokens of forward passes

# Policy
kl | nats per token | last optimizer step | estimate of the divergence from the reference policy; 0 without one
clip_low_share | share | last optimizer step, loss tokens | tokens whose ratio was clipped from below
clip_high_share | share | last optimizer step, loss tokens | tokens whose ratio was clipped from above
ratio_mean | | last optimizer step, loss tokens | probability under the present weights over that of the old ones
ratio_min | | last optimizer step, loss tokens | the smallest ratio
ratio_max | | last optimizer step, loss tokens | the largest ratio
correction_masked_share | share | last optimizer step, loss tokens | tokens that the off-policy correction takes out
correction_weight | | last optimizer step, loss tokens | mean weight that the off-policy correction gives
train_rollout_log_ratio_p001 | nats | last optimizer step, loss tokens | trainer less server, 0.1th percentile
train_rollout_log_ratio_p50 | nats | last optimizer step, loss tokens | log-prob of trainer less server, median
train_rollout_log_ratio_p999 | nats | last optimizer step, loss tokens | the 99.9th percentile
logprob_difference_mean | nats | first optimizer step, fresh tokens | distance of trainer and server, mean
logprob_difference_p999 | nats | first optimizer step, fresh tokens | the 99.9th percentile
logprob_difference_max | nats | first optimizer step, fresh tokens | the largest
router_replay_changed_share | share | step | choices of experts that replay changed
lora_update_kept | | last optimizer step | of the adapters' update, what bfloat16 weights keep: 1 is all, 0 nothing
lora_rounding_noise | | last optimizer step | what rounding to bfloat16 adds to the update, over it (norms)

# Teacher
teacher_kl* | nats per token | responses of the phase, mean | log-prob of the sampler less that of the teacher
teacher_kl_from/* | nats per token | responses of the phase | the same, of tokens from this place on to four times that
teacher_kl_max | nats | responses of the phase | the largest such difference
teacher_disagreement_share | share | responses of the phase | tokens where it is 1 or more
teacher_advantage_std | | trained responses | of what the teacher adds to tokens, standard deviation
teacher_coefficient | | step | beta, before the factors of domains
teacher_seconds | s | phase | while the teacher had something to score, beside generation
num_teacher_tokens | tokens | phase | tokens of the sequences that it read
num_lost_teachers | | phase | how often a server of the teacher was marked down

# Seconds of a step
rollout_seconds | s | rank 0 | sampling and scoring
event_loop_lag_seconds | s | rank 0 | the longest that its event loop was late; what servers said meanwhile had to wait
plan_seconds | s | rank 0 | planning the optimizer steps, and writing the responses
train_seconds | s | rank 0 | the optimizer steps
update_weights_seconds | s | rank 0 | weights to the servers, and the proof that they arrived
export_seconds | s | rank 0 | of these, gathering tensors
send_seconds | s | rank 0 | of these, sending them
install_seconds | s | rank 0 | of these, until the servers answer by them
resume_seconds | s | rank 0 | servers take their memory back
release_seconds | s | rank 0 | servers release their memory
offload_seconds | s | rank 0 | gradients and optimizer states to host memory
reload_seconds | s | rank 0 | and back
generated_tokens_per_second | tokens/s | phase | sampled tokens over rollout_seconds
end_to_end_tokens_per_second | tokens/s | step | sampled tokens over step_seconds
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
    for line in _TABLE.strip().splitlines():
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
        lines += ["", f"## {heading}", "", "| metric | unit | over | meaning |", "|---|---|---|---|"]
        for metric in metrics:
            name = f"`{metric.name}`" + (f", `{metric.name}/domain`" if metric.by_domain else "")
            lines.append(f"| {name} | {metric.unit} | {metric.over} | {metric.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
