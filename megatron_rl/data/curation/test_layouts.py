"""Turns the tests of a program, as data sets have them, into the object that reward/code_tests.py reads."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rl.data.curation.packed import unpacked_text
from megatron_rl.parsing import parse_json
from megatron_rl.reward.code_tests import parse_exact_json

Tests = Mapping[str, Any]
# Reads the tests of a row and its value of tests_column. KeyError, TypeError and ValueError mean another layout.
Reader = Callable[[Mapping[str, Any], Any], Tests]

_TEST_FUNCTION = re.compile(r"^\s*(?:async )?def test\w*\(", re.MULTILINE)


def recognised_tests(value: Any) -> Tests | None:
    """Return the tests that a value holds, whatever its column is called; None for anything else, such as an answer."""
    found = value
    if isinstance(value, str):
        text = value.strip()
        if text[:1] not in "{[":
            return _of_source(text)
        try:
            found = parse_json(text)
        except ValueError:
            return None
    reader = _reader_of(found)
    return None if reader is None else reader({}, found)


def looks_like_tests(answer: Any) -> bool:
    """Tell whether an answer is no answer but the tests of a program, readable or not."""
    try:
        return recognised_tests(answer) is not None
    except (KeyError, TypeError, ValueError, AttributeError):
        return True


def _reader_of(found: Any) -> Reader | None:
    """Find the reader of tests by the keys of an object, or by the items of a list."""
    if isinstance(found, Mapping):
        if "type" in found and {"asserts", "test", "fn_name", "cases"} & found.keys():
            return _from_json
        if {"inputs", "outputs"} <= found.keys():
            return _from_input_output
        if "entry_point" in found and {"test_code", "test"} & found.keys():
            return _from_check
    if isinstance(found, Sequence) and not isinstance(found, str) and found:
        if all(isinstance(item, Mapping) and {"input", "output"} <= item.keys() for item in found):
            return _from_cases
        if all(isinstance(item, str) and item.lstrip().startswith("assert ") for item in found):
            return _from_asserts
    return None


def _of_source(text: str) -> Tests | None:
    """Read tests that are a program: pytest's functions, or one assert a line."""
    if _TEST_FUNCTION.search(text) and "assert" in text:
        return _from_pytest({}, text)
    lines = [line for line in text.splitlines() if line.strip()]
    return _from_asserts({}, lines) if lines and all(line.startswith("assert ") for line in lines) else None


def _from_json(row: Mapping[str, Any], value: Any) -> Tests:
    """Read the object of reward/code.py, or its text."""
    return parse_json(value) if isinstance(value, str) else value


def _from_input_output(row: Mapping[str, Any], value: Any) -> Tests:
    """Read tests of APPS and TACO: {"inputs": [...], "outputs": [...], optional "fn_name"}, the object or its text."""
    found = parse_json(value) if isinstance(value, str) else value
    inputs, outputs = found["inputs"], found["outputs"]
    if not found.get("fn_name"):
        cases = [{"input": _lines(i), "output": _lines(o)} for i, o in zip(inputs, outputs, strict=True)]
        return {"type": "stdin_stdout", "cases": cases}
    if all(isinstance(given, str) for given in inputs):
        return _calls(found["fn_name"], inputs, outputs)
    # Some rows wrap the result in a list and some do not; a function whose every result is a list of one is rare.
    if all(isinstance(output, list) and len(output) == 1 for output in outputs):
        outputs = [output[0] for output in outputs]
    return {"type": "function_io", "fn_name": found["fn_name"], "inputs": inputs, "outputs": outputs}


