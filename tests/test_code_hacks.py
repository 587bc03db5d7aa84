"""Tests programs that solve nothing and want a reward: each is judged wrong, as root and as an ordinary user.

All of them face tests that a right program passes, which is shown first.
"""

import json
import os
import textwrap

import pytest
from sandboxed import ORDINARY_USER, USERS, as_user, why_not

from megatron_rl.reward.code import CodeSettings, judge_response, runner, warm_up

SETTINGS = CodeSettings(seconds=240.0, cpu_seconds=5, memory_bytes=512 * 1024**2)
MISSING = why_not(lambda: warm_up(SETTINGS))
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

HALF = {"type": "asserts", "asserts": ["assert abs(f(1.5) - 2.25) < 1e-6", "assert abs(f(3) - 9) < 1e-6"]}
SQUARE = {"type": "asserts", "asserts": ["assert f(2) == 4", "assert f(7) == 49", "assert f(-3) == 9"]}
INSIDE = {"type": "asserts", "asserts": ["assert 3.9 < f(2) < 4.1", "assert f(3) > 8.9 and f(3) <= 9"]}
DIVISORS = {"type": "asserts", "asserts": ["assert 4 in f(8) and 3 not in f(8)", "assert 5 in f(10)"]}
PAIRS = {"type": "asserts", "asserts": ["assert len(f(3)) == 3 and all(a == b for a, b in zip(f(3), [1, 4, 9]))"]}
PARTS = {
    "type": "asserts",
    "asserts": ["r = f(10)\nassert sum(r) == 10 and len(set(r)) == 4 and sorted(r) == list(r) and max(r) < 7"],
}
EVERY = {"type": "asserts", "asserts": ["assert all(map(f, range(2, 50)))", "assert not any(map(f, [51, 60]))"]}
TEXT = {"type": "asserts", "asserts": ["assert f('abc').startswith('cb')", "assert f('xy').upper() == 'YX'"]}
EVAL = {
    "type": "humaneval",
    "entry_point": "f",
    "prefix": "def f(x):\n    '''the square of x'''\n",
    "test": "def check(candidate):\n    for x in range(9):\n        assert candidate(x) == x * x, candidate(x)\n",
}
CALLS = {"type": "function_io", "fn_name": "f", "inputs": [[2], [7]], "outputs": [4, 49]}
LINES = {"type": "stdin_stdout", "cases": [{"input": "2\n", "output": "4\n"}, {"input": "7\n", "output": "49\n"}]}
RECORD = {
    "type": "asserts",
    "setup": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int",
    "asserts": ["assert f(3) == P(9)"],
}
POINT = {"type": "asserts", "asserts": ["assert f(3) != 4 and f(3) == 9", "assert f(5) is not None and f(5) == 25"]}
TRIES = {
    "type": "asserts",
    "asserts": ["try:\n    ok = f(3) == 9\nexcept BaseException:\n    ok = True\nassert ok", "assert f(2) == 4"],
}

RIGHT = {
    "def f(x): return x * x": [HALF, SQUARE, INSIDE, EVAL, CALLS, POINT, TRIES],
    "def f(n): return [d for d in range(1, n + 1) if n % d == 0]": [DIVISORS],
    "def f(n): return [i * i for i in range(1, n + 1)]": [PAIRS],
    "def f(n): return [1, 2, 3, 4]": [PARTS],
    "def f(n): return n < 50": [EVERY],
    "def f(s): return s[::-1]": [TEXT],
    "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(x): return P(x * x)": [RECORD],
    "print(int(input()) ** 2)": [LINES],
}


@pytest.mark.parametrize("source", RIGHT)
def test_a_right_program_passes_the_tests_that_the_others_face(source):
    for tests in RIGHT[source]:
        judgement = judge(source, tests)
        assert judgement.reason == "correct", (tests, judgement)


def judge(source: str, tests: dict):
    return judge_response(f"```python\n{textwrap.dedent(source)}\n```", json.dumps(tests), SETTINGS)


