"""Tests that code is judged as its benchmark does: the block chosen, outputs and results, imports, kinds of tests."""

import json
import os
import re
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some
from sandboxed import why_not

from megatron_rl.reward import sandbox as sandbox_module
from megatron_rl.reward.code import CodeSettings, judge_response, runner, warm_up
from megatron_rl.reward.code_answer import Block, closed_blocks, solution_of
from megatron_rl.reward.code_compare import same_output, same_result
from megatron_rl.reward.code_program import PRELUDE
from megatron_rl.reward.code_tests import parse_exact_json, problem_of_tests, read_tests
from megatron_rl.reward.sandbox_run import Limits

REWARDS = Path(__file__).parents[2] / "shared" / "data" / "code_rewards_dev.json"
SETTINGS = CodeSettings(seconds=240.0, cpu_seconds=5, memory_bytes=512 * 1024**2)
MISSING = why_not(lambda: warm_up(SETTINGS))
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def judge(source: str, tests: dict):
    return judge_response(f"```python\n{source}\n```", json.dumps(tests), SETTINGS)


def calls(name: str, *pairs: tuple) -> dict:
    return {"type": "function_io", "fn_name": name, "inputs": [a for a, _ in pairs], "outputs": [r for _, r in pairs]}


def stdin(*pairs: tuple[str, str]) -> dict:
    return {"type": "stdin_stdout", "cases": [{"input": one, "output": other} for one, other in pairs]}


@needs_sandbox
@pytest.mark.skipif(not REWARDS.is_file(), reason=f"{REWARDS} is not there")
def test_rewards_that_came_out_wrong_are_right_now():
    for row in json.loads(REWARDS.read_text(encoding="utf-8")):
        tests = row["tests"]
        if isinstance(tests, str) and not tests.startswith("{"):
            tests = stdin(("", "1" + "0" * 5000))
        answer = tests if isinstance(tests, str) else json.dumps(tests)
        reason = judge_response(f"```python\n{row['source']}\n```", answer, SETTINGS).reason
        assert reason in row["expected"], row


SAME_OUTPUT = [
    ("0.333333", "0.333333333333", True),
    ("1.000000", "1.0", True),
    ("1", "1.000", True),
    ("3.0", "3", True),
    ("3.5", "3", False),
    ("3.0000001", "3", False),
    ("1e-07", "0.0", True),
    ("1e-05", "0.0", False),
    ("2.00001", "2.0", False),
    ("1000000.9", "1000000.1234567", True),
    ("1000002.2", "1000000.1234567", False),
    ("1234567.12", "1234567.89", False),
    ("1234567.885", "1234567.89", True),
    ("1e+18", "1.0e18", True),
    ("nan", "1.0", False),
    ("inf", "1.0", False),
    ("1e400", "1e+400", False),
    ("0e1234", "0e9999", False),
    ("12e5", "1200000", False),
    ("007", "7", False),
    ("1.10.1", "1.1.1", False),
    ("$1.0", "$1.00", False),
    ("١.٠", "1.0", False),
    ("1,5", "1.5", False),
    ("yes", "YES", False),
    ("1  2\n\n3 \n", "1 2\n3", True),
    ("1 2 3", "1 2\n3", False),
    ("1.5 2.0000001 x", "1 2.0 x", False),
    ("1 2.0000001 x", "1 2.0 x", True),
    ("9" * 9000, "9" * 9000 + ".0", False),
    ("9" * 9000 + ".0", "9" * 9000, True),
    ("9" * 9000 + ".5", "9" * 9000, False),
]


@pytest.mark.parametrize(("got", "expected", "same"), SAME_OUTPUT, ids=range(len(SAME_OUTPUT)))
def test_words_are_compared_as_text_and_only_numbers_with_a_point_by_their_value(got, expected, same):
    assert same_output(got, expected) is same


@given(some.floats(-1e9, 1e9, allow_nan=False), some.floats(2e-6, 1.0))
def test_six_decimals_are_enough_and_a_greater_error_is_not(number, error):
    long = f"{number:.12f}"
    assert same_output(f"{number:.6f}", long)
    size = max(1.0, abs(number))
    assert not same_output(f"{number + error * size:.12f}", long)