def _calls(function: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> Tests:
    """Return calls of a function. LiveCodeBench writes a line of JSON for each argument, and the result as JSON."""
    arguments = [_arguments(given) for given in inputs]
    results = [parse_exact_json(output) if isinstance(output, str) else output for output in outputs]
    return {"type": "function_io", "fn_name": function, "inputs": arguments, "outputs": results}


def _arguments(value: Any) -> list[Any]:
    if not isinstance(value, str):
        return list(value)
    return [parse_exact_json(line) for line in value.split("\n") if line.strip()]


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _from_mbpp(row: Mapping[str, Any], value: Any) -> Tests:
    asserts = [*row["test_list"], *(row.get("challenge_test_list") or ())]
    return {"type": "asserts", "setup": row.get("test_setup_code") or "", "asserts": asserts}


def _from_humaneval(row: Mapping[str, Any], value: Any) -> Tests:
    """Read HumanEval's tests. The prompt is source that a response may leave out: its imports and helpers."""
    return {"type": "humaneval", "test": row["test"], "entry_point": row["entry_point"], "prefix": row["prompt"]}


def _from_any(row: Mapping[str, Any], value: Any) -> Tests:
    tests = recognised_tests(value)
    if tests is None:
        raise ValueError(f"no tests of a kind that is known, {value!r:.80}")
    return tests


def _from_cases(row: Mapping[str, Any], value: Any) -> Tests:
    """Read a list of {"input", "output"}, or its text: on stdin, or with "testtype": "functional" or "fn_name"
    arguments."""
    cases = parse_json(value) if isinstance(value, str) else value
    return _of_cases(cases, next((case["fn_name"] for case in cases if case.get("fn_name")), ""))


def _of_cases(cases: Sequence[Mapping[str, Any]], function: str) -> Tests:
    kinds = {case.get("testtype") or case.get("type") or "" for case in cases}
    called = bool(function) and not kinds <= {"stdin", "stdin_stdout"}
    if not called and kinds & {"functional", "function_call"}:
        raise ValueError("tests call a function whose name is not there")
    if not called:
        texts = {"inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases]}
        return _from_input_output({}, texts)
    inputs, outputs = [case["input"] for case in cases], [case["output"] for case in cases]
    return _calls(function, inputs, outputs)


def _from_livecodebench(row: Mapping[str, Any], value: Any) -> Tests:
    """Read public and private tests; metadata names the function, where there is one. What is private is packed."""
    cases: list[Mapping[str, Any]] = []
    for name in ("public_test_cases", "private_test_cases"):
        given = row.get(name) or []
        if isinstance(given, str):
            given = parse_json(given if given.lstrip()[:1] == "[" else unpacked_text(given))
        cases += given
    metadata = row.get("metadata") or {}
    if isinstance(metadata, str):
        metadata = parse_json(metadata)
    if not cases:
        raise ValueError("there is no test in it")
    return _of_cases(cases, metadata.get("func_name") or "")


def _from_check(row: Mapping[str, Any], value: Any) -> Tests:
    """Read Skywork's LeetCode rows: test_code defines check(candidate), entry_point is what it is given."""
    found = parse_json(value) if isinstance(value, str) else value
    return {
        "type": "humaneval",
        "test": found["test_code"] if "test_code" in found else found["test"],
        "entry_point": found["entry_point"],
        "prefix": found.get("import_prefix") or "",
    }


def _from_asserts(row: Mapping[str, Any], value: Any) -> Tests:
    return {"type": "asserts", "setup": "", "asserts": list(value)}


def _from_pytest(row: Mapping[str, Any], value: Any) -> Tests:
    """Read KodCode's tests: a file of functions test_... that import what they test from the module `solution`."""
    if not _TEST_FUNCTION.search(value):
        raise ValueError("it defines no function test_...")
    return {"type": "pytest", "test": value}


TEST_LAYOUTS: Mapping[str, Reader] = {
    "json": _from_json,
    "input_output": _from_input_output,
    "mbpp": _from_mbpp,
    "humaneval": _from_humaneval,
    "any": _from_any,
    "cases": _from_cases,
    "livecodebench": _from_livecodebench,
    "pytest": _from_pytest,
}
NEED_A_COLUMN = ("json", "input_output", "any", "cases", "pytest")
