"""Tests files for pytest and unittest: what the judge takes from them, and that cheating passes none."""

import json

import pytest
from sandboxed import USERS, as_user, why_not

from megatron_rl.reward.code import CodeSettings, judge_response, runner, warm_up

SETTINGS = CodeSettings(seconds=240.0, cpu_seconds=5, memory_bytes=512 * 1024**2)
MISSING = why_not(lambda: warm_up(SETTINGS))
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
SQUARE = "def f(x):\n    return x * x\n"


def judge(source: str, tests: dict):
    return judge_response(f"```python\n{source}\n```", json.dumps(tests), SETTINGS)


FILE = """
import math
import pytest
from math import floor as test_floor
from solution import area, Stack, Empty

@pytest.fixture
def stack():
    made = Stack()
    made.push(1)
    yield made
    assert made.size() >= 0

@pytest.fixture(autouse=True)
def nothing(): pass

def helper(stack, n):
    for _ in range(n): stack.push(n)

@pytest.mark.parametrize("r, expected", [(1, math.pi), (2, 4 * math.pi), pytest.param(0, 0, id="none")])
@pytest.mark.parametrize("factor", [1, 1.0])
def test_area(r, expected, factor):
    assert area(r * factor) == pytest.approx(expected)
    assert [area(r)] == pytest.approx([expected], abs=1e-9)

def test_errors():
    with pytest.raises(ValueError, match="neg.*") as caught:
        area(-1)
    assert "negative" in str(caught.value)
    with pytest.raises(Empty):
        Stack().pop()

@pytest.mark.slow
def test_stack(stack):
    helper(stack, 2)
    assert stack.size() == 3 and stack.pop() == 2

@pytest.mark.skip(reason="not yet")
def test_not_yet(): assert False

@pytest.mark.asyncio
async def test_later(): assert area(0) == 0

class TestStack:
    def setup_method(self): self.stack = Stack()
    def test_empty(self): assert self.stack.size() == 0
    def test_fixture(self, stack): assert stack.pop() == 1
"""
GOOD = """
from math import pi
class Empty(Exception): pass
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def size(self): return len(self.items)
    def pop(self):
        if not self.items: raise Empty("empty")
        return self.items.pop()
def area(r):
    if r < 0: raise ValueError("negative radius")
    return pi * r * r
"""


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("", "", ""),
        ("pi * r * r", "3.1416 * r * r", "test 1: test_area(r=1, expected=3.14159"),
        ('raise ValueError("negative radius")', "return 0", "test_errors() fails no ValueError was raised"),
        ("negative radius", "no", "does not match"),
        ('Empty("empty")', 'KeyError("empty")', "KeyError"),
        ("append(item)", "insert(0, item)", "test_stack() fails"),
        ("self.items = []", "self.items = [0]", "fails"),
        ("class Stack", "class Pile", "the program does not define Stack"),
        ("def area(r):", "def area(r):\n    if r == 0: return 1e-5", "test_area"),
    ],
)
def test_files_for_pytest_are_run(before, after, found):
    judgement = judge(GOOD.replace(before, after) if before else GOOD, {"type": "pytest", "test": FILE})
    assert judgement.reason == ("wrong" if found else "correct"), judgement
    assert found in judgement.details
    assert found or judgement.num_passed == 6 + 1 + 1 + 1 + 2


