"""Tests the order of prompts: epochs, mixtures, stages, and a cursor, which alone is needed to resume."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config.data import RlData
from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.reward import JudgeSection, RewardSection
from megatron_rl.data.domains import check_reward_domains
from megatron_rl.data.mixture import PromptStream, Source, Stage, load_stream
from megatron_rl.data.prompts import Prompt
from megatron_rl.train.orchestrator.group_source import saved_by_domain


def source(name: str, count: int, weight: float = 1.0) -> Source:
    prompts = (Prompt(id=f"{name}{i}", domain=name, prompt=f"{i}?", answer=str(i)) for i in range(count))
    return Source(path=Path(name), rows=tuple(prompts), weight=weight)


def one_file(count: int, seed: int) -> PromptStream:
    return PromptStream([Stage(sources=(source("p", count),))], seed=seed)


@st.composite
def some_stages(draw: st.DrawFn) -> list[Stage]:
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
    sizes = {name: draw(st.integers(1, 12)) for name in names}
    stages = []
    for num_prompts in [*draw(st.lists(st.integers(1, 40), max_size=2)), None]:
        chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        weights = [draw(st.floats(0.01, 10)) for _ in chosen]
        sources = (source(name, sizes[name], weight) for name, weight in zip(chosen, weights, strict=True))
        stages.append(Stage(sources=tuple(sources), num_rows=num_prompts))
    return stages


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 10**9), epoch=st.integers(0, 50))
def test_every_epoch_holds_each_prompt_once(count: int, seed: int, epoch: int) -> None:
    taken, cursor = one_file(count, seed).take(epoch * count, count)
    assert sorted(int(p.id[1:]) for p in taken) == list(range(count))
    assert cursor == (epoch + 1) * count


@settings(max_examples=60, deadline=None)
@given(stages=some_stages(), seed=st.integers(0, 99), start=st.integers(0, 100), takes=st.lists(st.integers(0, 30)))
def test_a_stream_resumed_at_any_cursor_continues_the_same_order(
    stages: list[Stage], seed: int, start: int, takes: list[int]
) -> None:
    whole, _ = PromptStream(stages, seed).take(0, start + sum(takes))
    cursor, got = start, []
    for number in takes:
        # Each stream is new: the cursor alone is the state.
        part, cursor = PromptStream(stages, seed).take(cursor, number)
        got += part
    assert got == whole[start:]
    assert cursor == start + sum(takes)


@settings(max_examples=60, deadline=None)
@given(stages=some_stages(), seed=st.integers(0, 99))
def test_every_file_has_its_share_of_its_stage_at_every_position(stages: list[Stage], seed: int) -> None:
    taken, _ = PromptStream(stages, seed).take(0, 150)
    first = 0
    for stage in stages:
        part = taken[first : first + stage.num_rows] if stage.num_rows else taken[first:]
        first += len(part)
        total = sum(one.weight for one in stage.sources)
        counts: Counter[str] = Counter()
        for position, prompt in enumerate(part, start=1):
            counts[prompt.domain] += 1
            for one in stage.sources:
                off = counts[str(one.path)] - position * one.weight / total
                assert abs(off) < max(1, len(stage.sources) - 1) + 1e-6


@settings(max_examples=40, deadline=None)
@given(stages=some_stages(), seed=st.integers(0, 99))
def test_a_file_goes_through_whole_epochs_across_its_stages(stages: list[Stage], seed: int) -> None:
    taken, _ = PromptStream(stages, seed).take(0, 150)
    sizes = {str(one.path): len(one.rows) for stage in stages for one in stage.sources}
    for name, size in sizes.items():
        of_file = [p.id for p in taken if p.domain == name]
        for first in range(0, len(of_file) - size + 1, size):
            assert len(set(of_file[first : first + size])) == size


@settings(max_examples=60, deadline=None)
@given(stages=some_stages(), seed=st.integers(0, 99), takes=st.lists(st.integers(0, 9), max_size=6))
def test_every_domain_goes_through_the_one_order_by_itself(stages: list[Stage], seed: int, takes: list[int]) -> None:
    domains = sorted(str(one.path) for one in stages[-1].sources)
    found: dict[str, list[int]] = {domain: [] for domain in domains}
    cursors = dict.fromkeys(domains, 0)
    for number in takes:
        for domain in domains:
            # Each stream is new: the cursors are the state.
            positions, cursors[domain] = PromptStream(stages, seed).positions_of(domain, cursors[domain], number)
            found[domain] += positions
    whole, _ = PromptStream(stages, seed).take(0, max([0, *cursors.values()]))
    for domain, positions in found.items():
        assert positions == [i for i, prompt in enumerate(whole[: cursors[domain]]) if prompt.domain == domain]
        assert len(positions) == sum(takes)
    assert PromptStream(stages, seed).positions_of("", 3, 4) == ([3, 4, 5, 6], 7)


def test_a_domain_of_the_rewards_that_no_prompt_has_is_refused_with_the_nearest() -> None:
    stages = [Stage(sources=(source("math", 3),), num_rows=5), Stage(sources=(source("Code", 3),))]
    stream = PromptStream(stages, 1)
    check_reward_domains(
        stream.rows, RewardSection(domains={"math": "math", "Code": "code"}), "data.train"
    )  # each in one of the stages
    for reward, message in [
        (
            RewardSection(domains={"maths": "math"}),
            r"reward.domains names 'maths', but .*\(Code, math\).* mean 'math'\?",
        ),
        (RewardSection(domains={"code": "code"}), r"reward.domains names 'code'.* Did you mean 'Code'\?"),
        (RewardSection(domains={"数学": "math"}), r"reward.domains names '数学', .*; rename it, or take it out$"),
        (
            RewardSection(judge=JudgeSection(domains=("mth",), url="http://x", model="m")),
            r"reward.judge.domains names 'mth'.* Did you mean 'math'\?",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            check_reward_domains(stream.rows, reward, "data.train")


def test_shares_of_the_budget_must_be_of_the_domains_of_every_stage(caplog: pytest.LogCaptureFixture) -> None:
    both = Stage(sources=(source("code", 3), source("math", 3)), num_rows=5)
    shares = {"code": 0.5, "math": 0.5}
    PromptStream([both, Stage(sources=(source("math", 3), source("code", 3)))], 1).check_shares(shares)
    assert not caplog.records
    with pytest.raises(
        ValueError, match=r"data.train has prompts of domain 'math', which has no share .*\(code\); give"
    ):
        PromptStream([Stage(sources=both.sources)], 1).check_shares({"code": 1.0})
    with pytest.raises(
        ValueError, match="a share for 'code', but stage 2 of data.stages has no prompts of that domain"
    ):
        PromptStream([both, Stage(sources=(source("math", 3),))], 1).check_shares(shares)
    weighted = Stage(sources=(source("code", 3, 2.0), source("math", 3)))
    PromptStream([weighted], 1).check_shares(shares)
    assert "the weights of data.train only say how files of the same domain mix" in caplog.text


def test_cursors_of_a_checkpoint_are_those_of_the_same_domains() -> None:
    assert saved_by_domain({"code": 7, "math": 3}, {"math": 0.9, "code": 0.1}) == {"code": 7, "math": 3}
    assert saved_by_domain(7, {"": 1.0}) == saved_by_domain({"": 7}, {"": 1.0}) == {"": 7}
    for saved, shares in (({"": 7}, {"code": 1.0}), ({"code": 7}, {"": 1.0}), (7, {"code": 1.0})):
        with pytest.raises(ValueError, match="budget.domains was set or taken out since this run began"):
            saved_by_domain(saved, shares)


def test_pieces_are_consecutive_in_any_order_of_asking() -> None:
    stream = one_file(10, seed=1)
    steps = [stream.take(4 * index, 4)[0] for index in (2, 0, 1)]
    assert steps[1] + steps[2] + steps[0] == stream.take(0, 12)[0]


def test_epochs_and_seeds_have_different_orders() -> None:
    stream = one_file(50, seed=1)
    first, second = stream.take(0, 50)[0], stream.take(50, 50)[0]
    assert first != second
    assert first != list(source("p", 50).rows)
    assert first != one_file(50, seed=2).take(0, 50)[0]


def test_a_stream_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1 and 2"):
        one_file(1, seed=0).take(-1, 2)


def test_a_digest_tells_whether_a_cursor_still_means_the_same() -> None:
    stages = [Stage(sources=(source("a", 3), source("b", 3)), num_rows=5), Stage(sources=(source("a", 3),))]
    digest = PromptStream(stages, 1).digest
    assert PromptStream(list(stages), 1).digest == digest
    others = [
        (stages, 2),
        (stages[1:], 1),
        ([Stage(sources=stages[0].sources, num_rows=6), stages[1]], 1),
        ([Stage(sources=(source("a", 3, 2.0), source("b", 3)), num_rows=5), stages[1]], 1),
        ([Stage(sources=(source("a", 4), source("b", 3)), num_rows=5), Stage(sources=(source("a", 4),))], 1),
    ]
    copied = Source(path=Path("copy of a"), rows=source("a", 3).rows, weight=1.0)
    others.append(([stages[0], Stage(sources=(copied,))], 1))  # begins, where the file itself goes on
    assert digest not in {PromptStream(*other).digest for other in others}
    elsewhere = [Stage(sources=(copied, source("b", 3)), num_rows=5), Stage(sources=(copied,))]
    assert PromptStream(elsewhere, 1).digest == digest


def write(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_configuration_gives_stages_of_weighted_files(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", *({"domain": name, "prompt": f"{i}?", "answer": "1"} for i in range(9)))
    (tmp_path / "data.toml").write_text(
        f'[[stages]]\nprompts = 8\ntrain = {{"{tmp_path}/a.jsonl" = 3, "{tmp_path}/b.jsonl" = 1}}\n'
        f'[[stages]]\ntrain = "{tmp_path}/b.jsonl"\n'
    )
    config = load_config(RlData, tmp_path / "data.toml", [])
    assert config.train_files == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    stream = load_stream(config, seed=3)
    assert len(stream.rows) == 18
    taken, _ = stream.take(0, 15)
    assert [p.domain for p in taken].count("a") == 6
    assert {p.domain for p in taken[8:]} == {"b"}
    b = [p.id for p in taken if p.domain == "b"]
    assert len(set(b)) == len(b) == 9  # the second stage goes on where the first left its file
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(RlData, tmp_path / "again.toml", []) == config


def test_the_same_id_for_two_prompts_is_refused_and_the_same_prompt_in_two_files_is_not(tmp_path: Path) -> None:
    row = {"id": "7", "domain": "math", "prompt": "1+1?", "answer": "2"}
    a, b = write(tmp_path / "a.jsonl", row), write(tmp_path / "b.jsonl", row | {"source": "elsewhere"})
    assert len(load_stream(RlData(train={a: 1, b: 1}), seed=1).rows) == 1
    write(b, row | {"answer": "3"})
    with pytest.raises(ValueError, match=r"id '7' is a prompt in .*a.jsonl and another one in .*b.jsonl"):
        _ = load_stream(RlData(train={a: 1, b: 1}), seed=1).rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "either data.train or"),
        ({"train": "a", "stages": [{"train": "b"}]}, "either data.train or"),
        ({"stages": [{"train": "a", "prompts": 3}]}, "the last has none"),
        ({"stages": [{"train": "a"}, {"train": "a"}]}, "every stage of data.stages but the last needs"),
        ({"train": {}}, "names no file"),
        ({"train": {"a": 0}}, "greater than 0"),
    ],
)
def test_stages_that_make_no_sense_are_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RlData.model_validate(data)
