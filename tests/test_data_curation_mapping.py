"""Tests the mapping of data sets' layouts to one record, and the configuration that names them."""

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.load import load_config
from megatron_rl.data.curation.config import CurationConfig, Source
from megatron_rl.data.curation.mapping import Unusable, to_prompt
from megatron_rl.data.curation.presets import PRESETS
from megatron_rl.data.prompts import Prompt, prompt_id
from megatron_rl.reward.code_tests import TEST_TYPES, problem_of_tests

SHARED = Path(__file__).parents[2] / "shared" / "data"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def packed(cases: list[dict[str, str]]) -> str:
    """Pack test cases as LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


# preset, row -> domain, prompt, answer (tests as an object), meta
LAYOUTS: list[tuple[str, dict[str, Any], tuple[str, str, Any, dict[str, Any]]]] = [
    (
        "ours",
        {"domain": "stem", "prompt": "Mass?", "answer": "3 kg", "source": "book", "meta": {"page": 7}},
        ("stem", "Mass?", "3 kg", {"page": 7}),
    ),
    (
        "code_tests",
        {"prompt": "Add.", "tests": {"type": "asserts", "asserts": ["assert add(1, 2) == 3"]}},
        ("code", "Add.", {"type": "asserts", "asserts": ["assert add(1, 2) == 3"]}, {}),
    ),
    ("gsm8k", {"question": "How many?", "answer": "2*3=<<2*3=6>>6\n#### 1,006"}, ("math", "How many?", "1,006", {})),
    (
        "math",
        {"problem": "Halve 1.", "solution": "\\boxed{2} no: \\boxed{\\frac{1}{2}}.", "level": "Level 1"},
        ("math", "Halve 1.", "\\frac{1}{2}", {"level": "Level 1"}),
    ),
    ("numina", {"problem": "x?", "solution": "so 5", "answer": "5"}, ("math", "x?", "5", {})),
    (
        "verl",
        {"prompt": MESSAGES, "reward_model": {"ground_truth": "2"}, "data_source": "sums"},
        ("math", "1+1?", "2", {}),
    ),
    (
        "dapo",
        {
            "prompt": [
                {
                    "role": "user",
                    "content": "Solve the following math problem step by step. Mind this.\n\nWhat is 2+3?\n\n"
                    'Remember to put your answer on its own line after "Answer:".',
                }
            ],
            "reward_model": {"ground_truth": ["5"]},
        },
        ("math", "What is 2+3?", "5", {}),
    ),
    (
        "apps",
        {
            "question": "Sum them.",
            "input_output": '{"inputs": ["1 2\\n", ["3 4", "5"]], "outputs": ["3\\n", "12"]}',
            "starter_code": "",
            "difficulty": "interview",
        },
        (
            "code",
            "Sum them.",
            {
                "type": "stdin_stdout",
                "cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "3 4\n5", "output": "12"}],
            },
            {"difficulty": "interview"},
        ),
    ),
    (
        "apps",
        {
            "question": "Sum.",
            "input_output": '{"fn_name": "f", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}',
            "starter_code": "def f(a, b):\n",
        },
        (
            "code",
            "Sum.\n\ndef f(a, b):",
            {"type": "function_io", "fn_name": "f", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]},
            {},
        ),
    ),
    (
        "mbpp",
        {
            "text": "Negate.",
            "task_id": 3,
            "test_setup_code": "",
            "test_list": ["assert n(1) == -1", "assert n(0) == 0"],
            "challenge_test_list": [],
        },
        (
            "code",
            "Negate.\n\nassert n(1) == -1",
            {"type": "asserts", "setup": "", "asserts": ["assert n(1) == -1", "assert n(0) == 0"]},
            {"task_id": 3},
        ),
    ),
    (
        "humaneval",
        {
            "task_id": "T/1",
            "prompt": "def f():\n",
            "entry_point": "f",
            "test": "def check(c):\n    assert c() is None\n",
        },
        (
            "code",
            "def f():\n",
            {
                "type": "humaneval",
                "test": "def check(c):\n    assert c() is None\n",
                "entry_point": "f",
                "prefix": "def f():\n",
            },
            {},
        ),
    ),
    (
        "verl",
        {
            "prompt": MESSAGES,
            "ability": "math",
            "reward_model": {"ground_truth": '{"inputs": ["1"], "outputs": ["2"]}'},
        },
        ("code", "1+1?", {"type": "stdin_stdout", "cases": [{"input": "1", "output": "2"}]}, {}),
    ),
    (
        "verl_gsm8k",
        {
            "prompt": [
                {
                    "role": "user",
                    "content": 'How many? Let\'s think step by step and output the final answer after "####".',
                }
            ],
            "reward_model": {"ground_truth": "7"},
        },
        ("math", "How many?", "7", {}),
    ),
    (
        "ring_lite_code",
        {
            "mid": "m",
            "prompt": "Add.",
            "difficulty": 3,
            "code_test_cases": [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}],
        },
        ("code", "Add.", {"type": "stdin_stdout", "cases": [{"input": "1 2\n", "output": "3\n"}]}, {"difficulty": 3}),
    ),
    (
        "livecodebench",
        {
            "question_content": "Add.",
            "starter_code": "class Solution:\n    def f(self, a, b):\n        ",
            "public_test_cases": '[{"input": "[1, 2]\\n3", "output": "6", "testtype": "functional"}]',
            "private_test_cases": packed([{"input": "[]\n-1", "output": "-1", "testtype": "functional"}]),
            "metadata": '{"func_name": "f"}',
            "difficulty": "easy",
        },
        (
            "code",
            "Add.\n\nclass Solution:\n    def f(self, a, b):",
            {"type": "function_io", "fn_name": "f", "inputs": [[[1, 2], 3], [[], -1]], "outputs": [6, -1]},
            {"difficulty": "easy"},
        ),
    ),
    (
        "leetcode",
        {
            "task_id": "two-sum",
            "query": "Add two.",
            "prompt": "from typing import *\n",
            "entry_point": "Solution().f",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
            "difficulty": "Easy",
        },
        (
            "code",
            "Add two.",
            {
                "type": "humaneval",
                "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
                "entry_point": "Solution().f",
                "prefix": "from typing import *\n",
            },
            {"difficulty": "Easy"},
        ),
    ),
    (
        "gpqa",
        {
            "Question": "Which?",
            "Correct Answer": "this \n",
            "Incorrect Answer 1": "that",
            "Incorrect Answer 2": "those",
            "Incorrect Answer 3": "these",
            "Subdomain": "Physics",
        },
        ("stem", "Which?\n\n(A) that\n(B) those\n(C) these\n(D) this", "D", {"Subdomain": "Physics"}),
    ),
    ("areal", {"messages": MESSAGES, "answer": "2"}, ("math", "1+1?", "2", {})),
    ("slime", {"prompt": MESSAGES, "label": "2"}, ("math", "1+1?", "2", {})),
]


def mapped(row: object, **source: Any) -> Prompt:
    given = Source(path="rows.jsonl", **source)
    return to_prompt(row, given.layout(), given.name)


def unusable(row: object, **source: Any) -> tuple[str, str]:
    with pytest.raises(Unusable) as caught:
        mapped(row, **source)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize(("preset", "row", "expected"), LAYOUTS, ids=[preset for preset, _, _ in LAYOUTS])
def test_every_preset_reads_its_layout(preset: str, row: dict[str, Any], expected: tuple[str, str, Any, Any]) -> None:
    record = mapped(row, preset=preset)
    answer = json.loads(record.answer) if record.domain == "code" else record.answer
    assert (record.domain, record.prompt, answer, record.meta) == expected


def test_every_preset_is_tried_above() -> None:
    conversations = {
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
    }  # tests/test_data_curation.py, tests/test_data_layouts.py
    needs_pytest = {"kodcode"}  # tests/test_data_layouts.py
    assert {preset for preset, _, _ in LAYOUTS} | conversations | needs_pytest == set(PRESETS)


def test_the_id_and_the_source_are_the_rows_own_where_it_has_them() -> None:
    row = {"domain": "math", "prompt": "p", "answer": "a"}
    record = mapped(row, preset="ours")
    assert (record.id, record.source) == (prompt_id("math", "p", "a"), "rows.jsonl")
    record = mapped({**row, "id": 12, "source": "s"}, preset="ours")
    assert (record.id, record.source) == ("12", "s")


def test_a_key_beside_a_preset_goes_before_it() -> None:
    record = mapped({"question": "q", "target": 3.5, "kind": "stem"}, preset="gsm8k", answer="target", domain="physics",
                    answer_pattern=None)  # fmt: skip
    assert (record.domain, record.answer) == ("physics", "3.5")


def test_answers_can_be_taken_out_of_a_solution() -> None:
    columns = {"prompt": "q", "answer": "a", "domain": "math"}
    row = {"q": "?", "a": "First 3. So the answer is 12."}
    assert mapped(row, answer_from="stated", **columns).answer == "12"
    assert mapped(row, answer_pattern=r"(\d+)\.", **columns).answer == "12"
    assert unusable(row, answer_from="boxed", **columns)[0] == "missing_answer"


@pytest.mark.parametrize("answer", [None, "", "  ", "$$", "N/A", "null", "?", "See solution.", "not found"])
def test_what_stands_for_no_answer_is_a_missing_answer(answer: object) -> None:
    assert unusable({"problem": "p", "answer": answer}, preset="numina")[0] == "missing_answer"


@pytest.mark.parametrize("answer", ["0", "None", "none", "\\emptyset", "-1", "Na", False])
def test_short_answers_are_answers(answer: object) -> None:
    assert mapped({"problem": "p", "answer": answer}, preset="numina").answer == str(answer)


def test_a_malformed_row_is_told_what_is_wrong() -> None:
    assert unusable([1], preset="ours") == ("malformed", "a row must be an object, got [1]")
    assert unusable({"text": "t", "n": 1}, preset="numina") == ("malformed", "no column 'problem'; the row has text, n")
    assert unusable({"prompt": [], "data_source": ""}, preset="verl") == (
        "malformed",
        "no column 'prompt.-1.content'; the row has prompt, data_source",
    )
    assert unusable({"problem": {"a": 1}, "answer": "1"}, preset="numina") == (
        "malformed",
        "column 'problem' must be text or a number, got {'a': 1}",
    )
    assert unusable({"problem": " \n", "answer": "1"}, preset="numina")[0] == "missing_prompt"
    assert unusable({"problem": "a\ud800", "answer": "1"}, preset="numina") == (
        "invalid_characters",
        "half of a surrogate pair, '\\ud800'",
    )


@pytest.mark.parametrize(
    ("tests", "detail"),
    [
        ({"type": "asserts", "asserts": []}, "there is no test in it"),
        ({"type": "asserts", "asserts": [" "]}, "there is no test in it"),
        ({"type": "humaneval", "test": "assert True", "entry_point": "f"}, "there is no test in it"),
        ({"type": "function_io", "fn_name": "f", "inputs": [[1]], "outputs": []}, "there are 1 inputs and 0 outputs"),
        ({"type": "stdin_stdout", "cases": [{"input": "1"}]}, "cases[0].output must be text, got no such key"),
        (
            {"type": "stdin_stdout", "cases": [{"input": ["1"], "output": "1"}]},
            "cases[0].input must be text, got [",
        ),
        (
            {"type": "stdin_stdout", "cases": [{"input": "5", "output": " \n"}]},
            "the tests check nothing: every expected",
        ),
        ({"type": "function_io", "fn_name": "f", "inputs": ["ab"], "outputs": ["ab"]}, "inputs[0] must be the list of"),
        ({"type": "asserts", "asserts": ["f(1)"]}, "the tests check nothing: there is no assert"),
        (
            {"type": "magic"},
            "the type of tests must be one of asserts, humaneval, pytest, function_io, stdin_stdout, got",
        ),
        ({}, "the type of tests must be one of"),
    ],
)
def test_tests_that_cannot_be_read_are_a_reason(tests: dict[str, Any], detail: str) -> None:
    found = problem_of_tests(json.dumps(tests))
    assert found is not None
    assert found.startswith(detail)
    if tests:
        assert unusable({"prompt": "p", "tests": tests}, preset="code_tests")[0] == "unreadable_tests"


def test_code_rows_without_tests_have_no_answer() -> None:
    assert unusable({"question": "q", "input_output": ""}, preset="apps")[0] == "missing_answer"
    assert unusable({"question": "q", "input_output": "{"}, preset="apps")[0] == "unreadable_tests"
    assert unusable({"domain": "code", "prompt": "p", "answer": "42"}, preset="ours")[0] == "unreadable_tests"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_all_tests_of_the_real_code_rows_are_read() -> None:
    kinds = set()
    for line in (SHARED / "code_dev.jsonl").open():
        kinds.add(json.loads(mapped(json.loads(line), preset="code_tests").answer)["type"])
    assert kinds == set(TEST_TYPES) - {"pytest"}


def test_lines_of_json_are_the_arguments_of_a_call() -> None:
    text = json.dumps({"inputs": ['[1, 2]\n"a"\n'], "outputs": ["[3]"], "fn_name": "f"})
    record = mapped({"question": "q", "input_output": text}, preset="apps")
    assert json.loads(record.answer) == {
        "type": "function_io",
        "fn_name": "f",
        "inputs": [[[1, 2], "a"]],
        "outputs": [[3]],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source = []", "there is nothing to curate; add a [[source]]"),
        ('[[source]]\npreset = "ours"', "source.0: needs either path or hf, got path = '' and hf = ''"),
        ('[[source]]\npath = "a"\nprompt = "p"', "a needs the columns prompt, answer (or tests) and domain"),
        ('[[source]]\npath = "a"\npreset = "our"', "source.0.preset: must be one of ours, code_tests"),
        ('[[source]]\npath = "a"\npreset = "ours"\nanwser = "b"', "key source.0.anwser; did you mean source.answer?"),
        ('rules = ["images"]\n[[source]]\npath = "a"\npreset = "ours"', "rules.0: must be one of invalid_characters"),
        ('[[source]]\npath = "a"\npreset = "ours"\nremove = ["("]', "is not a regular expression"),
        ('[[source]]\npath = "a"\npreset = "ours"\nanswer_pattern = "a"', "must have exactly one group"),
        ('[[source]]\npath = "a"\ntests = "json"\nprompt = "p"\ndomain = "code"', 'tests = "json" needs tests_column'),
        ('[[source]]\npath = "a"\npreset = "ours"\n[[benchmark]]\npath = "b"', "b needs the column prompt"),
        ('[[source]]\npath = "a"\npreset = "ours"\n[difficulty]\nstronger = ["b"]', "difficulty.stronger needs"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_says_what_to_change(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(f'output = "out"\n{text}\n')
    with pytest.raises(ValueError) as caught:
        load_config(CurationConfig, tmp_path / "c.toml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ('{"inputs": ["1"], "outputs": ["2"]}', "stdin_stdout"),
        ('{"inputs": [[1]], "outputs": [2], "fn_name": "f"}', "function_io"),
        ({"type": "asserts", "asserts": ["assert f(1) == 2"]}, "asserts"),
        (["assert f(1) == 2", "assert f(2) == 3"], "asserts"),
        ("assert f(1) == 2\nassert f(2) == 3\n", "asserts"),
        ('{"entry_point": "f", "test_code": "def check(c):\\n    assert c(1) == 2"}', "humaneval"),
        ([{"input": "1", "output": "2"}], "stdin_stdout"),
        ([{"input": [1], "output": 2, "fn_name": "f", "type": "function_call"}], "function_io"),
    ],
)
@pytest.mark.parametrize("own", ["math", "", None, "stem", "code"])
def test_a_row_with_tests_is_one_of_code_whatever_its_layout_says(answer: object, kind: str, own: str | None) -> None:
    columns = {"prompt": "q", "answer": "a", "domain": "math", "domain_column": "d"}
    record = mapped({"q": "?", "a": answer, **({} if own is None else {"d": own})}, **columns)
    assert (record.domain, json.loads(record.answer)["type"]) == ("code", kind)
    # The domain of a row's own stays: reward.domains may have it.
    assert mapped({"q": "?", "a": answer, "d": "contests"}, **columns).domain == "contests"


@pytest.mark.parametrize(
    "answer", ["{1,2,3}", "[1, 2]", '["p - q"]', '{"a": 1}', "\\frac{1}{2}", "[0, 1)", "to assert", '"x"', "(1, 2)"]
)
def test_answers_in_brackets_are_no_tests(answer: str) -> None:
    assert mapped({"problem": "p", "answer": answer}, preset="numina").domain == "math"


def test_tests_that_cannot_be_read_never_become_an_answer() -> None:
    row = {"prompt": MESSAGES, "ability": "math", "reward_model": {"ground_truth": '{"inputs": ["1"], "outputs": []}'}}
    assert unusable(row, preset="verl")[0] == "unreadable_tests"
    row = {"prompt": MESSAGES, "ability": "code", "reward_model": {"ground_truth": "42"}}
    assert unusable(row, preset="verl")[0] == "unreadable_tests"


def test_other_names_of_domains_are_translated() -> None:
    row = {"prompt": MESSAGES, "ability": "MATH", "reward_model": {"ground_truth": "2"}}
    assert mapped(row, preset="verl").domain == "math"
    assert mapped({**row, "ability": "logic"}, preset="verl").domain == "logic"


def options(seed: int, question: str) -> tuple[str, list[str]]:
    row = {"q": question, "right": "r", "w1": "x", "w2": "y", "w3": "z"}
    columns = {"prompt": "q", "options": ("right", "w1", "w2", "w3"), "domain": "stem", "options_seed": seed}
    record = mapped(row, **columns)
    return record.answer, [line[4:] for line in record.prompt.splitlines()[2:]]


def test_options_are_shuffled_by_the_seed_and_the_question() -> None:
    seen = {options(seed, f"Which {n}?")[0] for seed in range(2) for n in range(20)}
    assert seen == set("ABCD")
    for n in range(20):
        letter, lines = options(1, f"Which {n}?")
        assert (sorted(lines), lines["ABCD".index(letter)]) == (["r", "x", "y", "z"], "r")
        assert options(1, f"Which {n}?") == (letter, lines)
    assert [options(1, f"{n}") for n in range(20)] != [options(2, f"{n}") for n in range(20)]


def test_options_that_make_no_choice_are_refused() -> None:
    columns = {"prompt": "q", "options": ("a", "b"), "domain": "stem"}
    assert unusable({"q": "?", "a": "1", "b": ""}, **columns)[0] == "missing_answer"
    assert unusable({"q": "?", "a": "1", "b": " 1"}, **columns)[0] == "malformed"
    with pytest.raises(ValueError, match="options names 1 columns, and a choice has 2 to 10"):
        Source(path="p", prompt="q", options=("a",), domain="stem")
