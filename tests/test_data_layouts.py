"""Tests files in the layouts of public data sets, from the file to a judged response."""

import asyncio
import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from sandboxed import why_not

from megatron_rl.config.load import load_config
from megatron_rl.config.reward import CodeSection, RewardSection
from megatron_rl.data.curation.config import CurationConfig
from megatron_rl.data.curation.pipeline import curate
from megatron_rl.data.curation.preview import run_inspect
from megatron_rl.data.prompts import Prompt, read_chats, read_prompts
from megatron_rl.reward.code import warm_up
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.score import Attempt
from megatron_rl.reward.stem import choice_verdict

LAYOUTS = Path(__file__).parents[2] / "shared" / "data" / "layouts"
MISSING = why_not(warm_up)
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=MISSING)
pytestmark = pytest.mark.skipif(not LAYOUTS.is_dir(), reason=f"{LAYOUTS} is not there")

SUM = "n = int(input())\nprint(sum(map(int, input().split())))"
ADD = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b"
TWO_SUM = (
    "class Solution:\n    def twoSum(self, nums, target):\n"
    "        return next([i, j] for j in range(len(nums)) for i in range(j) if nums[i] + nums[j] == target)"
)


def raw_rows(name: str) -> list[dict[str, Any]]:
    """Read a file's rows without the package."""
    path = LAYOUTS / name
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def curated(name: str, folder: Path) -> Path:
    """Curate a file by the mapping that megatron-rl inspect writes, and return kept.jsonl."""
    mapping = folder / "mapping.toml"
    run_inspect(str(LAYOUTS / name), "", mapping)
    output = [f"output={json.dumps(str(folder / 'out'))}", "workers=1"]
    curate(load_config(CurationConfig, mapping, output))
    return folder / "out" / "kept.jsonl"


@pytest.fixture(scope="module")
def rewards() -> Iterator[Rewards]:
    domains = {} if MISSING else {"code": "code"}
    section = RewardSection(
        kind="math", domains=domains, workers=1, timeout_seconds=240, code=CodeSection(seconds=240, cpu_seconds=60)
    )
    with Rewards(section) as made:
        yield made


def score(rewards: Rewards, prompt: Prompt, text: str) -> float:
    (verdict,) = asyncio.run(rewards.verdicts(prompt, [Attempt(text=text)]))
    return verdict.score


# file -> of a row of it, as the file has it: the question and the right answer
MATHEMATICS: dict[str, Any] = {
    "aime24_maxwell.parquet": lambda row: (row["Problem"], str(row["Answer"])),
    "areal.jsonl": lambda row: (row["messages"][0]["content"], row["answer"]),
    "deepscaler.json": lambda row: (row["problem"], row["answer"]),
    "eurus2.parquet": lambda row: (row["prompt"][1]["content"], row["reward_model"]["ground_truth"]),
    "skywork_math.parquet": lambda row: (
        row["prompt"][0]["content"],
        json.loads(row["reward_model"]["ground_truth"])[0],
    ),
    "slime_dapo.jsonl": lambda row: (row["prompt"][0]["content"], row["label"]),
    "verl_gsm8k.parquet": lambda row: (row["extra_info"]["question"], row["reward_model"]["ground_truth"]),
}


@pytest.mark.parametrize("name", MATHEMATICS)
def test_mathematics_goes_from_the_file_to_a_judged_response(name: str, tmp_path: Path, rewards: Rewards) -> None:
    rows = [row for row in raw_rows(name) if row.get("ability") != "code"]
    right = dict(MATHEMATICS[name](row) for row in rows)
    prompts = [prompt for prompt in read_prompts(curated(name, tmp_path)) if prompt.domain == "math"]
    assert len(prompts) >= 0.9 * len(right)
    for prompt in prompts[:8]:
        answer = right[prompt.prompt]
        assert score(rewards, prompt, f"So \\boxed{{{answer}}}.") == 1
        assert score(rewards, prompt, f"So \\boxed{{{answer} + 1}}.") == 0


# file -> a program that solves every row of it; None for the row's own solution
PROGRAMS: dict[str, str | None] = {
    "eurus2.parquet": SUM,
    "ring_lite_rl_code.jsonl": SUM,
    "skywork_code.parquet": SUM,
    "lcb_v6.jsonl": SUM,
    "lcb_v6_func.jsonl": ADD,
    "skywork_leetcode.parquet": TWO_SUM,
    "kodcode.jsonl": None,
}


@needs_sandbox
@pytest.mark.parametrize("name", PROGRAMS)
def test_code_goes_from_the_file_to_a_judged_response(name: str, tmp_path: Path, rewards: Rewards) -> None:
    solutions = {row["question"]: row["solution"] for row in raw_rows(name) if "solution" in row}
    prompts = [prompt for prompt in read_prompts(curated(name, tmp_path)) if prompt.domain == "code"]
    assert len(prompts) == sum(row.get("ability", "code") == "code" for row in raw_rows(name))
    for prompt in prompts[:4]:
        right = PROGRAMS[name] or solutions[prompt.prompt]
        wrong = right.replace("return", "return None and").replace("print(", "print(1 + ")
        assert wrong != right
        assert score(rewards, prompt, f"```python\n{right}\n```") == 1
        assert score(rewards, prompt, f"```python\n{wrong}\n```") == 0


def test_a_file_of_two_domains_routes_each_row(tmp_path: Path) -> None:
    of_ability = Counter(row["ability"] for row in raw_rows("eurus2.parquet"))
    prompts = read_prompts(curated("eurus2.parquet", tmp_path))
    assert Counter(prompt.domain for prompt in prompts) == of_ability
    for prompt in prompts:
        assert ("inputs" in prompt.answer or "cases" in prompt.answer) == (prompt.domain == "code")


def test_the_options_of_a_choice_are_shuffled_and_the_letter_is_right(tmp_path: Path) -> None:
    right = {row["Question"]: row["Correct Answer"] for row in raw_rows("gpqa_diamond.csv")}
    prompts = read_prompts(curated("gpqa_diamond.csv", tmp_path))
    assert len(prompts) == len(right)
    for prompt in prompts:
        question, _, options = prompt.prompt.partition("\n\n")
        letters = {line[4:]: line[1] for line in options.splitlines()}
        assert len(letters) == 4
        for option, letter in letters.items():
            expected = 1 if option == right[question] else 0
            assert choice_verdict(f"\\boxed{{{letter}}}", prompt.answer).score == expected


@pytest.mark.parametrize("name", ["sft_kod.jsonl", "sft_sharegpt.jsonl"])
def test_conversations_become_rows_for_supervised_fine_tuning(name: str, tmp_path: Path) -> None:
    found = [[(m.role, m.content) for m in chat.messages] for chat in read_chats(curated(name, tmp_path))]
    names = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
    assert found == [
        [(names[m.get("role", m.get("from"))], m.get("content", m.get("value"))) for m in messages]
        for messages in (row.get("messages", row.get("conversations")) for row in raw_rows(name))
    ]


def test_every_file_of_the_folder_is_tried_above() -> None:
    tried = {*MATHEMATICS, *PROGRAMS, "gpqa_diamond.csv", "sft_kod.jsonl", "sft_sharegpt.jsonl"}
    assert {path.name for path in LAYOUTS.iterdir()} <= tried
