"""Tests on-policy distillation: a teacher's log-probs of the sampled tokens as advantages, in metrics and in files."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rank_zero import FakeGroups, config_of
from samples import make_segment, make_trajectory

from megatron_rl.c3po.packing import CostModel
from megatron_rl.config.layout import Layout
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.preflight import teacher as checks
from megatron_rl.preflight.teacher import template_problems, vocabulary_problems
from megatron_rl.records import Group, Response, Sample
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.client import Completion, GenerationClient, ServerLost
from megatron_rl.rollout.journal import Journal
from megatron_rl.rollout.sampler import Question, Sampler
from megatron_rl.train.orchestrator.collector import Collector
from megatron_rl.train.orchestrator.commands import _gather, _sequences
from megatron_rl.train.orchestrator.phase_metrics import Phase
from megatron_rl.train.step.token_traces import lines

COST = CostModel(linear=1.0, quadratic=0.0)
TEACHER = 'distillation.path="teacher"'


def scored(group: Group) -> Group:
    """Return the group with log-probs of sampler and teacher that depend on prompt, response and position."""

    def of_sample(sample: Sample) -> Sample:
        (segment,) = sample.response.segments
        number = np.arange(segment.num_policy_tokens) + 100 * group.prompt_id + 50 * sample.response.sample_index
        own, teacher = -(number % 13) / 16, -(number % 7) / 8
        segment = replace(segment, rollout_logprobs=own.astype(np.float32), teacher_logprobs=teacher.astype(np.float32))
        return replace(sample, response=replace(sample.response, segments=(segment,)))

    return replace(group, samples=tuple(map(of_sample, group.samples)))


class Source(FakeGroups):
    """Gives prompts of two domains by turns. rewards: whether the rewards of a prompt differ."""

    def __init__(self, rewards: bool = True, teacher: bool = True) -> None:
        super().__init__(length=30)
        self._rewards, self._teacher = rewards, teacher

    def groups(self, *arguments: Any) -> Any:
        found = super().groups(*arguments)
        if self._teacher:
            found.kept = [scored(group) for group in found.kept]
        if not self._rewards:
            found.kept = [
                replace(g, samples=tuple(replace(s, reward=1.0, advantage=0.0) for s in g.samples)) for g in found.kept
            ]
        return found

    def prompt_of(self, position: int) -> Prompt:
        return replace(super().prompt_of(position), domain=("math", "code")[position % 2])


def collected(folder: Path, source: Source, *changes: str, step: int = 0) -> tuple[Any, dict[str, Any]]:
    """Collect a phase and return its schedule and its metrics."""
    folder.mkdir()
    return Collector(config_of(folder, *changes), Layout(world_size=1), COST, source).collect(step)


def trained(schedule: Any) -> list[tuple[list[int], np.ndarray, float]]:
    """Return what the only rank trains: tokens, advantages and weight of each sequence, in order."""
    plan = schedule.plan
    work = _sequences(plan, 0, None, _gather(plan, schedule.samples, 0, None))
    return [(s.token_ids.tolist(), s.advantages, s.weight) for step in work for part in step for s in part]


def test_a_token_has_the_advantage_of_its_response_and_what_the_teacher_adds() -> None:
    segments = [make_segment(5, turns=[(0, 2), (4, 5)]), make_segment(2)]
    own, teacher = np.array([-1.0, -2.0, -0.5, -4.0, -1.5]), np.array([-0.25, -2.5, -0.5, -3.0, -1.0])
    segments = [
        replace(s, rollout_logprobs=own[at].astype(np.float32), teacher_logprobs=teacher[at].astype(np.float32))
        for s, at in zip(segments, (slice(0, 3), slice(3, 5)), strict=True)
    ]
    sample = replace(make_trajectory(0, 0, segments), advantage=0.5, teacher_coefficient=2.0)
    assert sample.token_advantages(0).tolist() == [0.5 + 1.5, 0.5 - 1.0, 0.5]
    assert sample.token_advantages(1).tolist() == [0.5 + 2.0, 0.5 + 1.0]


def test_without_a_coefficient_it_is_reinforcement_learning_to_the_bit(tmp_path: Path) -> None:
    plain, _ = collected(tmp_path / "a", Source(teacher=False))
    found, metrics = collected(tmp_path / "b", Source(), TEACHER, "distillation.coefficient=0")
    assert found.plan == plain.plan
    for (tokens, advantages, weight), expected in zip(trained(found), trained(plain), strict=True):
        assert (tokens, weight) == (expected[0], expected[2])
        assert advantages.tobytes() == expected[1].tobytes()
    assert metrics["teacher_kl"] != 0  # it is watched all the same


def test_where_rewards_are_all_equal_it_is_distillation_alone(tmp_path: Path) -> None:
    added, _ = collected(tmp_path / "a", Source(rewards=False), TEACHER)
    alone, _ = collected(tmp_path / "b", Source(rewards=False), TEACHER, "distillation.advantage=alone")
    assert added.plan == alone.plan
    gaps = {s.id: s.response.teacher_logprobs.astype(float) - s.response.rollout_logprobs for s in added.samples}
    for one, other in zip(trained(added), trained(alone), strict=True):
        assert one[1].tobytes() == other[1].tobytes()
    found = np.sort(np.concatenate([one[1] for one in trained(added)]))
    expected = [gaps[added.samples[s.index].id][: s.num_loss_tokens] for s in added.plan.steps[0].selected]
    assert found.tolist() == np.sort(np.concatenate(expected)).tolist()


def test_the_budget_is_exact_and_what_is_carried_is_weighed_anew_by_step_and_domain(tmp_path: Path) -> None:
    changes = (TEACHER, "distillation.coefficient=2", "distillation.final_coefficient=1", "distillation.final_step=4")
    config = config_of(tmp_path, *changes, "distillation.domains={code=0.5}", "budget.cut=response")
    source = Source()
    collector = Collector(config, Layout(world_size=1), COST, source)
    first, metrics = collector.collect(0)
    assert metrics["teacher_coefficient"] == 2.0
    assert [step.num_loss_tokens for step in first.plan.steps] == [210]  # whole responses of 30
    assert {s.id: s.teacher_coefficient for s in first.samples} == {
        s.id: (2.0, 1.0)[s.response.prompt_id % 2] for s in first.samples
    }
    assert len(first.carried) == 1
    state, carried = collector.state()
    again = Collector(config, Layout(world_size=1), COST, source)
    again.restore(json.loads(json.dumps(state)), carried)
    second, metrics = again.collect(1)
    assert metrics["teacher_coefficient"] == 1.75
    (kept,) = (s for s in second.samples if s.id == first.carried[0].id)
    assert kept.teacher_coefficient == 1.75 * (1.0, 0.5)[kept.response.prompt_id % 2]
    assert kept.response.teacher_logprobs.tobytes() == first.carried[0].response.teacher_logprobs.tobytes()
    exact, _ = collected(tmp_path / "exact", Source(), TEACHER)
    assert [step.num_loss_tokens for step in exact.plan.steps] == [200]
    assert sum(len(one[1]) for one in trained(exact)) == 200


@pytest.fixture(autouse=True)
def teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a teacher's path stand for all of its settings."""
    monkeypatch.setattr(
        "megatron_rl.train.orchestrator.collector.teacher_settings", lambda section: section and str(section.path)
    )


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((), (TEACHER,)),
        ((TEACHER,), ('distillation.path="other"',)),
        ((TEACHER, "distillation.advantage=alone"), (TEACHER,)),
        ((TEACHER, "distillation.advantage=alone"), ()),
    ],
)
def test_what_has_other_advantages_is_not_carried_over(
    first: Sequence[str], then: Sequence[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(teacher=bool(first))
    before = Collector(config_of(tmp_path, "budget.cut=response", *first), Layout(world_size=1), COST, source)
    before.collect(0)
    state, carried = before.state()
    config = config_of(tmp_path, "budget.cut=response", *then)
    after = Collector(config, Layout(world_size=1), COST, Source(teacher=bool(then)))
    after.restore(json.loads(json.dumps(state)), carried)
    assert "1 responses that the checkpoint carries are dropped" in caplog.text
    plan, _ = after.collect(1)
    assert plan.plan.steps[0].num_loss_tokens == 210


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("rollout.temperature=0.7",), "log-probs are those at temperature 1.*set rollout.temperature = 1"),
        (("distillation.final_step=3",), "set both, or leave both out"),
        (("distillation.coefficient=-1",), "greater than or equal to 0"),
        (('rollout.urls=["http://a:1"]', 'distillation.urls=["http://a:1"]'), "servers of its own"),
        (("distillation.api_key_variable=KEY",), "distillation.urls is empty"),
        (("rollout.samples_per_prompt=1",), "a group of one has no advantage"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: Sequence[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        config_of(tmp_path, TEACHER, *changes)


def test_a_teacher_alone_teaches_groups_of_one(tmp_path: Path) -> None:
    config_of(tmp_path, TEACHER, "distillation.advantage=alone", "rollout.samples_per_prompt=1")


def test_metrics_and_files_say_where_the_teacher_disagrees(tmp_path: Path) -> None:
    schedule, metrics = collected(tmp_path / "a", Source(), TEACHER, "distillation.coefficient=0.5")
    tokens = [
        (position, place, float(own) - float(teacher))
        for sample in schedule.samples
        for position, response in [(sample.response.prompt_id, sample.response)]
        for place, (own, teacher) in enumerate(zip(response.rollout_logprobs, response.teacher_logprobs, strict=True))
    ]

    def mean(gaps: list[float]) -> float:
        return sum(gaps) / len(gaps)

    assert metrics["teacher_kl"] == pytest.approx(mean([gap for _, _, gap in tokens]))
    assert metrics["teacher_kl/math"] == pytest.approx(mean([gap for at, _, gap in tokens if at % 2 == 0]))
    assert metrics["teacher_kl_from/0"] == pytest.approx(mean([gap for _, place, gap in tokens if place < 16]))
    assert metrics["teacher_kl_from/16"] == pytest.approx(mean([gap for _, place, gap in tokens if place >= 16]))
    assert "teacher_kl_from/64" not in metrics
    assert metrics["teacher_kl_max"] == max(gap for _, _, gap in tokens)
    assert metrics["teacher_disagreement_share"] == mean([gap >= 1 for _, _, gap in tokens])
    assert metrics["teacher_advantage_std"] > 0
    rows = [json.loads(line) for line in Phase.lines(_phase_of(schedule), Source().prompt_of, lambda d: "exact", str)]
    (row,) = (row for row in rows if (row["position"], row["sample_index"]) == (1, 1))
    gaps = [gap for at, _, gap in tokens if at == 1][30:]
    assert row["teacher_kl"] == pytest.approx(mean(gaps))
    traced = replace(schedule, plan=replace(schedule.plan, traced=(0,)))
    (line,) = lines(traced, [{}], lambda ids: "x" * len(ids))
    (segment,) = schedule.samples[0].response.segments
    assert json.loads(line)["teacher_logprobs"] == segment.teacher_logprobs.round(4).tolist()


def _phase_of(schedule: Any) -> Phase:
    nothing = SimpleNamespace(kept=[], filtered=[], purged=[])
    return Phase(collected=nothing, unneeded=(), stale=(), schedule=schedule)  # type: ignore[arg-type]


# Vocabularies and templates ------------------------------------------------------------------------------------------


def tokenizer_of(words: Sequence[str], template: str = "U {{ messages[-1].content }} A") -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[EOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", chat_template=template
    )


def test_a_teacher_with_another_vocabulary_or_template_is_refused() -> None:
    own = tokenizer_of(["U", "A", "What", "is"])
    assert [*vocabulary_problems(own, own, "it"), *template_problems(own, own, "it", {})] == []
    (problem,) = vocabulary_problems(own, tokenizer_of(["U", "A", "is", "What"]), "it")
    assert "2 tokens differ, the first is 'What' (4 for the policy, 5 for the teacher)" in problem
    (problem,) = vocabulary_problems(own, tokenizer_of(["U", "A", "What", "is", "more"]), "it")
    assert "1 tokens differ, the first is 'more' (missing for the policy, 6 for the teacher)" in problem
    other = tokenizer_of(["U", "A", "What", "is"], "A {{ messages[-1].content }} U")
    (problem,) = template_problems(own, other, "it", {})
    assert "it has another chat template" in problem
    assert "distillation.other_template = true" in problem


def test_what_speaks_against_a_teacher_is_told_before_a_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(*changes: str, vocab_size: int = 96, rollouts: Path | None = None) -> list[str]:
        start = SimpleNamespace(
            trains=True,
            config=config_of(tmp_path, TEACHER, *changes),
            rollouts=rollouts,
            architecture=SimpleNamespace(vocab_size=96),
        )
        monkeypatch.setattr(checks, "load_architecture", lambda path: SimpleNamespace(vocab_size=vocab_size))
        return list(checks.teacher_problems(start))  # type: ignore[arg-type]

    own = tokenizer_of(["U", "A", "What", "is"])
    monkeypatch.setattr(checks, "load_tokenizer", lambda path: own)
    monkeypatch.setattr(checks, "visible_gpus", lambda: ["0"])
    assert found() == []
    (problem,) = found(vocab_size=90)
    assert "has 90 token ids and the policy 96" in problem
    (problem,) = found(rollouts=tmp_path)
    assert "--rollouts has no log-probs of a teacher" in problem
    (problem,) = found("distillation.advantage=alone", "algorithm.name=dapo")
    assert "set algorithm.dynamic_sampling = false" in problem
    one, other = found("rollout.engine=sglang")
    assert one.startswith("rollout.sglang_arguments names no --mem-fraction-static")
    assert other.startswith("distillation.sglang_arguments names no --mem-fraction-static")
    elsewhere = 'distillation.urls=["http://a:1"]'
    assert found("rollout.engine=sglang", elsewhere) == []


# Scores --------------------------------------------------------------------------------------------------------------


ROLLOUT = RolloutSection(
    prompts_per_step=1, samples_per_prompt=2, max_prompt_tokens=8, max_response_tokens=40, max_running_requests=4
)


class FakePolicy:
    """Samples three tokens for each request."""

    num_slots = 4

    async def generate(self, wanted: Any, temperature: float, may_abort: Any, place: Any) -> Completion:
        del temperature, may_abort, place
        ids = np.array([wanted.seed % 50 + 2, 7, 1], np.int32)
        return Completion(
            output_ids=ids,
            logprobs=np.full(3, -0.5, np.float32),
            finish_reason="stop",
            weight_versions=("0",),
        )


def test_what_was_scored_is_in_the_journal_and_no_teacher_is_asked_again(tmp_path: Path) -> None:
    asked = []

    class FakeTeacher:
        async def scored(self, responses: Sequence[Response]) -> list[Response]:
            asked.append(len(responses))
            given = np.array([-0.25, -1.0, -2.0], np.float32)
            return [
                replace(r, segments=tuple(replace(s, teacher_logprobs=given) for s in r.segments)) for r in responses
            ]

    def sample() -> Group:
        journal = Journal(tmp_path, "a", lambda error: error)
        journal.open(0)
        sampler = Sampler(
            FakePolicy(),  # type: ignore[arg-type]
            Rewards(RewardSection(timeout_seconds=240)),
            str,
            lambda responses, rewards: np.zeros(len(responses)),
            ROLLOUT,
            1,
            (1,),
            journal,
            teacher=FakeTeacher(),  # type: ignore[arg-type]
        )
        prompt = Prompt(id="x", domain="math", prompt="?", answer="1")
        (group,) = asyncio.run(sampler.sample([Question(prompt_id=7, prompt=prompt, input_ids=(5, 6))], 0))
        journal.close()
        return group

    first, again = sample(), sample()
    assert asked == [2]
    for one, other in zip(first.samples, again.samples, strict=True):
        assert one.response.teacher_logprobs.tolist() == [-0.25, -1.0, -2.0]
        assert one.response.teacher_logprobs.tobytes() == other.response.teacher_logprobs.tobytes()


def test_a_server_that_gives_no_numbers_is_lost() -> None:
    client = GenerationClient("http://127.0.0.1:9")

    def scores(*logprobs: object) -> np.ndarray:
        async def answer(*_: object) -> bytes:
            entries = [[logprob, 5, None] for logprob in logprobs]
            return json.dumps({"meta_info": {"input_token_logprobs": entries, "other": 1}, "text": ""}).encode()

        client._answered = answer  # type: ignore[method-assign]
        return asyncio.run(client.input_logprobs([5, 6, 7], 2))

    assert scores(None, -0.5).tolist() == [-0.5]
    for logprobs in ((None, None), (None, 1e300), (None, -0.5, -0.5), (None,)):
        with pytest.raises(ServerLost, match="finite log-probs for the 1 tokens behind the first 2"):
            scores(*logprobs)
    with pytest.raises(ServerLost, match="gave no input log-probs"):
        scores(None, "x")
