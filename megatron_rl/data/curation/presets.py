"""Names layouts of data sets that are in use, as keys of `config.Layout`. What is set beside a preset goes before
it."""

from collections.abc import Mapping
from typing import Any

_VERL = {
    "prompt": "prompt.-1.content",
    "answer": "reward_model.ground_truth",
    "domain": "math",
    "domain_column": "ability",
    "domains": {"MATH": "math", "coding": "code", "codegen": "code"},
    "source_column": "data_source",
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # data/prompts.py, and so kept.jsonl itself
    "ours": {
        "prompt": "prompt",
        "answer": "answer",
        "domain": "math",
        "domain_column": "domain",
        "id_column": "id",
        "source_column": "source",
        "meta": ("meta",),
    },
    # an object `tests` as reward/code_tests.py reads it
    "code_tests": {
        "prompt": "prompt",
        "tests": "json",
        "tests_column": "tests",
        "domain": "code",
        "id_column": "id",
        "source_column": "source",
        "meta": ("meta",),
    },
    "gsm8k": {"prompt": "question", "answer": "answer", "answer_pattern": r"####\s*(.+)", "domain": "math"},
    # hendrycks MATH: the answer is the box of the solution
    "math": {
        "prompt": "problem",
        "answer": "solution",
        "answer_from": "boxed",
        "domain": "math",
        "meta": ("level", "type"),
    },
    # Open-R1 and NuminaMath: problem, solution, answer
    "numina": {"prompt": "problem", "answer": "answer", "domain": "math", "source_column": "source"},
    # verl, Skywork-OR1, Eurus-2: chat messages, reward_model.ground_truth. `ability` is the domain
    "verl": _VERL,
    # DAPO-Math-17k: verl, with instructions around every question
    "dapo": {
        **_VERL,
        "remove": (
            r"\ASolve the following math problem step by step\.[^\n]*\n+",
            r"\n+Remember to put your answer.*\Z",
        ),
    },
    # GSM8K as verl prepares it
    "verl_gsm8k": {
        **_VERL,
        "remove": (r"\s*Let's think step by step and output the final answer after \"####\"\.?\s*\Z",),
    },
    # APPS and TACO: input_output is JSON text
    "apps": {
        "prompt": "question",
        "tests": "input_output",
        "tests_column": "input_output",
        "append": "starter_code",
        "domain": "code",
        "meta": ("difficulty",),
    },
    "mbpp": {"prompt": "text", "append": "test_list.0", "tests": "mbpp", "domain": "code", "meta": ("task_id",)},
    "humaneval": {"prompt": "prompt", "tests": "humaneval", "domain": "code", "id_column": "task_id"},
    # Ring-lite-rl-data, its code rows
    "ring_lite_code": {
        "prompt": "prompt",
        "tests": "cases",
        "tests_column": "code_test_cases",
        "domain": "code",
        "id_column": "mid",
        "source_column": "dataset",
        "meta": ("difficulty",),
    },
    # LiveCodeBench, code generation: metadata names the function of rows from LeetCode
    "livecodebench": {
        "prompt": "question_content",
        "append": "starter_code",
        "tests": "livecodebench",
        "domain": "code",
        "id_column": "question_id",
        "source_column": "platform",
        "meta": ("difficulty", "contest_date"),
    },
    "kodcode": {
        "prompt": "question",
        "tests": "pytest",
        "tests_column": "test",
        "domain": "code",
        "id_column": "question_id",
        "source_column": "subset",
        "meta": ("style", "gpt_difficulty"),
    },
    # LeetCodeDataset: `prompt` is the imports, `query` the question
    "leetcode": {
        "prompt": "query",
        "tests": "humaneval",
        "domain": "code",
        "id_column": "task_id",
        "meta": ("difficulty",),
    },
    # GPQA: the right option first, shuffled when it is read
    "gpqa": {
        "prompt": "Question",
        "options": ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        "domain": "stem",
        "id_column": "Record ID",
        "meta": ("High-level domain", "Subdomain"),
    },
    "areal": {"prompt": "messages.-1.content", "answer": "answer", "domain": "math"},
    "slime": {"prompt": "prompt.-1.content", "answer": "label", "domain": "math"},
    # Rows for supervised fine-tuning
    "messages": {"chat": "messages", "id_column": "id"},
    "sharegpt": {"chat": "conversations", "id_column": "id"},
    "alpaca": {"prompt": "instruction", "append": "input", "response": "output", "id_column": "id"},
    "prompt_completion": {"prompt": "prompt", "response": "completion", "id_column": "id"},
}