# Writes forged answers to all descriptors. One is the socket over which the program's side answers the tests.
SEND = """
import os
def send(*lines):
    for fd in range(3, 64):
        for line in lines:
            try: os.write(fd, line)
            except OSError: break
"""

HACKS = {
    # The process ends, and says that all is well.
    "exit at once": (SQUARE, "import os\nos._exit(0)"),
    "exit in the function": (EVAL, "import os\ndef f(x): os._exit(0)"),
    "system exit": (EVAL, "def f(x): raise SystemExit(0)"),
    "keyboard interrupt": (EVERY, "def f(x): raise KeyboardInterrupt"),
    "exit while a file of a test is read": (LINES, "import sys\nsys.exit(0)"),
    "exec of another program": (SQUARE, "import os\nos.execv('/usr/bin/true', ['true'])"),
    # Exceptions that mean something to a loop or to a test.
    "stop iteration": (EVERY, "def f(x): raise StopIteration"),
    "stop iteration for all but the last": (
        {"type": "asserts", "asserts": ["assert list(map(f, [1, 2])) != [1, 4]", "assert f(1) == 1"]},
        "def f(x): raise StopIteration",
    ),
    "a subclass of stop iteration": (EVERY, "class E(StopIteration): pass\ndef f(x): raise E"),
    "stop async iteration": (
        {
            "type": "asserts",
            "asserts": [
                "import asyncio\nasync def g():\n    for i in range(3): yield i\n"
                "async def h():\n    return [f(i) async for i in g()]\nassert asyncio.run(h()) == [0, 1, 4]"
            ],
        },
        "def f(x): raise StopAsyncIteration",
    ),
    "generator exit": (EVERY, "def f(x): raise GeneratorExit"),
    "assertion error that is caught": (SQUARE, "def f(x): raise AssertionError"),
    "an exception whose text raises": (
        EVAL,
        "class E(Exception):\n    def __str__(self): raise RuntimeError\ndef f(x): raise E",
    ),
    "a result whose text raises in the message of a failure": (
        EVAL,
        "class R:\n    def __str__(self): raise RuntimeError\n    __repr__ = __str__\ndef f(x): return R()",
    ),
    "an exception with the name of the tester's": (TRIES, "class Broken(Exception): pass\ndef f(x): raise Broken"),
    "import error as if a test could not run": (SQUARE, "def f(x): raise ImportError('numpy')"),
    # These objects are equal to everything.
    "equal to everything": (SQUARE, "class R:\n    def __eq__(self, o): return True\ndef f(x): return R()"),
    "different and equal": (
        POINT,
        "class R:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return True\ndef f(x): return R()",
    ),
    "an integer equal to everything": (
        SQUARE,
        "class R(int):\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x): return R()",
    ),
    "a text that starts with everything": (
        TEXT,
        "class R(str):\n    def startswith(self, p): return True\n    def upper(self): return 'YX'\n"
        "def f(s): return R()",
    ),
    "an object that starts with everything": (
        TEXT,
        "class R:\n    def startswith(self, p): return True\n    def upper(self): return 'YX'\ndef f(s): return R()",
    ),
    "a module that starts with everything": (
        TEXT,
        "import sys\nm = type(sys)('m')\nm.startswith = lambda p: True\nm.upper = lambda: 'YX'\ndef f(s): return m",
    ),
    "a class that starts with everything": (
        TEXT,
        "class R:\n    startswith = staticmethod(lambda p: True)\n    upper = staticmethod(lambda: 'YX')\n"
        "def f(s): return R",
    ),
    "an exception that is made by every call": (
        TEXT,
        "class E(Exception): pass\nclass R:\n    startswith = upper = E\ndef f(s): return R()",
    ),
    "a difference of nothing": (HALF, "class R:\n    def __sub__(self, o): return 0.0\ndef f(x): return R()"),
    "a difference that is an object": (
        HALF,
        "class R:\n    def __sub__(self, o): return self\n    def __abs__(self): return self\n"
        "    def __lt__(self, o): return True\ndef f(x): return R()",
    ),
    "a reflected difference": (
        {"type": "asserts", "asserts": ["assert abs(2.25 - f(1.5)) < 1e-6"]},
        "class R:\n    def __rsub__(self, o): return 0.0\ndef f(x): return R()",
    ),
    "an operand that is kept for the next test": (
        SQUARE,
        "seen = []\nclass R:\n    def __eq__(self, o):\n        seen.append(o)\n        return True\n"
        "def f(x): return seen[-1] if len(seen) > 2 else R()",
    ),
    "before and behind everything": (
        INSIDE,
        "class R:\n    def __lt__(self, o): return True\n    __gt__ = __le__ = __ge__ = __lt__\ndef f(x): return R()",
    ),
    "an object that contains what it should": (
        DIVISORS,
        "class R:\n    def __contains__(self, o): return o != 3\ndef f(x): return R()",
    ),
    "a list that contains what it should": (
        DIVISORS,
        "class R(list):\n    def __contains__(self, o): return o != 3\ndef f(x): return R()",
    ),
    "a generator of everything": (DIVISORS, "import itertools\ndef f(n): return itertools.count()"),
    "a float on demand": (
        {"type": "asserts", "asserts": ["import math\nassert math.isclose(f(1.5), 2.25)"]},
        "class R:\n    def __float__(self): return 2.25\ndef f(x): return R()",
    ),
    "rounded on demand": (
        {"type": "asserts", "asserts": ["assert round(f(1.5), 2) == 2.25"]},
        "class R:\n    def __round__(self, n=0): return 2.25\ndef f(x): return R()",
    ),
    "an index on demand": (
        {"type": "asserts", "asserts": ["assert 'abcde'[f(2)] == 'e'"]},
        "class R:\n    def __index__(self): return 4\ndef f(x): return R()",
    ),
    "three elements that are none": (
        PAIRS,
        "class R:\n    def __len__(self): return 3\n    def __iter__(self): return iter(())\ndef f(n): return R()",
    ),
    "three elements that are none, of a list": (
        PAIRS,
        "class R(list):\n    def __len__(self): return 3\n    def __iter__(self): return iter(())\n"
        "def f(n): return R()",
    ),
    "three elements that are none, of the function's own class": (
        PAIRS,
        "class f:\n    def __init__(self, n): pass\n    def __len__(self): return 3\n"
        "    def __iter__(self): return iter(())",
    ),
    "three elements that are none, of Solution itself": (
        {"type": "asserts", "asserts": [PAIRS["asserts"][0].replace("f(3)", "Solution().f(3)")]},
        "class Solution:\n    def f(self, n): return self\n    def __len__(self): return 3\n"
        "    def __iter__(self): return iter(())",
    ),
    "other elements each time": (
        PARTS,
        "class R:\n    n = 0\n    def __iter__(self):\n        self.n += 1\n"
        "        return iter([[10], [1, 2, 3, 4], [1, 2], [1, 2], [1]][self.n - 1])\ndef f(n): return R()",
    ),
    "an iterator that begins again": (
        PARTS,
        "class R:\n    def __init__(self): self.left = []; self.n = 0\n    def __iter__(self): return self\n"
        "    def __next__(self):\n        if self.left: return self.left.pop()\n        self.n += 1\n"
        "        self.left = [[10], [4, 3, 2, 1], [1], [1], [1]][self.n]\n        raise StopIteration\n"
        "def f(n):\n    r = R()\n    r.left = [10]\n    return r",
    ),
    "elements that equal everything": (
        {"type": "asserts", "asserts": ["assert f(3) == [1, 4, 9]", "assert sorted(f(2)) == [1, 4]"]},
        "class R:\n    def __eq__(self, o): return True\n    def __lt__(self, o): return True\n"
        "def f(n): return [R() for _ in range(n)]",
    ),
    "a key that equals everything": (
        {"type": "asserts", "asserts": ["assert f(3) == {3: 9}", "assert f(2)[2] == 4"]},
        "class R:\n    def __eq__(self, o): return True\n    def __hash__(self): return 3\n"
        "def f(n): return {R(): n * n}",
    ),
    "true when asked, and else false": (
        {"type": "asserts", "asserts": ["assert f(4) == True and f(5) == False"]},
        "class R:\n    def __bool__(self): return True\n    def __eq__(self, o): return True\ndef f(n): return R()",
    ),
    "a dataclass that equals everything": (
        SQUARE,
        "from dataclasses import dataclass\n@dataclass(eq=False)\nclass R:\n    x: int = 0\n"
        "    def __eq__(self, o): return True\ndef f(x): return R()",
    ),
    "a dataclass beside the test's": (
        RECORD,
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    def __eq__(self, o): return True\n"
        "def f(x): return P(1)",
    ),
    "a dataclass with a field that is always right": (
        RECORD,
        "from dataclasses import dataclass\nclass R:\n    def __eq__(self, o): return True\n@dataclass\nclass P:\n"
        "    x: int\ndef f(x): return P(R())",
    ),
    "an array by its interface": (
        {"type": "asserts", "asserts": ["import math\nassert math.dist(f(2), [4, 4]) == 0"]},
        "class R:\n    __array_interface__ = {'shape': (2,), 'typestr': '<i8', 'data': (0, False), 'version': 3}\n"
        "    def __iter__(self): return iter([4, 4])\ndef f(x): return R()",
    ),
    "a class that says it is another": (
        {"type": "asserts", "asserts": ["assert isinstance(f(2), int) and f(2) == 4"]},
        "class R:\n    __class__ = int\n    def __eq__(self, o): return True\ndef f(x): return R()",
    ),
    "an object that the test catches": (
        TRIES,
        "class R:\n    def __eq__(self, o): raise ValueError\ndef f(x): return R()",
    ),
    "a named tuple that equals everything": (
        SQUARE,
        "from collections import namedtuple\nclass R(namedtuple('R', 'x')):\n    def __eq__(self, o): return True\n"
        "def f(x): return R(0)",
    ),
    "the class of a name that the test binds": (
        {
            "type": "humaneval",
            "entry_point": "f",
            "test": "METADATA = {'author': 'jt'}\ndef check(candidate):\n    r = candidate(3)\n"
            "    assert len(r) == 3 and all(a == b for a, b in zip(r, [1, 4, 9]))\n",
        },
        "class f:\n    def __init__(s, n): s.n = n\n    def __len__(s): return s.n\n"
        "    def __iter__(s): return iter(())\nMETADATA = f",
    ),
    "the class of an attribute that the test names": (
        {"type": "asserts", "setup": "import unittest\nt = unittest.TestCase()", "asserts": PAIRS["asserts"]},
        "class TestCase:\n    def __len__(s): return 3\n    def __iter__(s): return iter(())\n"
        "def f(n): return TestCase()",
    ),
    "a function that is called Solution": (
        PAIRS,
        "class Solution:\n    def __init__(s, n): pass\n    def __len__(s): return 3\n"
        "    def __iter__(s): return iter(())\nf = Solution",
    ),
    "elements that are the function itself": (
        {
            "type": "asserts",
            "asserts": [
                "rows = list(f(2))\nassert len(rows) == 2\nfor row, want in zip(rows, [[1, 2, 3], [4, 5, 6]]):\n"
                "    assert len(row) == 3 and all(a == b for a, b in zip(row, want))"
            ],
        },
        "class R:\n    def __call__(s, n): return iter([s] * 2)\n    def __len__(s): return 3\n"
        "    def __iter__(s): return iter(())\nf = R()",
    ),
    "an attribute that is the function itself": (
        {
            "type": "asserts",
            "asserts": [
                "r = f([1, [2, 3]])\nassert r.val == 1 and len(r.sons) == 2\n"
                "assert all(c == v for c, v in zip(r.sons, [2, 3]))"
            ],
        },
        "class R:\n    def __call__(s, n): return N()\n    def __len__(s): return 2\n"
        "    def __iter__(s): return iter(())\nf = R()\nclass N:\n    val = 1\n    sons = f",
    ),
    "an exception that skips a test": (
        {
            "type": "asserts",
            "asserts": [
                "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(3), 9)\n"
                "tests = unittest.defaultTestLoader.loadTestsFromTestCase(T)\n"
                "import io\nassert unittest.TextTestRunner(io.StringIO()).run(tests).wasSuccessful()"
            ],
        },
        "import unittest\ndef f(x): raise unittest.SkipTest('no')",
    ),
    # These programs change what the tests use.
    "the tests' builtins": (
        HALF,
        "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True\ndef abs(x): return 0\n"
        "def f(x): return 7",
    ),
    "the tests' exceptions": (
        SQUARE,
        "import builtins\nbuiltins.AssertionError = ValueError\nclass AssertionError(Exception): pass\n"
        "def f(x): return 0",
    ),
    "the tests' check": (EVAL, "def check(candidate): pass\ndef f(x): return 0"),
    "the tests' module": (
        {"type": "asserts", "asserts": ["assert math.isclose(f(3), 9)"]},
        "class math:\n    isclose = staticmethod(lambda *_: True)\ndef f(x): return 0",
    ),
    "the tests' argument": (
        {"type": "asserts", "asserts": ["x = (3, 4)\nassert f(x) == [9, 16] and x == (3, 4)"]},
        "def f(x): return x",
    ),
    # The way of the answers.
    "an answer that is a verdict": (
        SQUARE,
        SEND + "send(b'[\"line\",[\"list\",\"passed\"]]\\n' * 9)\ndef f(x): return 0",
    ),
    "the end of a report": (
        EVAL,
        SEND + "send(b'[\"line\",[\"list\",\"begin\"]]\\n[\"line\",[\"list\",\"passed\"]]\\n"
        "[\"line\",[\"list\",\"end\",1]]\\n')\ndef f(x): return 0",
    ),
    "the words of a report, printed": (
        SQUARE,
        "print('pass 0\\npass 1\\npass 2\\nend 3', flush=True)\ndef f(x): return 0",
    ),
    "answers ahead of the questions": (
        CALLS,
        SEND + "send(b'[\"line\",[\"list\",\"value\",0,[\"list\"]]]\\n' * 5)\ndef f(x): return 0",
    ),
    "an object instead of an answer": (
        CALLS,
        SEND + "send(b'[\"line\",[\"object\",0,\"iterator\",\"R\"]]\\n' * 5)\ndef f(x): return 0",
    ),
    "a pickle": (SQUARE, SEND + "send(b'cposix\\n_exit\\n(I0\\ntR.\\n')\ndef f(x): return 0"),
    "names that change the tests' list": (
        SQUARE,
        SEND + "send(b'[\"line\",[\"list\",\"value\",[\"dict\",\"f\",4],[\"list\",[\"list\",0,[\"list\"]]]]]\\n' * 3)\n"
        "def f(x): return 0",
    ),
    "a line without end": (SQUARE, SEND + "send(b'[' * 10000000)\ndef f(x): return 0"),
    "other processes": (
        EVAL,
        "import os\nfor p in filter(str.isdigit, os.listdir('/proc')):\n"
        "    for n in range(64):\n        try:\n"
        "            with open(f'/proc/{p}/fd/{n}', 'wb', 0) as file: file.write(b'end 1\\n')\n"
        "        except OSError: pass\ndef f(x): return 0",
    ),
    "the parent": (
        EVAL,
        "import os, signal\nfor target in (os.getppid(), 1, -1):\n    try: os.kill(target, signal.SIGTERM)\n"
        "    except OSError: pass\ndef f(x): os._exit(0)",
    ),
    "the runner of programs on stdin": (
        LINES,
        """
        import ctypes, os
        runner = os.getppid()
        try:
            with open(f'/proc/{runner}/mem', 'r+b', 0) as memory:
                for line in open(f'/proc/{runner}/maps'):
                    span, mode, *_ = line.split()
                    start, end = (int(part, 16) for part in span.split('-'))
                    if mode == 'rw-p' and '[stack' not in line:
                        memory.seek(start)
                        data = memory.read(end - start)
                        memory.seek(start)
                        memory.write(data.replace(b'expected', b'whatever'))
        except OSError: pass
        """,
    ),
    "the files of the runner of programs on stdin": (
        LINES,
        """
        import os
        for n in os.listdir('/proc/1/fd'):
            for line in (b'["line",["list","value",["list",0,"4",""],["list"]]]\\n', b'pass 0\\npass 1\\nend 2\\n'):
                try:
                    with open('/proc/1/fd/' + n, 'wb', 0) as file: file.write(line)
                except OSError: pass
        """,
    ),
    "nothing on stdin's way": (LINES, ""),
    "a report on stdin's way": (LINES, "print('pass 0')\nprint('end 2')"),
    "the runner's fork": (
        LINES,
        "import os\nos.fork = lambda: 1\nos.waitpid = lambda *a: (1, 0)\nprint(0)",
    ),
    "the frames of whoever called": (
        CALLS,
        "import gc, sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for value in list(frame.f_locals.values()):\n"
        "            if isinstance(value, (list, tuple)) and 49 in value: return 49\n        frame = frame.f_back\n"
        "    for o in gc.get_objects():\n        if isinstance(o, (list, tuple)) and 49 in o: return 49\n    return 4",
    ),
    "the helper's own functions": (
        CALLS,
        "import sys\nm = sys.modules['megatron_rl.reward.code_program']\n"
        "m.solve = m.OPERATIONS['solve'] = lambda *a: True\nm.pack = lambda v, *a: b'[\"line\",true]'\n"
        "def f(x): return 0",
    ),
    "a result that is the failure of nobody": (CALLS, "class R: pass\ndef f(x): return R()"),
    "a number that is not one": (INSIDE, "def f(x): return float('nan')"),
}  # fmt: skip


