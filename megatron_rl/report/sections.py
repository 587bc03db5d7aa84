"""Lists which curves stand together on the page, and what to look for in them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Describes a plot. curves: label: metric, where NAME/* stands for NAME of every domain. note: what to look for.

    kind: "stack" piles the curves up; "log" has a logarithmic axis; "zero" begins at 0. always: also where all of its
    curves are 0 throughout.
    """

    title: str
    unit: str
    curves: dict[str, str]
    note: str = ""
    kind: Literal["line", "zero", "log", "stack"] = "line"
    always: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    title: str
    text: str
    plots: tuple[Plot, ...]


SECTIONS = (
    Section(
        title="Learning",
        text="Is the reward climbing, and is the policy still one that explores?",
        plots=(
            Plot(
                title="Reward",
                unit="mean of the step",
                curves={"reward": "reward"},
                note="Of the responses sampled in the step, before the budget selects among them.",
                always=True,
            ),
            Plot(title="Reward by domain", unit="mean of the step", curves={"*": "reward/*"}, always=True),
            Plot(
                title="Validation",
                unit="mean score, with 95 % intervals",
                curves={"*": "validation/*"},
                note="Of prompts that are not trained on: where it falls while the reward climbs, the run overfits.",
                always=True,
            ),
            Plot(
                title="Judged correct",
                unit="share of responses",
                curves={"correct": "correct_share"},
                note="The reward itself, where that is 0 or 1.",
            ),
            Plot(
                title="Parts of the reward",
                unit="mean of the step",
                curves={"*": "reward_part/*"},
                note="Before their weights.",
                always=True,
            ),
            Plot(
                title="Loss",
                unit="per token",
                curves={"training": "loss", "validation": "validation_loss"},
                note="In reinforcement learning its size says little; in SFT validation should not rise.",
            ),
            Plot(
                title="Entropy",
                unit="nats per token",
                curves={"policy": "entropy", "validation": "validation_entropy"},
                note="Near 0 nothing new is tried any more; a sudden rise is a policy that comes apart.",
            ),
            Plot(
                title="KL divergence",
                unit="nats per token",
                curves={"from the start": "kl"},
                note="From the starting weights, by algorithm.kl_estimator.",
            ),
            Plot(
                title="Groups without a signal",
                unit="share of groups",
                kind="zero",
                curves={"all rewards equal": "uniform_group_share"},
                note="Their advantage is 0: prompts that are too easy or too hard.",
            ),
            Plot(
                title="Advantage",
                unit="of the samples trained",
                curves={
                    "standard deviation": "advantage_std",
                    "largest": "advantage_max",
                    "standard deviation of the teacher's, of tokens": "teacher_advantage_std",
                },
            ),
        ),
    ),
    Section(
        title="Teacher",
        text="What the teacher of [distillation] thinks of the tokens that the policy samples.",
        plots=(
            Plot(
                title="Reverse KL divergence",
                unit="nats per token",
                curves={"policy from teacher": "teacher_kl"},
                note="Log-prob of the policy less that of the teacher. It falls as the policy comes to agree.",
            ),
            Plot(title="Reverse KL by domain", unit="nats per token", curves={"*": "teacher_kl/*"}),
            Plot(
                title="Reverse KL by place",
                unit="nats per token",
                curves={"*": "teacher_kl_from/*"},
                note="Of tokens from this place in the response on, to four times that.",
            ),
            Plot(
                title="Tokens that the teacher finds unlikely",
                unit="share of tokens",
                kind="zero",
                curves={"1 nat or more": "teacher_disagreement_share"},
            ),
            Plot(title="Largest disagreement", unit="nats of a token", curves={"largest": "teacher_kl_max"}),
            Plot(title="Coefficient", unit="beta", kind="zero", curves={"beta": "teacher_coefficient"}),
            Plot(
                title="The teacher's work",
                unit="seconds per step",
                kind="zero",
                curves={"scoring": "teacher_seconds"},
                note="Beside generation, for the most part.",
            ),
            Plot(title="Tokens that it read", unit="per step", kind="zero", curves={"read": "num_teacher_tokens"}),
            Plot(title="Servers of it lost", unit="per step", kind="zero", curves={"lost": "num_lost_teachers"}),
        ),
    ),
    Section(
        title="Lengths and failures",
        text="How long responses are, and what went wrong with them.",
        plots=(
            Plot(
                title="Response length",
                unit="tokens",
                kind="zero",
                curves={
                    "mean": "response_tokens_mean",
                    "90th percentile": "response_tokens_p90",
                    "longest": "response_tokens_max",
                },
                note="A longest response that stays at the limit is cut off there.",
            ),
            Plot(
                title="Turns of agents",
                unit="mean of a response",
                kind="zero",
                curves={"turns": "turns_mean", "segments": "segments_mean"},
                note="A segment is a sequence of its own. There are several where the history was changed.",
            ),
            Plot(
                title="What agents' policies did not write",
                unit="share",
                kind="zero",
                curves={"of output tokens": "masked_token_share", "responses without a turn": "no_token_share"},
            ),
            Plot(
                title="What agents do",
                unit="per phase",
                kind="zero",
                curves={
                    "calls of tools": "num_tool_calls",
                    "broken calls": "num_broken_tool_calls",
                    "changed histories": "num_new_segments",
                    "ended by a limit": "num_ended_by_limit",
                    "failed": "num_failed_agents",
                },
            ),
            Plot(title="Length by domain", unit="tokens, mean", kind="zero", curves={"*": "response_tokens_mean/*"}),
            Plot(
                title="Responses that failed",
                unit="share of responses",
                kind="zero",
                curves={
                    "wrong answer": "wrong_share",
                    "cut off at the limit": "truncated_share",
                    "no answer": "no_answer_share",
                    "too slow": "too_slow_share",
                    "not judged": "reward_error_share",
                },
            ),
            Plot(title="Prompts", unit="completed in the step", kind="zero", curves={"prompts": "num_prompts"}),
            Plot(title="Responses", unit="completed in the step", kind="zero", curves={"responses": "num_samples"}),
        ),
    ),
    Section(
        title="Token budget",
        text="C3PO trains every step on the same number of tokens: flat lines are right here.",
        plots=(
            Plot(
                title="Tokens per step",
                unit="tokens",
                kind="zero",
                curves={"carry loss": "num_loss_tokens", "sampled": "num_generated_tokens"},
            ),
            Plot(title="Loss tokens by domain", unit="per step", kind="zero", curves={"*": "num_loss_tokens/*"}),
            Plot(
                title="Use of the budget",
                unit="share of the budget",
                kind="zero",
                curves={"used": "budget_use"},
                note="Below 1 the step was short of tokens.",
            ),
            Plot(
                title="Carried into the next step",
                unit="responses",
                kind="zero",
                curves={"carried": "num_carried", "unfinished": "num_unfinished"},
            ),
            Plot(title="Cut at the budget", unit="tokens", kind="zero", curves={"cut": "num_cut_tokens"}),
            Plot(
                title="Dropped",
                unit="responses",
                kind="zero",
                curves={
                    "equal rewards": "num_dropped_equal_rewards",
                    "not needed": "num_dropped_not_needed",
                    "over the budget": "num_dropped_over_budget",
                    "stale": "num_dropped_stale",
                    "truncated": "num_dropped_truncated",
                    "unfinished": "num_dropped_unfinished",
                },
                note="What was sampled and never trained.",
            ),
            Plot(
                title="Off-policy tokens",
                unit="share of loss tokens",
                kind="zero",
                curves={"sampled by older weights": "off_policy_token_share"},
            ),
        ),
    ),
    Section(
        title="Optimizer",
        text="Jumps of the gradient's norm and skipped steps come before a collapse.",
        plots=(
            Plot(title="Gradient norm", unit="before clipping", kind="log", curves={"norm": "grad_norm"}),
            Plot(title="Learning rate", unit="", kind="zero", curves={"rate": "learning_rate"}),
            Plot(
                title="Clipped tokens",
                unit="share of loss tokens",
                kind="zero",
                curves={"at the lower end": "clip_low_share", "at the upper end": "clip_high_share"},
            ),
            Plot(
                title="Importance ratio",
                unit="",
                kind="log",
                curves={"mean": "ratio_mean", "smallest": "ratio_min", "largest": "ratio_max"},
            ),
            Plot(title="Load balance loss", unit="1 is balanced", curves={"loss": "load_balance_loss"}),
            Plot(title="Router z-loss", unit="", curves={"loss": "z_loss"}),
            Plot(
                title="Skipped steps and alarms",
                unit="per step",
                kind="zero",
                curves={"skipped": "num_skipped_steps", "alarms": "num_alarms"},
            ),
        ),
    ),
    Section(
        title="Server against trainer",
        text="Log-probs of the same tokens from the server that sampled and from the trainer. Look here first when a "
        "run misbehaves: a step up is other weights, another model or too little precision.",
        plots=(
            Plot(
                title="Difference in log-prob",
                unit="nats",
                kind="log",
                curves={
                    "mean": "logprob_difference_mean",
                    "99.9th percentile": "logprob_difference_p999",
                    "largest": "logprob_difference_max",
                },
            ),
        ),
    ),
    Section(
        title="Time",
        text="Where a step spends its seconds, and what comes out of them.",
        plots=(
            Plot(
                title="Seconds per step by phase",
                unit="seconds",
                kind="stack",
                curves={
                    "rollout": "rollout_seconds",
                    "train": "train_seconds",
                    "weights": "update_weights_seconds",
                    "offload": "offload_seconds",
                    "reload": "reload_seconds",
                    "plan": "plan_seconds",
                    "validation": "validation_seconds",
                    "rest": "rest_seconds",
                },
            ),
            Plot(
                title="Seconds of weights and servers",
                unit="seconds",
                kind="stack",
                curves={
                    "gather and export": "export_seconds",
                    "send": "send_seconds",
                    "install": "install_seconds",
                    "servers take memory": "resume_seconds",
                    "servers release memory": "release_seconds",
                },
                note="What runs beside something else counts where it had to be waited for.",
            ),
            Plot(
                title="Seconds per step",
                unit="seconds",
                kind="zero",
                curves={"step": "step_seconds", "only rewards": "reward_wait_seconds"},
                note="Only rewards: the part in which nothing was sampled, and rewards were waited for.",
            ),
            Plot(
                title="Throughput",
                unit="tokens per second",
                kind="zero",
                curves={
                    "generated, in rollout": "generated_tokens_per_second",
                    "trained, in train": "trained_tokens_per_second",
                    "generated, end to end": "end_to_end_tokens_per_second",
                },
            ),
            Plot(
                title="Memory",
                unit="GiB at most, of rank 0's GPU",
                kind="zero",
                curves={"training": "peak_memory_gb"},
                note="The log has what was planned, at its start.",
            ),
            Plot(title="Padding", unit="share of trained tokens", kind="zero", curves={"padding": "padding_share"}),
            Plot(
                title="Imbalance of micro-batches",
                unit="1 is perfect",
                curves={"slowest rank against the mean": "micro_batch_imbalance"},
            ),
            Plot(
                title="Rank 0's event loop",
                unit="s at most that it was late",
                kind="zero",
                curves={"lag": "event_loop_lag_seconds"},
                note="Silence of servers is not counted for that long.",
            ),
            Plot(
                title="Faults survived",
                unit="per step",
                kind="zero",
                curves={
                    "responses sampled again": "num_resent_samples",
                    "servers lost": "num_lost_servers",
                    "failed saves": "num_failed_saves",
                },
            ),
        ),
    ),
)
# Metrics that are drawn under other names, or repeat another one.
_NOT_ALONE = {"num_loss_tokens_by_step"}


