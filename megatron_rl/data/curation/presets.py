"""Layouts of data sets that are in use, as keys of `config.Layout`. What is set beside a preset goes before it."""

from collections.abc import Mapping
from typing import Any

_VERL = {
    "prompt": "prompt.-1.content",
    "answer": "reward_model.ground_truth",
    "domain": "math",
    "source_column": "data_source",
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # data/prompts.py, and so kept.jsonl itself; math, stem and codeio rows of ../shared/data
    "ours": {
        "prompt": "prompt",
        "answer": "answer",
        "domain_column": "domain",
        "id_column": "id",
        "source_column": "source",
        "meta": ("meta",),
    },
    # code rows of ../shared/data: an object `tests` as reward/code.py reads it
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
    # verl: chat messages, reward_model.ground_truth
    "verl": _VERL,
    # DAPO-Math-17k: verl, with instructions around every question
    "dapo": {
        **_VERL,
        "remove": (
            r"\ASolve the following math problem step by step\.[^\n]*\n+",
            r"\n+Remember to put your answer.*\Z",
        ),
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
}
