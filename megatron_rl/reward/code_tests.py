"""Reads the tests that judge a program, and says what is wrong with them.

They are JSON, one object with "type":

    asserts       {"asserts": [source, ...], "setup": source}
    humaneval     {"test": source that defines check(candidate), "entry_point": name or Solution().name}
    pytest        {"test": source of a test file: functions test_..., "from solution import ..."}
    function_io   {"fn_name": name, "inputs": [[argument, ...], ...], "outputs": [result, ...]}
    stdin_stdout  {"cases": [{"input": text, "output": text}, ...]}

The first three may have "prefix": source that the prompt gave (imports, helpers, the function's head); it is put in
front of the program and of the tests. Tests that cannot be read, and tests that check nothing, are an error of the
data: `problem_of_tests` says which, for curation, for the start of a run and for the judge alike.
"""

import ast
import builtins
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.parsing import parse_json, shown
from megatron_rl.reward.code_tester import Names

TEST_TYPES = ("asserts", "humaneval", "pytest", "function_io", "stdin_stdout")
# LeetCode's and LeetCodeDataset's way of naming a function: a new Solution for each call.
SOLUTION = "Solution()."
MAX_DIGITS = 1_000_000
_PYTHON_DIGITS = 4000  # int() takes 4,300 at a time


class BadTests(ValueError):
    """Says that no judge can use; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTests:
    """Holds tests that are programs themselves.

    kind: asserts, humaneval or pytest. setup: runs before the first test. tests: the asserts, or the one source.
    entry_point: what `check` gets, as the data says it; empty for the other kinds.
    names: what the tests want of the program.
    """

    kind: str
    prefix: str
    setup: str
    tests: tuple[str, ...]
    entry_point: str
    names: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTests:
    """Holds calls of one function, and what each must return."""

    name: str
    inputs: tuple[list[Any], ...]
    outputs: tuple[Any, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset([self.name])


@dataclass(frozen=True, slots=True, kw_only=True)
class StdinTests:
    """Holds runs of a whole program: (what it reads, what it must print)."""

    cases: tuple[tuple[str, str], ...]


AnyTests = SourceTests | CallTests | StdinTests


def problem_of_tests(answer: str) -> str | None:
    """Say why nobody could judge a program by these tests, or None where somebody can."""
    try:
        read_tests(answer)
    except BadTests as error:
        return str(error)
    return None


def read_tests(answer: str) -> AnyTests:
    """Read the tests; BadTests for what `problem_of_tests` complains about."""
    try:
        tests = parse_exact_json(answer)
    except ValueError as error:
        raise BadTests(f"tests must be JSON: {error}") from None
    if not isinstance(tests, Mapping):
        raise BadTests(f"tests must be an object of JSON, got {shown(tests)}")
    kind = tests.get("type")
    if kind == "stdin_stdout":
        return _stdin_tests(tests)
    if kind == "function_io":
        return _call_tests(tests)
    if kind in TEST_TYPES:
        return _source_tests(str(kind), tests)
    raise BadTests(f"the type of tests must be one of {', '.join(TEST_TYPES)}, got {shown(kind)}")


def parse_exact_json(text: str) -> Any:
    """Read JSON with integers of up to a million digits. Raise ValueError as `parse_json` does."""
    try:
        return parse_json(text)
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
    return parse_json(text, parse_int=_integer)


def _integer(digits: str) -> int:
    """Do what int() does, for more digits than Python takes: by halves, which is also faster than its way."""
    if len(digits) > MAX_DIGITS:
        raise BadTests(f"an integer of more than {MAX_DIGITS:,} digits")
    if digits[0] == "-":
        return -_integer(digits[1:])
    if len(digits) <= _PYTHON_DIGITS:
        return int(digits)
    low = len(digits) // 2
    return int(_integer(digits[:-low]) * 10**low + _integer(digits[-low:]))


def _stdin_tests(tests: Mapping[str, Any]) -> StdinTests:
    cases = []
    for number, case in enumerate(_list(tests, "cases")):
        if not isinstance(case, Mapping):
            raise BadTests(f"cases[{number}] must have input and output, got {shown(case)}")
        cases.append((_line_text(case, "input", number), _line_text(case, "output", number)))
    _not_empty(cases)
    if not any(output.strip() for _, output in cases):
        raise BadTests("the tests check nothing: every expected output is empty; give the outputs, or drop the row")
    return StdinTests(cases=tuple(cases))


def _line_text(case: Mapping[str, Any], name: str, number: int) -> str:
    """Return a text, or a number as text."""
    value = case.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    got = shown(value) if name in case else "no such key"
    remedy = "; join its lines with line ends" if isinstance(value, list) else ""
    raise BadTests(f"cases[{number}].{name} must be text, got {got}{remedy}")


def _call_tests(tests: Mapping[str, Any]) -> CallTests:
    name = _text(tests, "fn_name")
    if not name.isidentifier():
        raise BadTests(f"fn_name must be the name of a function, got {name!r}")
    inputs, outputs = _list(tests, "inputs"), _list(tests, "outputs")
    if len(inputs) != len(outputs):
        raise BadTests(f"there are {len(inputs)} inputs and {len(outputs)} outputs")
    for number, arguments in enumerate(inputs):
        if not isinstance(arguments, list):
            raise BadTests(
                f"inputs[{number}] must be the list of the function's arguments, got {shown(arguments)}; "
                "write [x] for one argument, and a list of values for lines of JSON"
            )
    _not_empty(inputs)
    if all(output is None for output in outputs):
        raise BadTests("the tests check nothing: every expected result is null; give the results, or drop the row")
    return CallTests(name=name, inputs=tuple(inputs), outputs=tuple(outputs))


def _source_tests(kind: str, tests: Mapping[str, Any]) -> SourceTests:
    prefix, setup = (_text(tests, name, "") for name in ("prefix", "setup"))
    entry_point = ""
    if kind == "asserts":
        sources = _list(tests, "asserts")
        for number, source in enumerate(sources):
            if not isinstance(source, str):
                raise BadTests(f"asserts[{number}] must be source code, got {shown(source)}")
        if not any(source.strip() for source in sources):
            raise BadTests("there is no test in it")
    else:
        sources = [_text(tests, "test")]
    trees = [_parse(source) for source in (setup, *sources)]
    names = Names()
    for tree in trees:
        names.add(tree)
    wanted = names.read - names.bound - set(dir(builtins)) - names.modules().keys() | set(names.from_solution.values())
    if kind == "humaneval":
        entry_point = _text(tests, "entry_point")
        if not entry_point.removeprefix(SOLUTION).isidentifier():
            raise BadTests(f"entry_point must be the name of a function or Solution().name, got {entry_point!r}")
        if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in trees[-1].body):
            raise BadTests("there is no test in it: test must define check(candidate)")
        wanted = {entry_point.removeprefix(SOLUTION), *(["Solution"] if SOLUTION in entry_point else [])}
    if kind == "pytest" and not any(_test_functions(trees[-1])):
        raise BadTests("there is no test in it: test must define functions whose names begin with test")
    if not any(_checks(node) for tree in (_prefix_tree(prefix), *trees) for node in ast.walk(tree)):
        raise BadTests("the tests check nothing: there is no assert in them; add one, or drop the row")
    return SourceTests(
        kind=kind,
        prefix=prefix,
        setup=setup,
        tests=tuple(sources),
        entry_point=entry_point,
        names=frozenset(wanted),
    )


def _test_functions(tree: ast.Module) -> Iterator[str]:
    """Yield the names of what a run of pytest or unittest would call."""
    for node in tree.body:
        inside: Iterable[ast.stmt] = node.body if isinstance(node, ast.ClassDef) else [node]
        for part in inside:
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and part.name.startswith("test"):
                yield part.name


def _checks(node: ast.AST) -> bool:
    """Tell whether this part of a test can fail it. An assert of a constant, as `assert True, "..."`, cannot."""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant | ast.Tuple | ast.JoinedStr)
    if isinstance(node, ast.Call):
        called = getattr(node.func, "attr", None) or getattr(node.func, "id", None) or ""
        return bool(re.match(r"assert|raises|fail|_?exit", called))
    return isinstance(node, ast.Raise)


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTests(f"the test {shown(source)} cannot be compiled: {error}") from None


def _prefix_tree(prefix: str) -> ast.Module:
    """Parse the prefix. Its helpers may hold the asserts. One that ends in a function's head holds none."""
    try:
        return ast.parse(prefix)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module(body=[], type_ignores=[])


def _text(tests: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = tests.get(name, default)
    if isinstance(value, str) and (value.strip() or default is not None):
        return value
    raise BadTests(f"{name} must be text, got {shown(value) if name in tests else 'no such key'}")


def _list(tests: Mapping[str, Any], name: str) -> list[Any]:
    value = tests.get(name)
    if not isinstance(value, list):
        raise BadTests(f"{name} must be a list, got {shown(value) if name in tests else 'no such key'}")
    return value


def _not_empty(tests: list[Any]) -> None:
    if not tests:
        raise BadTests("there is no test in it")
