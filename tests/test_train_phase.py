"""Tests the outcome of every sample of a rollout phase, and the metrics of the phase."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from samples import make_sample, make_schedule

from megatron_rl.c3po.packing import CostModel
from megatron_rl.data.prompts import Prompt
from megatron_rl.errors import Fault
from megatron_rl.records import Group, UnfinishedGroup
from megatron_rl.rollout.sampler import Collected
from megatron_rl.train.orchestrator.phase_metrics import Phase

COST = CostModel(linear=1.0, quadratic=0.0)


def group(prompt_id: int, lengths: list[int], rewards: list[float]) -> Group:
    samples = (make_sample(prompt_id, i, n, reward=r) for i, (n, r) in enumerate(zip(lengths, rewards, strict=True)))
    return Group(prompt_id=prompt_id, samples=tuple(samples))


def prompt_of(position: int) -> Prompt:
    return Prompt(id=f"prompt-{position}", domain="math" if position % 2 else "code", prompt="?", answer="!")


def make_phase(keep_surplus: bool = True) -> Phase:
    """Make a phase with a budget of 20: a carried sample of 6 tokens, then 14 of the 30 tokens of two new groups."""
    carried = (make_sample(90, 0, 6, version=2, reward=0.0),)
    used = [group(0, [5, 10], [1.0, 0.0]), group(1, [10, 5], [0.0, 1.0])]
    filtered = [group(2, [7, 9], [1.0, 1.0])]
    plan = make_schedule(used, carried, budgets=(20,), keep_surplus=keep_surplus)
    unneeded = [group(3, [4, 4], [1.0, 0.0])]
    ended = replace(make_sample(92, 0, 7).response, finish_reason="stop")
    never_started = replace(make_sample(92, 1, 0).response, finish_reason="")
    purged = UnfinishedGroup(prompt_id=92, responses=(ended, never_started), retention=6)
    collected = Collected(kept=used + unneeded, filtered=filtered, purged=[purged], num_generated_tokens=64)
    return Phase(
        collected=collected,
        unneeded=unneeded,
        stale=[make_sample(91, 0, 8, version=1)],
        schedule=plan,
    )


@pytest.mark.parametrize("keep_surplus", [True, False])
def test_every_sample_has_one_outcome(keep_surplus: bool) -> None:
    phase = make_phase(keep_surplus)
    outcomes = list(phase.outcomes())
    everything = {s.id for g in phase.generated for s in g.samples} | {(90, 0), (91, 0)}
    assert Counter(sample.id for sample, _, _ in outcomes) == Counter(everything)
    assert sum(tokens for _, _, tokens in outcomes) == 20
    kinds = Counter(kind for _, kind, _ in outcomes)
    assert (kinds["dropped: equal rewards"], kinds["dropped: not needed"], kinds["dropped: stale"]) == (2, 2, 1)
    assert kinds["trained"] + kinds["carried" if keep_surplus else "dropped: over the budget"] == 5


def test_metrics_count_what_the_outcomes_say() -> None:
    phase = make_phase()
    metrics = phase.metrics(20, COST, prompt_of)
    # reward and length are those of all that was generated in this phase, filtered groups too, carried samples not
    lengths = [5, 10, 10, 5, 7, 9, 4, 4]
    assert metrics["reward"] == 5 / 8
    assert metrics["response_tokens_mean"] == sum(lengths) / 8
    assert (metrics["num_prompts"], metrics["num_samples"], metrics["num_generated_tokens"]) == (4, 8, 64)
    # prompts 0 and 2 are code, with 1 of 2 and 2 of 2 right; 1 and 3 are math, with 1 of 2 each
    assert (metrics["reward/code"], metrics["reward/math"]) == (3 / 4, 1 / 2)
    assert (metrics["response_tokens_mean/code"], metrics["num_samples/math"]) == ((5 + 10 + 7 + 9) / 4, 4)
    tokens: Counter[str] = Counter()
    for sample, _, num_loss_tokens in phase.outcomes():
        tokens[prompt_of(sample.response.prompt_id).domain] += num_loss_tokens
    assert {"code": metrics["num_loss_tokens/code"], "math": metrics["num_loss_tokens/math"]} == tokens
    assert tokens["code"] >= 6  # the carried response, and 14 tokens more of one of the two or both
    assert metrics["uniform_group_share"] == 1 / 4
    assert (metrics["wrong_share"], metrics["no_answer_share"]) == (3 / 8, 0)
    assert metrics["budget_use"] == 1.0
    assert metrics["num_dropped_equal_rewards"] == metrics["num_dropped_not_needed"] == 2
    assert metrics["num_dropped_stale"] == 1
    assert (metrics["num_dropped_unfinished"], metrics["num_dropped_unfinished_tokens"]) == (2, 7)
    assert metrics["off_policy_token_share"] == 6 / 20
    assert metrics["num_trained_samples"] + metrics["num_carried"] == 5
    outcomes = list(phase.outcomes())
    trained = sum(sample.response.num_policy_tokens for sample, kind, _ in outcomes if kind == "trained")
    assert metrics["num_cut_tokens"] == trained - 20


def test_a_response_that_was_cut_off_is_not_counted_as_trained_where_it_carries_no_loss() -> None:
    samples = [make_sample(0, i, n, reward=float(i == 0)) for i, n in enumerate((5, 10, 10))]
    samples[1:] = [replace(s, response=replace(s.response, finish_reason="length")) for s in samples[1:]]
    used = Group(prompt_id=0, samples=tuple(samples))

    def phase_of(group: Group) -> Phase:
        schedule = make_schedule([group], budgets=(25,), mask_truncated=True)
        return Phase(collected=Collected(kept=[group]), unneeded=(), stale=(), schedule=schedule)

    phase = phase_of(used)
    assert [(outcome, count) for _, outcome, count in phase.outcomes()] == [
        ("trained", 5), ("dropped: truncated", 0), ("dropped: truncated", 0),
    ]  # fmt: skip
    metrics = phase.metrics(25, COST, prompt_of)
    assert (metrics["num_trained_samples"], metrics["num_dropped_truncated"], metrics["budget_use"]) == (1, 2, 0.2)
    assert metrics["truncated_share"] == 2 / 3
    # Nothing may be left of a phase, which is no reason to end a run.
    metrics = phase_of(replace(used, samples=tuple(samples[1:]))).metrics(25, COST, prompt_of)
    names = ("num_trained_samples", "budget_use", "off_policy_token_share")
    assert [metrics[name] for name in (*names, "advantage_mean", "advantage_std", "advantage_max")] == [0.0] * 6


def say(number: int) -> str:
    return f"It is \\boxed{{{number}}}."


def test_the_rollout_file_holds_every_sample() -> None:
    phase = make_phase()
    lines = phase.lines(prompt_of, lambda domain: "exact", lambda ids: say(len(ids)))
    rows = [json.loads(line) for line in lines]
    assert phase.positions == {row["position"] for row in rows}
    assert len(rows) == 12
    assert sum(row.get("num_loss_tokens", 0) for row in rows) == 20
    assert [row["num_tokens"] for row in rows if row["outcome"] == "dropped: kept for too long"] == [7, 0]
    (carried,) = (row for row in rows if row["position"] == 90)
    assert (carried["prompt_id"], carried["policy_versions"], carried["reason"]) == ("prompt-90", {"2": 6}, "wrong")
    assert (carried["outcome"], carried["num_loss_tokens"], carried["response"]) == ("trained", 6, say(6))
    assert {row["expected"] for row in rows} == {"!"}
    assert all(row["extracted"] == str(row["num_tokens"]) for row in rows)


def test_examples_are_of_two_failures_or_of_two_prompts() -> None:
    def told(reasons: list[str]) -> list[str]:
        phase = phase_with_reasons(reasons)
        return phase.examples(prompt_of, lambda domain: "exact", lambda ids: "x" * 500 + say(len(ids)))

    most, other = told(["no_answer"] * 9)  # and four that are wrong
    assert most.startswith(
        "prompt prompt-5, reward 0 (no_answer): expected '!', extracted '3', the response ends ...'xx"
    )
    assert most.endswith("It is \\\\boxed{3}.'")
    assert "prompt-5" not in other
    assert "reward 0 (wrong): expected '!'" in other
    first, second = told([])  # of groups 0 and 1 the wrong ones: two prompts
    assert ("prompt-0" in first, "prompt-1" in second) == (True, True)
    assert max(map(len, (first, second))) < 400


def phase_with_reasons(reasons: list[str]) -> Phase:
    """Return make_phase's phase with one more group, whose samples have these reasons: 8 + n responses."""
    phase = make_phase()
    judged = group(5, [3] * len(reasons), [0.0] * len(reasons))
    samples = tuple(replace(s, reason=reason) for s, reason in zip(judged.samples, reasons, strict=True))
    phase.collected.filtered.append(replace(judged, samples=samples))
    return phase