def sections_for(present: Collection[str], zero: Collection[str]) -> list[dict[str, Any]]:
    """Return the sections as the page draws them, with the plots that have something to show.

    present: metrics of any run. zero: those of them that are 0 throughout, which most plots do not draw: they are
    listed.
    """
    found: list[dict[str, Any]] = []
    drawn = set(_NOT_ALONE)
    for section in SECTIONS:
        plots, silent = [], []
        for plot in section.plots:
            named = _resolved(plot.curves, present)
            drawn |= set(named.values())
            shown = {label: name for label, name in named.items() if plot.always or name not in zero}
            silent += [name for name in named.values() if name not in shown.values()]
            if shown:
                plots.append(_as_json(plot, shown))
        if plots:
            found.append({"title": section.title, "text": section.text, "plots": plots, "zero": silent})
    if others := [name for name in sorted(present) if name not in drawn and name not in zero]:
        plots = [_as_json(Plot(title=name, unit="", curves={}), {name: name}) for name in others]
        text = "What metrics.jsonl has besides."
        found.append({"title": "Everything else", "text": text, "plots": plots, "zero": [], "closed": True})
    return found


def _resolved(curves: dict[str, str], present: Collection[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for label, metric in curves.items():
        if metric.endswith("/*"):
            named |= {name.split("/", 1)[1]: name for name in sorted(present) if name.startswith(metric[:-1])}
        elif metric in present:
            named[label] = metric
    return named


def _as_json(plot: Plot, curves: dict[str, str]) -> dict[str, Any]:
    listed = [{"label": label, "metric": metric} for label, metric in curves.items()]
    return {"title": plot.title, "unit": plot.unit, "note": plot.note, "kind": plot.kind, "curves": listed}
