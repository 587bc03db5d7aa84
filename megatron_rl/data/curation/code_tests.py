"""Tests of programs: from the layouts of data sets to the JSON that reward/code_tests.py reads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rl.parsing import parse_json
from megatron_rl.reward.code_tests import parse_exact_json


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
    if all(isinstance(given, str) for given in inputs):
        return calls_of_lines(found["fn_name"], inputs, outputs)
    # Some rows wrap the result in a list and some do not; a function whose every result is a list of one is rare.
    if all(isinstance(output, list) and len(output) == 1 for output in outputs):
        outputs = [output[0] for output in outputs]
    return {"type": "function_io", "fn_name": found["fn_name"], "inputs": inputs, "outputs": outputs}


def calls_of_lines(name: str, inputs: Sequence[str], outputs: Sequence[str]) -> Mapping[str, Any]:
    """LiveCodeBench's calls of a function: a line of JSON for each argument, and the result as JSON."""
    arguments = [[parse_exact_json(line) for line in text.splitlines() if line.strip()] for text in inputs]
    results = [parse_exact_json(text) for text in outputs]
    return {"type": "function_io", "fn_name": name, "inputs": arguments, "outputs": results}


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
