"""Tests trajectories of agents, of many turns in one or more segments: exactly the policy's tokens are trained,
once."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_sample, make_schedule, make_segment, make_trajectory

from megatron_rl.c3po.algorithms import ALGORITHMS
from megatron_rl.c3po.packing import CostModel
from megatron_rl.c3po.plan import Schedule
from megatron_rl.data.prompts import Prompt
from megatron_rl.records import Group, Response, Sample, Segment
from megatron_rl.rollout.archive import Carry, pack_carry, unpack_carry
from megatron_rl.rollout.rollout_file import RowLimits, check_rows, group_rows, read_groups, text_of
from megatron_rl.rollout.sampler import Collected
from megatron_rl.train.orchestrator.commands import _gather, _routing, _sequences
from megatron_rl.train.orchestrator.phase_metrics import Phase
from megatron_rl.train.step.batch import TrainSequence
from megatron_rl.train.step.token_traces import lines

BUDGETS = (30, 20)
CAP = 48
# A segment: how many tokens others wrote before each turn, and how many the policy sampled in it; None for a plain one.
TURNS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=3)
SEGMENTS = st.tuples(st.integers(1, 6), st.integers(1, 12) | TURNS)
ONE_TURN = st.tuples(st.integers(1, 6), st.integers(1, 30)).map(lambda segment: [segment])
RESPONSES = ONE_TURN | st.lists(SEGMENTS, max_size=3)
Made = list[tuple[int, int | list[tuple[int, int]]]]


def segment_of(made: tuple[int, int | list[tuple[int, int]]], version: int, ids: Iterator[int]) -> Segment:
    """Make a segment whose policy tokens have ids of their own, and minus the ids as log-probs. Others have 0."""
    num_prompt, of_turns = made
    if isinstance(of_turns, int):
        segment = make_segment(of_turns, version, num_prompt_tokens=num_prompt)
    else:
        spans, end = [], 0
        for others, sampled in of_turns:
            spans.append((end + others, end + others + sampled))
            end += others + sampled
        segment = make_segment(end + 2, version, spans, num_prompt)
    own = np.array([next(ids) for _ in range(segment.num_policy_tokens)], np.int32)
    output_ids = np.zeros(len(segment.output_ids), np.int32)
    output_ids[segment.policy_mask] = own
    return replace(
        segment, prompt_ids=0 * segment.prompt_ids, output_ids=output_ids, rollout_logprobs=-own.astype(np.float32)
    )


def policy_tokens(response: Response) -> list[int]:
    return (-response.rollout_logprobs).astype(int).tolist()


def trained_sequences(schedule: Schedule) -> list[list[TrainSequence]]:
    """Return what both data-parallel ranks train in each optimizer step, sent as rank 0 sends it."""
    plan = schedule.plan
    routing = _routing(plan, schedule.samples)
    work = [_sequences(plan, r, routing, _gather(plan, schedule.samples, r, routing)) for r in range(2)]
    for step in (step for rank in work for step in rank):
        for micro_batch in step:  # all tokens take room, whoever wrote them
            assert sum(len(sequence.token_ids) for sequence in micro_batch) <= CAP
    return [
        [sequence for rank in work for micro_batch in rank[number] for sequence in micro_batch]
        for number in range(len(plan.steps))
    ]


@settings(deadline=None, max_examples=200)
@given(
    phases=st.lists(st.lists(st.lists(RESPONSES, min_size=2, max_size=3), max_size=5), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_over_phases_every_policy_token_is_trained_once_or_accounted_for_and_no_other_one_is(
    phases: list[list[list[Made]]], seed: int
) -> None:
    ids, positions = count(1), count()
    carried: tuple[Sample, ...] = ()
    seen: Counter[int] = Counter()
    for made in phases:
        groups = [
            Group(
                prompt_id=position,
                samples=tuple(
                    replace(
                        make_trajectory(
                            position, i, [segment_of(segment, 3 if position % 2 else 1, ids) for segment in response]
                        ),
                        advantage=position + i / 8,
                    )
                    for i, response in enumerate(responses)
                ),
            )
            for position, responses in zip(positions, made, strict=False)
        ]
        schedule = make_schedule(groups, carried, seed=seed, budgets=BUDGETS, token_cap=CAP)
        here = {s.id: s for s in schedule.samples}
        left = sum(sample.response.num_policy_tokens for sample in here.values())
        trained: Counter[tuple[int, int]] = Counter()
        for budget, step, sequences in zip(BUDGETS, schedule.plan.steps, trained_sequences(schedule), strict=True):
            tokens = [int(t) for s in sequences for t in s.token_ids[s.loss_positions]]
            assert 0 not in tokens
            seen.update(tokens)
            for sequence in sequences:
                own = sequence.token_ids[sequence.loss_positions]
                assert (sequence.rollout_logprobs == -own).all()
                assert len(sequence.token_ids) == sequence.loss_positions[-1] + 1  # nothing behind the last one
                rest = np.delete(sequence.token_ids, sequence.loss_positions)
                assert (rest == 0).all(), "a policy token of this segment has no loss"
                (sample,) = (s for s in here.values() if (sequence.advantages == s.advantage).all())
                trained[sample.id] += len(own)
                is_stale = step is not schedule.plan.steps[0] or sample.response.prompt_id % 2 == 0
                assert sequence.num_stale_tokens == is_stale * len(own)
            assert len(tokens) == step.num_loss_tokens <= budget
        num_cut = sum(here[place].response.num_policy_tokens - number for place, number in trained.items())
        num_carried = sum(sample.response.num_policy_tokens for sample in schedule.carried)
        assert schedule.plan.steps[0].num_loss_tokens == min(BUDGETS[0], left)
        assert sum(trained.values()) == left - schedule.num_cut_tokens - num_carried
        assert num_cut == schedule.num_cut_tokens
        if schedule.carried:
            assert sum(trained.values()) == sum(BUDGETS)
        # The trained tokens of a trajectory are its first, over its segments.
        for place, number in trained.items():
            own = policy_tokens(here[place].response)
            assert all(seen[token] == 1 for token in own[:number])
            assert all(seen[token] == 0 for token in own[number:])
        kept = {sample.id for sample in schedule.carried}
        empty = {place for place, sample in here.items() if not sample.response.num_policy_tokens}
        assert trained.keys() | kept | empty == here.keys()
        assert len(trained) + len(kept) + len(empty) == len(here)
        carry = unpack_carry(pack_carry(Carry(samples=schedule.carried, since=(0,) * len(schedule.carried))))
        carried = carry.samples
    assert set(seen.values()) <= {1}


@settings(deadline=None)
@given(made=st.lists(RESPONSES, min_size=2, max_size=8), name=st.sampled_from(["grpo", "gspo", "dr_grpo", "dapo"]))
def test_without_a_budget_all_policy_tokens_are_trained_and_a_trajectory_counts_as_one_response(
    made: list[Made], name: str
) -> None:
    ids = count(1)
    samples = [make_trajectory(0, i, [segment_of(s, 3, ids) for s in response]) for i, response in enumerate(made)]
    schedule = make_schedule(
        [Group(prompt_id=0, samples=tuple(samples))], algorithm=ALGORITHMS[name], keep_surplus=False, token_cap=CAP
    )
    (step,), (sequences,) = schedule.plan.steps, trained_sequences(schedule)
    tokens = sorted(int(t) for s in sequences for t in s.token_ids[s.loss_positions])
    assert tokens == list(range(1, next(ids)))
    policy = [s.response for s in samples if s.response.num_policy_tokens]
    denominators = {"dr_grpo": 32 * len(policy), "dapo": len(tokens)}
    assert step.denominator == max(1, denominators.get(name, len(policy)))
    for index, sample in enumerate(schedule.samples):
        parts = [s for s in step.selected if s.index == index]
        lengths = [segment.num_policy_tokens for segment in sample.response.segments]
        assert [s.num_loss_tokens for s in parts] == [n for n in lengths if n]
        if name in ("grpo", "gspo"):  # each segment's mean has its share of the trajectory's one
            assert [s.loss_scale * s.num_loss_tokens for s in parts] == pytest.approx(
                [1 / max(1, len(parts))] * len(parts)
            )
        else:
            assert {s.loss_scale for s in parts} <= {1.0}


def two_segments(index: int = 0, reward: float = 1.0) -> Sample:
    """Make a sample of nine policy tokens: turns of 2 and 3 between others' tokens, then a new prompt and a turn of
    4."""
    first = segment_of((3, [(1, 2), (2, 3)]), 3, count(11))
    second = replace(segment_of((9, 4), 3, count(21)), prompt_ids=np.array([0, 0, 0, 0, 11, 12, 7, 8, 9], np.int32))
    sample = make_trajectory(5, index, [first, second], reward)
    return replace(sample, response=replace(sample.response, finish_reason="turns", text="judged"))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1, [(0, 5, 1)]), (2, [(0, 6, 2)]), (3, [(0, 9, 3)]), (5, [(0, 11, 5)]), (6, [(0, 11, 5), (1, 10, 1)])],
)
def test_a_cut_counts_policy_tokens_and_ends_the_sequence_at_the_last_of_them(
    budget: int, expected: list[tuple[int, int, int]]
) -> None:
    (step,) = make_schedule([Group(prompt_id=5, samples=(two_segments(),))], budgets=(budget,)).plan.steps
    assert [(s.segment, s.num_tokens, s.num_loss_tokens) for s in step.selected] == expected
    assert step.num_loss_tokens == budget


def test_the_traced_tokens_of_a_trajectory_are_counted_over_its_segments() -> None:
    schedule = make_schedule([Group(prompt_id=5, samples=(two_segments(),))], budgets=(6,))
    schedule = replace(schedule, plan=replace(schedule.plan, traced=(0,)))
    (sequences,) = trained_sequences(schedule)
    assert sorted((s.traced_as, s.traced_from, len(s.loss_positions)) for s in sequences) == [(0, 0, 5), (0, 5, 1)]


# Files --------------------------------------------------------------------------------------------------------------


def test_an_archive_of_before_is_read_and_plain_responses_are_written_as_then() -> None:
    before = {
        "table": np.array([[7, 1, 2, 3, -1], [8, 0, 1, 2, 2]], np.int64),
        "prompt_ids": np.array([1, 2, 3], np.int32),
        "output_ids": np.array([4, 5, 6, 7, 8], np.int32),
        "rollout_logprobs": np.array([-1, -2, -3, -4, -5], np.float32),
        "policy_versions": np.array([0, 0, 1, 2, 2], np.int32),
        "finish_reasons": np.array(["stop", "length"], np.str_),
        "routed_experts": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
        "scores": np.array([[1.0, 0.5], [0.0, -0.5]], np.float64),
        "since": np.array([3, 4], np.int64),
        "reasons": np.array(["correct", "wrong"], np.str_),
        "details": np.frombuffer(b'["", "why"]', np.uint8),
        "parts": np.frombuffer(b'[{}, {"code": 0.5}]', np.uint8),
        "groups": np.zeros((0, 3), np.int64),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **before)
    carry = unpack_carry(buffer.getvalue())
    first, second = (sample.response.segments for sample in carry.samples)
    assert [s.output_ids.tolist() for s in (*first, *second)] == [[4, 5, 6], [7, 8]]
    assert [s.turns for s in (*first, *second)] == [None, None]
    assert (first[0].routed_experts, second[0].routed_experts.shape) == (None, (2, 2, 2))
    assert [sample.id for sample in carry.samples] == [(7, 1), (8, 0)]
    assert pack_carry(carry) == buffer.getvalue()


def prompt(position: int) -> Prompt:
    return Prompt(id=f"name-{position}", domain="math", prompt="what?", answer="7")


def spoken(ids: Sequence[int]) -> str:
    return "".join(f"<{token}>" for token in ids)


def rows_of(group: Group) -> list[dict]:
    return [json.loads(line) for line in group_rows(group, prompt(5), "math", spoken).splitlines()]


LIMITS = RowLimits(vocab_size=30, max_prompt_tokens=4, max_response_tokens=9, max_sequence_tokens=13)


def read(path: Path, rows: Sequence[dict]) -> list[Group]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_rows(path, LIMITS)
    return read_groups(path, lambda _, rewards: rewards - rewards.mean(), LIMITS)[0]


def test_trajectories_come_back_from_a_file_of_rollouts_beside_plain_responses(tmp_path: Path) -> None:
    nothing = make_trajectory(5, 2, [], 0.0)
    samples = (two_segments(), make_sample(5, 1, 3, reward=0.0), nothing)
    rows = rows_of(Group(prompt_id=5, samples=samples))
    assert [row["response"] for row in rows] == ["judged", "<0><1><2>", ""]
    assert "segments" not in rows[1]
    first, second = rows[0]["segments"]
    texts = ["<0>", "<11><12>", "<0><0>", "<13><14><15>", "<0><0>"]
    assert first["spans"] == [[text, text in (texts[1], texts[3])] for text in texts]
    assert first["turns"] == [[1, 3], [5, 8]]
    # The second prompt goes on as the first segment did for a while.
    assert (second["shared_tokens"], second["prompt"]) == (6, "<7><8><9>")
    assert (rows[0]["num_turns"], rows[0]["num_masked_tokens"]) == (3, 5)
    (group,) = read(tmp_path / "file", rows)
    for found, expected in zip(group.samples, samples, strict=True):
        pairs = zip(found.response.segments, expected.response.segments, strict=True)
        for one, other in pairs:
            for name in ("prompt_ids", "output_ids", "rollout_logprobs", "policy_versions", "policy_mask"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert [sample.advantage for sample in group.samples] == pytest.approx([2 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": []}, r"line 1: segments\[0\]: turns must be a list of \[start, stop\] and not empty, got \[\]"),
        ({"turns": [[1, 3], [2, 8]]}, r"turns\[1\] must be \[start, stop\] with 3 <= start < stop <= 10, got \[2, 8\]"),
        ({"turns": [[1, 1]]}, r"turns\[0\] must be .* got \[1, 1\]"),
        ({"turns": [[1, 11]]}, r"turns\[0\] must be .* got \[1, 11\]"),
        ({"turns": [[1, 3.0]]}, r"turns\[0\] must be .* got \[1, 3.0\]"),
        ({"turns": [[1, 3]]}, r"it has 2 policy tokens and 5 rollout_logprobs; they must be equally many"),
        ({"prompt_token_ids": [1] * 4}, r"it has 14 tokens, more than rollout.max_prompt_tokens \+ .* 13; raise"),
        (
            {"turns": [[0, 6]], "rollout_logprobs": [-1] * 6},
            r"sampled 10 tokens of it, more than .*max_response_tokens 9",
        ),
    ],
)
def test_a_wrong_segment_of_a_row_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    rows = rows_of(Group(prompt_id=5, samples=(two_segments(),)))
    rows[0]["segments"][0] |= change
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "file", rows)


def test_a_trajectory_that_nobody_has_decoded_says_its_last_turn() -> None:
    response = replace(two_segments().response, text=None)
    assert text_of(response, spoken) == "<21><22><23><24>"
    assert text_of(replace(response, segments=response.segments[:1]), spoken) == "<13><14><15>"


def test_a_trace_has_all_tokens_and_numbers_of_the_policys_alone() -> None:
    schedule = make_schedule([Group(prompt_id=5, samples=(two_segments(),))], budgets=(6,))
    schedule = replace(schedule, plan=replace(schedule.plan, traced=(0,)))
    (row,) = map(json.loads, lines(schedule, [{0: -np.arange(6.0)}], spoken))
    assert row["tokens"] == [f"<{t}>" for t in (0, 11, 12, 0, 0, 13, 14, 15, 0, 0, 21, 22, 23, 24)]
    own = [None, -11, -12, None, None, -13, -14, -15, None, None, -21, -22, -23, -24]
    assert row["rollout_logprobs"] == own
    assert row["train_logprobs"] == [None, 0, -1, None, None, -2, -3, -4, None, None, -5, None, None, None]
    assert row["policy_versions"] == [[None, 1], [3, 2], [None, 2], [3, 3], [None, 2], [3, 4]]
    assert row["segments"] == [0, 10]


def test_a_phase_tells_trajectories_from_other_responses() -> None:
    group = Group(
        prompt_id=5, samples=(two_segments(), make_sample(5, 1, 6, reward=0.0), make_trajectory(5, 2, [], 0.0))
    )
    schedule = make_schedule([group], budgets=(40,))
    phase = Phase(collected=Collected(kept=[group], num_generated_tokens=15), unneeded=(), stale=(), schedule=schedule)
    metrics = phase.metrics(40, CostModel(linear=1.0, quadratic=0.0), prompt)
    told = ("turns_mean", "segments_mean", "masked_token_share", "no_token_share")
    assert [metrics[name] for name in told] == [4 / 3, 1.0, 5 / 20, 1 / 3]
    assert (metrics["num_trained_samples"], metrics["budget_use"], metrics["response_tokens_mean"]) == (2, 15 / 40, 5.0)
    assert Counter(kind for _, kind, _ in phase.outcomes()) == {"trained": 2, "dropped: no tokens": 1}
    rows = [json.loads(line) for line in phase.lines(prompt, lambda _: "math", spoken)]
    assert [(row["num_tokens"], row["num_loss_tokens"]) for row in rows] == [(9, 9), (6, 6), (0, 0)]
    assert [row["prompt"] for row in rows] == ["<0><0><0>", "<0><1><2><3>", "what?"]
    assert ["segments" in row for row in rows] == [True, False, True]
    # As before where no response is a trajectory.
    plain = Group(prompt_id=5, samples=(make_sample(5, 0, 6), make_sample(5, 1, 6)))
    phase = replace(phase, collected=Collected(kept=[plain]), schedule=make_schedule([plain], budgets=(12,)))
    assert not set(told) & phase.metrics(12, CostModel(linear=1.0, quadratic=0.0), prompt).keys()