@given(some.text("abc0123456789.-+e \n", max_size=30))
def test_every_text_is_the_same_as_itself_and_no_text_makes_the_comparison_fail(text):
    assert same_output(text, text)
    same_output(text, "1.5 2\n1e-05")
    same_output("1.5 2\n1e-05", text)


SAME_RESULT = [
    ({1: 2}, {"1": 2}, True),
    ({1: 2, "1": 3}, {"1": 3}, False),
    ({4: {2.5: (3,)}, None: 0, True: 1}, {"4": {"2.5": [3]}, "null": 0, "true": 1}, True),
    ({"1": 2}, {"1": 3}, False),
    ({(1, 2): 3}, {"(1, 2)": 3}, False),
    ((1, (2, [3])), [1, [2, [3]]], True),
    ([0.1 + 0.2, [1 / 3]], [0.3, [0.33333]], True),
    ({"a": (2.333334,)}, {"a": [2.33333]}, True),
    ([1 / 3], [0.3333], False),
    (2, 2.0, True),
    (2.0, 2, True),
    (2.0000001, 2, False),
    (Decimal("0.3"), 0.3, True),
    (Fraction(1, 3), 0.33333, True),
    (float("inf"), float("inf"), True),
    (float("nan"), float("nan"), True),
    (float("inf"), 1e300, False),
    (5, "5", False),
    ("5", 5, False),
    ({1, 2}, [1, 2], False),
    ([5], [[5]], True),  # APPS wraps some results
    (10**5000, 10**5000, True),
    (10**5000 + 1, 10**5000, False),
    (None, 0, False),
]


@pytest.mark.parametrize(("got", "expected", "same"), SAME_RESULT, ids=range(len(SAME_RESULT)))
def test_results_are_compared_as_json_writes_them(got, expected, same):
    assert same_result(got, expected) is same


def test_integers_of_any_length_are_read_and_a_million_digits_are_enough():
    for digits in (4001, 4300, 5000, 123_457):
        text = "7" * digits
        found = parse_exact_json(f'{{"a": [{text}, -{text}, 1.5, "x"]}}')["a"]
        assert found[1:] == [-found[0], 1.5, "x"]
        assert (found[0] * 9 + 7) == 7 * 10**digits  # 777 * 9 + 7 = 7000
    assert "more than 1,000,000 digits" in problem_of_tests('{"type": ' + "1" * 1_000_001 + "}")


@needs_sandbox
def test_programs_and_tests_of_every_kind_take_integers_of_any_length():
    power = "def f(n): return 10**n"
    assert judge("print(10**5000)", stdin(("", "1" + "0" * 5000))).reason == "correct"
    assert judge("print(int(input()) + 1)", stdin(("9" * 5000, "1" + "0" * 5000))).reason == "correct"
    answer = '{"type": "function_io", "fn_name": "f", "inputs": [[5000]], "outputs": [1%s]}' % ("0" * 5000)
    assert judge_response(f"```python\n{power}\n```", answer, SETTINGS).reason == "correct"
    text = {"type": "asserts", "asserts": ["assert len(str(f(5000))) == 5001"]}
    assert judge(power, text).reason == "correct"


# The prelude


def test_every_name_of_the_prelude_is_in_its_module():
    for name, (module, attribute) in PRELUDE.items():
        if module != "numpy":
            found = __import__(module)
            assert not attribute or hasattr(found, attribute), name


@needs_sandbox
@pytest.mark.parametrize(
    "source",
    [
        "class Solution:\n    def f(self, xs: List[int]) -> Optional[int]:\n        return sum(Counter(xs).elements())",
        "def f(xs):\n    d: DefaultDict[int, int] = defaultdict(int)\n    return functools.reduce(add, xs)",
        "@lru_cache(None)\ndef g(t): return sum(t)\ndef f(xs): return g(tuple(accumulate(xs, max)))",
        "def f(xs):\n    heapify(xs)\n    return 3 if math.gcd(*xs) == 1 and inf > sys.maxsize else 0",
        "Pair = NamedTuple('Pair', [('a', int)])\ndef f(xs): return Pair(sum(xs)).a",
        "from __future__ import annotations\ndef f(xs): return int(fabs(-sum(xs)))",
        "'''Doc.'''\nfrom __future__ import annotations\ndef f(xs): return int(fabs(-sum(xs)))",
        "def sqrt(x): return 3\ndef f(xs): return sqrt(xs)",
        "def f(xs):\n    sqrt = sum\n    return sqrt(xs)",
        "class Solution:\n    def f(self, root: TreeNode, xs: 'Nowhere' = None): return 3",
    ],
)
def test_a_program_may_leave_out_the_imports_that_its_benchmark_makes(source):
    judgement = judge(source, calls("f", ([[1, 2]], 3)))
    assert judgement.reason == "correct", judgement


