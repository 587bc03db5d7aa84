"""Tests of programs: from the layouts of data sets to the JSON that reward/code.py reads."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_rl.parsing import parse_json


def problem_of_tests(answer: str) -> str | None:
    """Why reward/code.py could not use these tests, or None."""
    try:
        tests = parse_json(answer)
        return None if _count(tests) else "there is no test in it"
    except (ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def _count(tests: Mapping[str, Any]) -> int:
    kind = tests["type"]
    if kind == "asserts":
        return sum(bool(text.strip()) for text in tests["asserts"])
    if kind == "humaneval":
        return int("def check(" in tests["test"] and bool(tests["entry_point"].strip()))
    if kind == "function_io":
        return len(list(zip(tests["inputs"], tests["outputs"], strict=True))) if tests["fn_name"].strip() else 0
    if kind == "stdin_stdout":
        return len([(case["input"] + case["output"]) for case in tests["cases"]])
    raise ValueError(f"type must be asserts, humaneval, function_io or stdin_stdout, got {kind!r}")


def _from_json(row: Mapping[str, Any], value: Any) -> Mapping[str, Any]:
    """The object of reward/code.py, or its text."""
    return parse_json(value) if isinstance(value, str) else value


def _from_input_output(row: Mapping[str, Any], value: Any) -> Mapping[str, Any]:
    """APPS and TACO: {"inputs": [...], "outputs": [...], optional "fn_name"}, the object or its text."""
    found = parse_json(value) if isinstance(value, str) else value
    inputs, outputs = found["inputs"], found["outputs"]
    if not found.get("fn_name"):
        cases = [{"input": _lines(i), "output": _lines(o)} for i, o in zip(inputs, outputs, strict=True)]
        return {"type": "stdin_stdout", "cases": cases}
    # Some rows wrap the result in a list and some do not; a function whose every result is a list of one is rare.
    if all(isinstance(output, list) and len(output) == 1 for output in outputs):
        outputs = [output[0] for output in outputs]
    return {"type": "function_io", "fn_name": found["fn_name"], "inputs": inputs, "outputs": outputs}


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _from_mbpp(row: Mapping[str, Any], value: Any) -> Mapping[str, Any]:
    asserts = [*row["test_list"], *(row.get("challenge_test_list") or ())]
    return {"type": "asserts", "setup": row.get("test_setup_code") or "", "asserts": asserts}


def _from_humaneval(row: Mapping[str, Any], value: Any) -> Mapping[str, Any]:
    """The prompt is source that a response may leave out: its imports and helpers."""
    return {"type": "humaneval", "test": row["test"], "entry_point": row["entry_point"], "prefix": row["prompt"]}


# (row, value of tests_column) -> the object. KeyError, TypeError or ValueError: the row is not in this layout.
TEST_LAYOUTS: Mapping[str, Callable[[Mapping[str, Any], Any], Mapping[str, Any]]] = {
    "json": _from_json,
    "input_output": _from_input_output,
    "mbpp": _from_mbpp,
    "humaneval": _from_humaneval,
}
