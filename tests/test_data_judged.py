"""Tests that prompts that are too long, or do not suit their reward, are found before a run begins."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tiny_model import TINY_CONFIG

from megatron_rl.config.data import RlData
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.fitting import Limit
from megatron_rl.data.judged import check_judged
from megatron_rl.data.mixture import load_stream
from megatron_rl.data.prompts import Prompt, read_prompts
from megatron_rl.preflight.checks import check_start
from megatron_rl.preflight.registry import Start

LENGTHS = {f"a.jsonl:{n}": n for n in range(1, 11)}
TESTS = json.dumps({"type": "asserts", "asserts": ["assert f(1) == 2"]})


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(path: Path, *rows: tuple[str, str, str]) -> list[Prompt]:
    return read_prompts(write(path, *({"domain": d, "prompt": p, "answer": a} for d, p, a in rows)))


def test_rows_that_are_too_long_are_named_with_their_number_and_the_remedy() -> None:
    with pytest.raises(ValueError) as error:
        Limit(tokens=3, key="rollout.max_prompt_tokens", too_long="stop").check(LENGTHS)
    assert str(error.value) == (
        "7 of 10 prompts have more tokens than rollout.max_prompt_tokens = 3: a.jsonl:4 with 4, a.jsonl:5 with 5, "
        "a.jsonl:6 with 6, a.jsonl:7 with 7, a.jsonl:8 with 8 and 2 more; raise it (the longest has 10) or leave them "
        'out by data.too_long = "drop"'
    )


def test_rows_that_are_too_long_are_left_out_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    limit = Limit(tokens=8, key="k", too_long="drop")
    assert limit.check(LENGTHS) == {"a.jsonl:9", "a.jsonl:10"}
    assert "2 of 10 prompts have more tokens than k = 8 and are left out" in caplog.text
    assert Limit(tokens=10, key="k").check(LENGTHS) == set()
    with pytest.raises(ValueError, match="10 of 10 prompts have more tokens than k = 0"):
        Limit(tokens=0, key="k", too_long="drop").check(LENGTHS)


def test_a_file_is_read_without_the_rows_that_do_not_fit(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * n, "answer": "1"} for n in range(1, 6)]
    data = RlData(train={write(tmp_path / "a.jsonl", *rows): 1, write(tmp_path / "b.jsonl", rows[0]): 1})
    stream = load_stream(data, 1, lambda prompts: [prompt for prompt in prompts if len(prompt.prompt) < 3])
    assert sorted(prompt.prompt for prompt in stream.rows) == ["p", "pp"]
    with pytest.raises(ValueError, match=r"all rows of .*b\.jsonl are too long"):
        load_stream(data, 1, lambda prompts: [prompt for prompt in prompts if len(prompt.prompt) > 1])


def test_the_suffix_and_the_domain_of_the_configuration_reach_the_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "1+1?", "answer": 2})
    (prompt,) = load_stream(RlData(train=path, suffix=" Box it.", domain="sums"), 1).rows
    assert (prompt.prompt, prompt.domain) == ("1+1? Box it.", "sums")


def test_a_run_is_not_gone_on_with_when_its_prompts_became_other_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "1+1?", "answer": 2})
    changes = ({}, {"suffix": " Box it."}, {"domain": "sums"}, {"special_tokens": "token"})
    digests = [load_stream(RlData(train=path, **change), 1).digest for change in changes]
    assert len(set(digests)) == len(changes)
    assert load_stream(RlData(train=path, too_long="drop"), 1).digest == digests[0]


@pytest.mark.parametrize("kind", ["math", "stem", "exact"])
def test_tests_that_another_reward_would_judge_are_refused(kind: str, tmp_path: Path) -> None:
    prompts = asked(tmp_path / "a.jsonl", ("sums", "1+1? boxed", "2"), ("code", "f?", TESTS))
    with pytest.raises(ValueError) as error:
        check_judged(prompts, RewardSection(kind=kind))
    assert str(error.value) == (
        f"{tmp_path}/a.jsonl:2: the answer of this row is tests of a program, and the reward of domain 'code' is "
        f"{kind!r}, which would call every response wrong; so it is with 1 of 1 rows. Set reward.domains = "
        "{code = \"code\"}, or give these rows the domain 'code'"
    )
    check_judged(prompts, RewardSection(kind=kind, domains={"code": "code"}))


def test_one_row_of_tests_in_a_domain_of_mathematics_is_refused_and_of_exact_answers_is_not(tmp_path: Path) -> None:
    prompts = asked(tmp_path / "a.jsonl", ("d", "1? boxed", "1"), ("d", "2? boxed", "2"), ("d", "3? boxed", TESTS))
    check_judged(prompts, RewardSection(kind="exact"))
    with pytest.raises(ValueError, match=r"a\.jsonl:3: .* so it is with 1 of 3 rows"):
        check_judged(prompts, RewardSection(kind="math"))


def test_answers_that_are_no_tests_are_refused_where_programs_are_judged(tmp_path: Path) -> None:
    prompts = asked(tmp_path / "a.jsonl", ("code", "f?", TESTS), ("code", "1+1?", "2"), ("code", "g?", "{}"))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the answer .* must be tests .* so it is with 2 of 3 rows"):
        check_judged(prompts, RewardSection(domains={"code": "code"}))


@pytest.mark.parametrize(
    ("prompts", "kind", "warnings"),
    [
        (["How many boxes?", "1+1?"], "math", ["none of the 2 prompts of mathematics or science mentions a box"]),
        (["How many boxes?", "1+1? Use \\boxed{}."], "math", []),
        (["How many boxes?"], "exact", []),
        (
            ["1+1? Answer after ####.", "Use \\boxed{}."],
            "stem",
            ["1 of 2 prompts of mathematics or science have '####' in them"],
        ),
    ],
)
def test_prompts_that_do_not_ask_for_a_box_are_warned_of(
    prompts: list[str], kind: str, warnings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_judged(asked(tmp_path / "a.jsonl", *(("d", prompt, "1") for prompt in prompts)), RewardSection(kind=kind))
    assert len(caplog.records) == len(warnings)
    for record, warning in zip(caplog.records, warnings, strict=True):
        assert record.message.startswith(warning)
        assert "set data.suffix" in record.message


def start_of(tmp_path: Path, *data: Path, **reward: Any) -> None:
    """Run the checks that come before a run of reinforcement learning starts."""
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model/config.json").write_text(json.dumps(TINY_CONFIG))
    values = {
        "run_dir": tmp_path / "run",
        "model": {"path": tmp_path / "model"},
        "data": {"train": {str(path): 1 for path in data}},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_response_tokens": 8},
        "budget": {"tokens": 100},
        "train": {"steps": 1, "micro_batch_tokens": 256},
        "reward": reward,
    }
    check_start(Start(config=RlConfig.model_validate(values), world_size=1))


def test_the_rows_of_all_files_are_looked_at_before_a_model_is_built(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", {"prompt": "1+1?", "answer": 2})
    start_of(tmp_path, good)
    bad = write(tmp_path / "bad.jsonl", {"question": "1+1?", "answer": 2}, {"prompt": "1+2?"})
    with pytest.raises(ValueError) as error:
        start_of(tmp_path, good, bad, tmp_path / "none.jsonl")
    for part in (
        "bad.jsonl:1: there is no field 'prompt'",
        "'question' may be it",
        "bad.jsonl:2: there is no field 'answer'",
        "none.jsonl",
    ):
        assert part in str(error.value)
    tests = write(tmp_path / "tests.jsonl", {"prompt": "f?", "answer": TESTS})
    with pytest.raises(ValueError, match=r"tests\.jsonl:1: the answer of this row is tests of a program"):
        start_of(tmp_path, good, tests, kind="math")
    start_of(tmp_path, good, tests, kind="math", domains={"code": "code"})