@needs_sandbox
def test_programs_on_stdin_have_the_prelude_too_and_what_it_does_not_have_is_not_there():
    assert judge("print(sqrt(int(stdin.readline())), gcd(4, 6))", stdin(("9", "3 2"))).reason == "correct"
    assert "NameError" in judge("print(read_numbers())", stdin(("9", "9"))).details
    # A name of the prelude is not the program's: it defines no function of that name.
    assert (
        judge("def f(a, b): return gcd(a, b)", calls("gcd", ([4, 6], 2))).details == "the program does not define gcd"
    )


@needs_sandbox
def test_each_case_has_a_new_solution():
    memo = "class Solution:\n    def __init__(self): self.n = 0\n    def f(self, self_, target):\n"
    memo += "        self.n += target\n        return self.n"
    assert judge(memo, calls("f", ([0, 2], 2), ([0, 5], 5))).reason == "correct"
    tests = {
        "type": "humaneval",
        "prefix": "from typing import *\n",
        "entry_point": "Solution().f",
        "test": "def check(candidate):\n    for n in (2, 5):\n        assert candidate(0, target=n) == n\n",
    }
    assert judge(memo, tests).reason == "correct"
    assert judge(memo.replace("= 0", "= 1"), tests).details.startswith("test 1: AssertionError")
    assert "does not define Solution" in judge("def f(a, target): return target", tests).details


@needs_sandbox
def test_an_import_of_the_future_may_stand_behind_a_prefix():
    tests = {"type": "asserts", "prefix": "import math\n", "asserts": ["assert f(4) == 2"]}
    assert judge("from __future__ import annotations\ndef f(x: Q): return math.isqrt(x)", tests).reason == "correct"


@needs_sandbox
def test_arguments_may_have_any_name():
    names = ["self", "program", "target", "operation", "keywords", "arguments"]
    source = f"def f(*, {', '.join(names)}): return {' + '.join(names)}"
    given = ", ".join(f"{name}={number}" for number, name in enumerate(names))
    assert judge(source, {"type": "asserts", "asserts": [f"assert f({given}) == 15"]}).reason == "correct"


# The choice of the solution among blocks

SQUARE = "def f(x):\n    return x * x\n"
READER = "n = int(input())\nprint(n * n)\n"


def chosen(text: str, tests: dict, cpp: bool = False) -> str:
    return solution_of(closed_blocks(text), read_tests(json.dumps(tests)), cpp).source


def text_of(*blocks: tuple[str, str]) -> str:
    return "Thoughts.\n" + "\nThen:\n".join(f"```{tag}\n{source}```" for tag, source in blocks)


CALLED = {
    "calls": calls("f", ([2], 4)),
    "asserts": {"type": "asserts", "asserts": ["assert f(2) == 4", "assert math.isclose(f(3), 9)"]},
    "humaneval": {"type": "humaneval", "entry_point": "f", "test": "def check(c):\n    assert c(2) == 4\n"},
    "pytest": {"type": "pytest", "test": "from solution import f\ndef test_f():\n    assert f(2) == 4\n"},
}