@pytest.fixture(scope="module", params=USERS, ids=lambda user: "ordinary" if user == ORDINARY_USER else f"user{user}")
def judged(request):
    """Judge every hack in one sandbox of this user."""

    def work():
        runner.cache_clear()
        return {name: judge(source, tests) for name, (tests, source) in HACKS.items()}

    return as_user(request.param, work)


@pytest.mark.parametrize("name", HACKS)
def test_a_hack_comes_out_wrong(name, judged):
    judgement = judged[name]
    assert (judgement.reason, judgement.verdict().score) == ("wrong", 0.0), judgement


def test_there_are_enough_of_them():
    assert len(HACKS) >= 60 and len(USERS) == (2 if os.geteuid() == 0 else 1)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class R:\n    def __eq__(self, o): return True\ndef f(x): return R()", "compared with a plain value (int)"),
        ("class R:\n    def __add__(self, o): return 4\ndef f(x): return R() if x else 0", "compared with a plain"),
        ("def f(x): raise StopIteration", "RuntimeError: StopIteration"),
        ("def f(x): raise ValueError('\\x1b[2J\\x07' + 'x' * 10**6)", "ValueError: \\x1b[2J\\x07xxx"),
        ("def f(x):\n    y = []\n    for _ in range(500): y = [y]\n    return y", "nested deeper than 100"),
        ("def f(x): return 'x' * (9 << 20)", "more than 8388608"),
    ],
)
def test_the_details_say_what_was_refused(source, said):
    judgement = judge(source, SQUARE)
    assert said in judgement.details and len(judgement.details) <= 400
    assert judgement.details.replace("\n", "").isprintable()
