"""Tests what `megatron-rl inspect` guesses, shows and writes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.cli import main
from megatron_rl.config.load import load_config
from megatron_rl.data.curation.config import CurationConfig
from megatron_rl.data.curation.guess import guess_layout
from megatron_rl.data.curation.pipeline import curate
from megatron_rl.data.curation.preview import run_inspect
from megatron_rl.data.prompts import read_prompts

MESSAGES = [{"role": "user", "content": "1+1?"}]
CASES = '[{"input": "1", "output": "2"}]'


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"domain": "math", "prompt": "p", "answer": "a"}, {"preset": "ours"}),
        ({"question": "q", "answer": "so\n#### 4"}, {"preset": "gsm8k"}),
        ({"problem": "p", "solution": "\\boxed{4}", "level": "1", "type": "t"}, {"preset": "math"}),
        ({"problem": "p", "solution": "\\boxed{4}", "answer": "4"}, {"preset": "numina"}),
        ({"prompt": MESSAGES, "reward_model": {"ground_truth": "2"}, "data_source": "d"}, {"preset": "verl"}),
        ({"prompt": MESSAGES, "label": "2"}, {"preset": "slime"}),
        ({"messages": MESSAGES, "answer": "2"}, {"preset": "areal"}),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "2"}], "answer": "2"}, {"preset": "messages"}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"preset": "sharegpt"}),
        (
            {"Problem": "p", "Final Answer": 4, "ID": "x", "year": 2024, "Solution": "s" * 300},
            {"prompt": "Problem", "answer": "Final Answer", "domain": "math", "id_column": "ID", "meta": ["year"]},
        ),
        (
            {"statement": "p", "cases": CASES, "domain": "code"},
            {
                "prompt": "statement",
                "tests": "any",
                "tests_column": "cases",
                "domain": "code",
                "domain_column": "domain",
            },
        ),
        (
            {"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"chat": "dialog"},
        ),
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            {"preset": "alpaca"},
        ),
        (
            {"instruction": "Add.", "input": "1 and 2", "answer": "3"},
            {"prompt": "instruction", "answer": "answer", "domain": "math", "append": "input"},
        ),
        ({"prompt": "1+2?", "completion": "3"}, {"preset": "prompt_completion"}),
        ({"instruction": "1+2?", "output": "3"}, {"prompt": "instruction", "answer": "output", "domain": "math"}),
        ({"a": "b", "c": "d"}, {}),
        ({"prompt": "p"}, {}),
    ],
)
def test_a_layout_is_guessed_from_columns_and_from_what_they_hold(row: dict[str, Any], keys: dict[str, Any]) -> None:
    assert guess_layout([row]) == keys
    assert guess_layout([row, {}]) == keys


def test_rows_reasons_and_domains_are_told_and_the_mapping_makes_our_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n}+1? \x1b[31m", "answer": n + 1} for n in range(4)]
    rows = [{**row, "question": row["question"][:-5]} if row["answer"] != 4 else row for row in rows]
    rows += [
        {"question": "Is it?", "answer": "yes"},
        {"question": "f?", "answer": CASES},
        {"question": "", "answer": 3},
    ]
    write(tmp_path / "odd.jsonl", *rows)
    assert main(["inspect", "odd.jsonl"]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert re.findall(r"^odd\.jsonl:(\d)$", told, re.MULTILINE) == ["1", "2", "6"]  # one of each domain
    assert "of the first 7 rows 4 would be kept, before duplicates: 3 of math, 1 of code" in told
    for reason in (
        "1  invalid_characters, the first: odd.jsonl:4: '\\x1b'",
        "1  true_or_false, the first: odd.jsonl:5: the answer is yes",
        "1  missing_prompt, the first: odd.jsonl:7: column 'question' is empty",
    ):
        assert reason in told
    assert "note: none of the 3 prompts of mathematics or science mentions a box" in told
    assert told.rstrip().endswith("then: python tools/prepare_data.py odd.curation.toml")
    curate(load_config(CurationConfig, "odd.curation.toml", ["output=out", "workers=1"]))
    assert [prompt.domain for prompt in read_prompts("out/kept.jsonl")] == ["math", "math", "math", "code"]


def test_both_parts_of_a_question_are_shown_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "answer": "3", "choices": ["3", "4"]}
    told = run_inspect(str(write(tmp_path / "a.jsonl", row, row | {"input": ""})), "", tmp_path / "a.toml")
    assert "left out: choices (" in told
    assert "prompt: Add.\\n\\n1 and 2\n" in told and "prompt: Add.\n" in told


def test_what_cannot_be_inspected_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"a": 1, "b": 2})
    with pytest.raises(
        ValueError, match=r"no layout fits .*a\.jsonl, whose columns are a, b; name a preset .* prompt = .COLUMN."
    ):
        run_inspect(str(path), "", None)
    with pytest.raises(ValueError, match="--preset must be one of ours, .*, got 'our'"):
        run_inspect(str(path), "our", None)
    with pytest.raises(
        ValueError, match=rf"^{tmp_path} is a directory; name the files in it, as '{tmp_path}/\*\.jsonl'$"
    ):
        run_inspect(str(tmp_path), "", None)
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
        run_inspect(str(write(tmp_path / "empty.jsonl")), "", None)


def test_a_mapping_that_somebody_changed_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "#### 4"})
    output = tmp_path / "a.toml"
    run_inspect(str(path), "", output)
    run_inspect(str(path), "", output)
    output.write_text(output.read_text() + "# mine\n")
    with pytest.raises(ValueError, match=r"a\.toml exists and says something else"):
        run_inspect(str(path), "", output)