@pytest.mark.parametrize("kind", CALLED)
@pytest.mark.parametrize(
    ("blocks", "solution"),
    [
        ([("python", SQUARE)], 0),
        ([("python", "def f(x): return 0\n"), ("python", SQUARE)], 1),
        ([("python", SQUARE), ("python", "print(f(3))\n")], 0),
        ([("python", SQUARE), ("", "9\n")], 0),
        ([("python", SQUARE), ("bash", "pip install f\n")], 0),
        ([("python", SQUARE), ("text", "def f(x): the square\n")], 0),
        ([("python", SQUARE), ("python", "def g(x): return f(x)\n")], 0),
        ([("python", SQUARE), ("python", "def f(x): return (\n")], 1),  # a mistake in the last attempt
        ([("python", SQUARE), ("py", "f = lambda x: 0\n")], 1),
        ([("python", SQUARE), ("Python3 run", "class A:\n  def f(self, x): return 0\n")], 1),
        ([("python", "x = 1\n"), ("python", "y = f == 2\n")], 1),  # none defines it: the last
        ([("java", "a\n"), ("java", "b\n")], 1),
    ],
)
def test_the_solution_is_the_last_block_that_defines_what_the_tests_call(kind, blocks, solution):
    assert chosen(text_of(*blocks), CALLED[kind]) == blocks[solution][1]


@pytest.mark.parametrize(
    ("blocks", "solution"),
    [
        ([("python", READER)], 0),
        ([("python", READER), ("", "3\n1 2 3\n")], 0),
        ([("python", READER), ("python", "def solve(n):\n    return n * n\n")], 0),
        ([("python", READER), ("python", "print(solve(3))\n")], 0),
        ([("python", READER), ("python", "def solve(n): return n * n\nprint(solve(3))\n")], 0),  # an example run
        ([("python", "n = input()\nprint(0)\n"), ("python", READER)], 1),
        ([("python", READER), ("python", "n = int(input()\nprint(n * n)\n")], 1),  # a mistake in the last attempt
        ([("python", "x = 1\n"), ("python", "print(9)\n")], 1),
        ([("python", "print(9)\n"), ("text", "print(input())\n")], 0),
        ([("python", "import sys\nfor l in sys.stdin: print(gcd(4, int(l)))\n"), ("python", "solve()\n")], 0),
        ([("python", "from sys import *\nprint(stdin.read())\n"), ("output", "9\n")], 0),
        ([("cpp", "int main() { std::cin >> n; std::cout << n; }\n"), ("python", READER)], 1),
        ([("python", READER), ("cpp", "int main() { std::cin >> n; std::cout << n; }\n")], 0),
    ],
)
def test_the_solution_of_a_task_on_stdin_is_the_last_whole_program(blocks, solution):
    assert chosen(text_of(*blocks), stdin(("3", "9"))) == blocks[solution][1]


def test_with_a_compiler_a_program_in_cpp_may_be_the_last():
    blocks = [("python", READER), ("cpp", "int main() { std::cin >> n; std::cout << n; }\n")]
    assert chosen(text_of(*blocks), stdin(("3", "9")), cpp=True) == blocks[1][1]


def test_several_names_are_looked_for_together():
    tests = {"type": "asserts", "asserts": ["s = Stack()\ns.push(1)\nassert top(s) == 1"]}
    both = "class Stack: pass\ndef top(s): pass\n"
    assert chosen(text_of(("python", both), ("python", "class Stack: pass\n")), tests) == both


def test_a_hostile_last_block_is_chosen_in_time():
    for source in ("(" * 60_000, "a<" * 30_000 + "a", "f" + "()" * 30_000, "-" * 60_000 + "1"):
        source = f"print(input(), {source})"
        assert solution_of([Block(tag="", source=source)], read_tests(json.dumps(stdin(("1", "1")))), False)


# Mistakes in tests