@pytest.mark.parametrize(
    ("finish_reason", "reason", "remedy"),
    [
        ("seconds", "timeout", "Raise rollout.agent_seconds, or let the agent do less; agent_output.log has"),
        ("failed", "error", "Mend the agent; agent_output.log has"),
        ("stop", "timeout", "Raise reward.timeout_seconds"),  # of the reward, which judges what an agent has said
    ],
)
def test_the_remedy_is_for_what_most_of_the_failed_suffer_from(finish_reason: str, reason: str, remedy: str) -> None:
    phase = phase_with_reasons([])
    judged = group(5, [3] * 92, [0.0] * 92)
    ways = [("stop", "error", "rare")] * 4 + [(finish_reason, reason, "first")] * 20 + [("stop", "error", "other")] * 5
    ways += [("stop", "wrong", "")] * 63
    samples = tuple(
        replace(sample, response=replace(sample.response, finish_reason=finish), reason=why, details=details)
        for sample, (finish, why, details) in zip(judged.samples, ways, strict=True)
    )
    phase.collected.filtered.append(replace(judged, samples=samples))
    with pytest.raises(Fault) as caught:
        phase.check_rewards(0.2, prompt_of, lambda ids: "the end")
    message = str(caught.value)
    assert remedy in message
    # Each example says something else, and what most of them say comes first.
    assert re.findall(r"prompt-5 \((\w+)\)", message) == ["first", "other", "rare"]


def test_many_responses_without_a_verdict_stop_the_run_and_few_do_not() -> None:
    def check(reasons: list[str], share: float) -> None:
        phase_with_reasons(reasons).check_rewards(share, prompt_of, lambda ids: "the end")

    check(["wrong"] * 92, 0.2)
    check(["timeout"] * 20 + ["wrong"] * 72, 0.2)  # 20 of 100 are not more than that share
    check(["error"] * 7, 0.2)  # 7 of 15 are, but they are few
    check(["error"] * 50, 1.0)
    with pytest.raises(Fault) as caught:
        check(["timeout"] * 20 + ["error"] + ["wrong"] * 71, 0.2)
    message = str(caught.value)
    assert "21 of 100 responses could not be judged (20 timeouts, 1 errors), a share of 0.21" in message
    assert "reward.max_error_share = 0.2" in message
    assert "prompt-5 (timeout): ...'the end'" in message
    assert "Raise reward.timeout_seconds" in message
    with pytest.raises(Fault, match="Mend the function or the reference answers.*, and go on with --resume"):
        check(["error"] * 30 + ["wrong"] * 62, 0.2)