def test_cases_of_unittest_are_run():
    test = "import unittest\nfrom solution import f\nclass Cases(unittest.TestCase):\n"
    test += "    def setUp(self): self.n = 3\n    def test_square(self): self.assertEqual(f(self.n), 9)\n"
    test += "    def test_error(self):\n        with self.assertRaises(TypeError): f('a', 'b')\n"
    test += "if __name__ == '__main__':\n    unittest.main()\n"
    assert judge(SQUARE, {"type": "pytest", "test": test}).num_passed == 2
    assert judge("def f(x): return 8", {"type": "pytest", "test": test}).reason == "wrong"


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("def test_a(capsys):\n    f(1)\n    assert capsys.readouterr().out", "need the fixture 'capsys'"),
        ("import pytest\ndef test_a():\n    with pytest.warns(UserWarning): assert f(1) == 1", "need pytest.warns"),
        ("import pandas_is_not_here\ndef test_a(): assert f(1) == 1", "need what the sandbox's Python does not have"),
        ("import pytest\n@pytest.mark.skip\ndef test_a(): assert f(1) == 1", "no test that runs"),
        (
            "import pytest\n@pytest.fixture(params=[1])\ndef a(): pass\ndef test_a(a): assert f(1)",
            "fixture(params=...)",
        ),
    ],
)
def test_files_that_need_more_than_the_judge_has_are_an_error_of_the_data(test, message):
    judgement = judge(SQUARE, {"type": "pytest", "test": test})
    assert (judgement.reason, message in judgement.details) == ("error", True), judgement


ATTACKED = """
import pytest
from solution import f, Stack
import solution

@pytest.fixture
def three(): return 3

@pytest.mark.parametrize("x", [2, 7])
def test_near(x):
    assert f(x) == pytest.approx(x * x)
    assert pytest.approx([x * x]) == [f(x)]

def test_three(three):
    assert solution.f(three) == 9

def test_error():
    with pytest.raises(TypeError):
        f("a")

def test_stack():
    s = Stack()
    s.push(4)
    assert s.pop() == 4
"""
STACK = """
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def pop(self): return self.items.pop()
"""
HACKS = {
    "equal to everything": "class R:\n    def __eq__(self, o): return True\ndef f(x): return R()",
    "a number equal to everything": "class R(float):\n    def __eq__(self, o): return True\ndef f(x): return R(1)",
    "a difference of nothing": "class R:\n    def __sub__(self, o): return 0\n    __rsub__ = __sub__\n"
    "    def __abs__(self): return 0\n    def __float__(self): return 0.0\ndef f(x): return R()",
    "a list of everything": "class R(list):\n    def __eq__(self, o): return True\ndef f(x): return R()",
    "an array by its methods": "class R:\n    def tolist(self): return 4\nR.__module__ = 'numpy'\ndef f(x): return R()",
    "every exception": "def f(x): raise TypeError",
    "a fixture of the program's": "def f(x): return 8\nf._fixture = 'three'\nf._autouse = True\nthree = f",
    "a test of the program's": "def f(x): return 8\nf._skipped = True\nf.__module__ = 'tests'\ntest_near = f",
    "an exception that skips": "import unittest\ndef f(x): raise unittest.SkipTest",
    "another pytest": "import sys\nclass P:\n    def __getattr__(self, n): return lambda *a, **k: 0\n"
    "sys.modules['pytest'] = P()\npytest = P()\ndef f(x): return 8",
    "the name of the stand-in's exception": "class Unsupported(BaseException): pass\ndef f(x): raise Unsupported",
    "not a number": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "exit": "import os\ndef f(x): os._exit(0)",
    "an object for the test's own": "class R:\n  def __call__(s, x): return s\n  __eq__ = lambda s, o: True\nf = R()",
}


def test_a_right_program_passes_the_tests_that_the_others_face():
    judgement = judge(SQUARE + STACK, {"type": "pytest", "test": ATTACKED})
    assert (judgement.reason, judgement.num_passed) == ("correct", 5), judgement


@pytest.mark.parametrize("user", USERS)
def test_programs_that_solve_nothing_are_wrong(user):
    def verdicts():
        runner.cache_clear()
        tests = {"type": "pytest", "test": ATTACKED}
        judged = {name: judge(source + STACK, tests) for name, source in HACKS.items()}
        return {name: (judgement.reason, judgement.details) for name, judgement in judged.items()}

    assert {name: told for name, told in as_user(user, verdicts).items() if told[0] != "wrong"} == {}


def test_a_stack_that_equals_everything_is_wrong():
    stack = "class R:\n    def __eq__(self, o): return True\nclass Stack:\n    def push(self, x): pass\n"
    stack += "    def pop(self): return R()\n"
    assert judge(SQUARE + stack, {"type": "pytest", "test": ATTACKED}).reason == "wrong"