@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        (stdin(("5", ""), ("6", "\n")), "check nothing: every expected output is empty"),
        ({"type": "stdin_stdout", "cases": []}, "there is no test in it"),
        (
            {"type": "stdin_stdout", "cases": [{"input": ["1", "2"], "output": "3"}]},
            "must be text, got ['1', '2']; join",
        ),
        ({"type": "stdin_stdout", "cases": [{"input": "1", "output": None}]}, "cases[0].output must be text, got None"),
        ({"type": "stdin_stdout", "cases": "3"}, "cases must be a list, got '3'"),
        ({"type": "stdin_stdout", "cases": ["3"]}, "cases[0] must have input and output"),
        (calls("f", ("ab", "ab")), "inputs[0] must be the list of the function's arguments, got 'ab'"),
        (calls("f", ([1], 1), ({"a": 1}, 1)), "inputs[1] must be the list"),
        (calls("f", ([1], None), ([2], None)), "check nothing: every expected result is null"),
        (calls("f g", ([1], 1)), "fn_name must be the name of a function, got 'f g'"),
        ({"type": "asserts", "asserts": ["f(1)", "g = f(2)"]}, "there is no assert"),
        ({"type": "asserts", "asserts": ["assert True, f(1)", "assert (f(1) == 2, 'no')"]}, "there is no assert"),
        ({"type": "asserts", "asserts": ["assert f("]}, "cannot be compiled"),
        ({"type": "asserts", "asserts": [1]}, "asserts[0] must be source code, got 1"),
        ({"type": "asserts", "asserts": "assert f(1)"}, "asserts must be a list"),
        ({"type": "humaneval", "test": "def check(c):\n    c(1)", "entry_point": "f"}, "there is no assert"),
        ({"type": "humaneval", "test": "assert f(1)", "entry_point": "f"}, "test must define check(candidate)"),
        ({"type": "humaneval", "test": "def check(c):\n    assert c(1)", "entry_point": "f()"}, "entry_point must be"),
        ({"type": "pytest", "test": "def helper():\n    assert f(1)"}, "functions whose names begin with test"),
        ({"type": "pytest", "test": "def test_f():\n    f(1)"}, "there is no assert"),
        ({"type": "pytest"}, "test must be text, got no such key"),
    ],
)
def test_what_is_wrong_with_tests_is_said(tests, problem):
    assert problem in problem_of_tests(json.dumps(tests))
    judgement = judge_response("```python\nx = 1\n```", json.dumps(tests), SETTINGS)
    assert (judgement.reason, judgement.details.startswith("the tests cannot be used: ")) == ("error", True)


@pytest.mark.parametrize(
    "tests",
    [
        stdin(("5", ""), ("6", "1")),
        {"type": "stdin_stdout", "cases": [{"input": 5, "output": 2.5}]},
        calls("f", ([], None), ([1], [])),
        {
            "type": "asserts",
            "asserts": ["r = f(1)", "assert r, 'no'", "import numpy\nnumpy.testing.assert_equal(r, 1)"],
        },
        {"type": "asserts", "asserts": ["check(f)"], "setup": "def check(c):\n    if c(1) != 2: raise ValueError"},
        {
            "type": "humaneval",
            "test": "def check(c):\n    assert True, 'x'\n    assert c(1)",
            "entry_point": "Solution().f",
        },
        {"type": "pytest", "test": "class TestF:\n    def test_f(self):\n        self.assertEqual(f(1), 2)"},
    ],
)
def test_tests_that_check_something_are_no_problem(tests):
    assert problem_of_tests(json.dumps(tests)) is None


# numpy


@needs_sandbox
def test_programs_have_numpy_where_it_is_installed():
    sandbox = runner(SETTINGS)._sandbox
    same_version = sandbox.run_python("import sys; print(sys.version_info[:2])", b"", Limits()).stdout
    ours = f"{sys.version_info[:2]}".encode() == same_version.strip()
    if not sandbox.has_numpy and not ours:
        pytest.skip(f"{sandbox.python} has no numpy, and is another version than this Python")
    assert sandbox.has_numpy and "with numpy" in sandbox.description
    for imported in ("import numpy as np\n", ""):  # as the prelude gives it
        source = imported + "def f(x): return np.array(x) * 2"
        assert judge(source, calls("f", ([[1, 2]], [2, 4]))).reason == "correct"
    tests = {"type": "asserts", "asserts": ["import numpy as np\nassert np.allclose(f([1, 2]), [2, 4])"]}
    assert judge("import numpy\ndef f(x): return numpy.array(x) * 2", tests).reason == "correct"
    assert judge("print(np.arange(int(input())).sum())", stdin(("5", "10"))).reason == "correct"


def test_only_links_of_blas_into_usr_are_shown(tmp_path, monkeypatch):
    targets = {"libblas.so.3-x": "/usr/bin/env", "liblapack.so.3-x": "/etc/passwd", "editor": "/usr/bin/env"}
    for name, target in targets.items():
        (tmp_path / name).symlink_to(target)
    monkeypatch.setattr(sandbox_module, "_ALTERNATIVES", tmp_path)
    assert sandbox_module._blas_links() == ["--symlink", os.path.realpath("/usr/bin/env"), f"{tmp_path}/libblas.so.3-x"]


def test_the_examples_of_the_page_are_so():
    page = (Path(__file__).parents[1] / "docs" / "code_rewards.md").read_text(encoding="utf-8")
    rows = [line for line in page.partition("| expected |")[2].splitlines()[2:] if line.startswith("| `")]
    assert len(rows) >= 7
    for row in rows:
        (expected,), accepted, refused = (re.findall("`([^`]*)`", cell) for cell in row.strip("| ").split(" | "))
        assert [same_output(got, expected) for got in (*accepted, *refused)] == [
            *[True] * len(accepted),
            *[False] * len(refused),
        ], row


# LeetCode's lists and trees

NODES = """
from typing import *
class ListNode:
    def __init__(self, val=0, next=None): self.val, self.next = val, next
class TreeNode:
    def __init__(self, val=0, left=None, right=None): self.val, self.left, self.right = val, left, right
def listed(values):
    head = None
    for value in reversed(values): head = ListNode(value, head)
    return head
def same(a, b):
    while a and b:
        if a.val != b.val: return False
        a, b = a.next, b.next
    return not a and not b
"""
REVERSED = """
class Solution:
    def f(self, head: Optional[ListNode]) -> Optional[ListNode]:
        before = None
        while head: head.next, before, head = before, head, head.next
        return before
"""
NODE_TESTS = {
    "type": "humaneval",
    "prefix": NODES,
    "entry_point": "Solution().f",
    "test": "def check(candidate):\n    for n in (1, 5, 300):\n"
    "        assert same(candidate(head=listed(list(range(n)))), listed(list(range(n))[::-1]))\n",
}


@needs_sandbox
def test_lists_and_trees_of_the_tests_are_arguments_and_results():
    judgement = judge(REVERSED, NODE_TESTS)
    assert judgement.reason == "correct", judgement
    assert judge(REVERSED.replace("return before", "return before and before.next"), NODE_TESTS).reason == "wrong"
    depth = "class Solution:\n    def f(self, t): return 1 + max(self.f(t.left), self.f(t.right)) if t else 0"
    test = "def check(candidate):\n    assert candidate(TreeNode(1, TreeNode(2, None, TreeNode(3)))) == 3\n"
    assert judge(depth, {**NODE_TESTS, "test": test}).reason == "correct"
    circle = (
        "def check(candidate):\n    a = ListNode(1)\n    a.next = ListNode(2, a)\n    assert candidate(a) is True\n"
    )
    source = "class Solution:\n    def f(self, a): return a.next.next is a"
    assert judge(source, {**NODE_TESTS, "test": circle}).reason == "correct"
    several = "def check(candidate):\n    assert candidate([listed([1]), None, listed([2, 3])]) == 3\n"
    source = "class Solution:\n    def f(self, lists): return max(l.next.val for l in lists if l and l.next)"
    assert judge(source, {**NODE_TESTS, "test": several}).reason == "correct"


@needs_sandbox
@pytest.mark.parametrize(
    "source",
    [
        "class ListNode:\n    val = property(lambda s: 0)\n    next = None\n" + REVERSED,
        "class Any:\n    def __eq__(s, o): return True\n    __ne__ = lambda s, o: False\nclass Solution:\n"
        "    def f(self, head):\n        head.val = Any()\n        return head",
        "class ListNode:\n    def __getattr__(s, n): return s\n    def __eq__(s, o): return True\n"
        "    __ne__ = lambda s, o: False\n    def __bool__(s): return False\n"
        "class Solution:\n    def f(self, head): return ListNode()",
        "class Solution:\n    def f(self, head): return None",
        "class Solution:\n    def f(self, head): return head",
    ],
)
def test_lists_of_the_programs_please_nobody_who_expects_another(source):
    tests = {
        **NODE_TESTS,
        "test": "def check(candidate):\n    assert same(candidate(listed([1, 2])), listed([2, 1]))\n",
    }
    assert judge(source, tests).reason == "wrong"
