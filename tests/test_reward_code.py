"""Tests code rewards: the block that counts, every kind of test, and programs that attack the tests."""

import asyncio
import dataclasses
import http.server
import json
import os
import resource
import threading
import time
from pathlib import Path

import pytest
from sandboxed import why_not

from megatron_rl.config.reward import CodeSection, RewardSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.reward.code import CodeSettings, judge_code, judge_response, runner, settle_code, warm_up
from megatron_rl.reward.code_answer import Block, closed_blocks
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.sandbox import Sandbox, SandboxUnavailable
from megatron_rl.reward.sandbox_run import Limits
from megatron_rl.reward.score import Attempt

DATA = Path(__file__).parents[2] / "shared" / "data" / "code_dev.jsonl"
GXX = "/usr/bin/g++"
SETTINGS = CodeSettings(seconds=240.0, cpu_seconds=5, memory_bytes=512 * 1024**2)
MISSING = why_not(lambda: warm_up(SETTINGS))
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def fenced(source: str, tag: str = "python") -> str:
    return f"Some thoughts.\n\n```{tag}\n{source}\n```\nDone."


def judge(source: str, tests: dict, settings: CodeSettings = SETTINGS, tag: str = "python"):
    return judge_response(fenced(source, tag), json.dumps(tests), settings)


SQUARES = {"type": "asserts", "asserts": ["assert f(1) == 1", "assert f(3) == 9", "assert f(-2) == 4"]}
DOUBLE = {"type": "stdin_stdout", "cases": [{"input": "1\n", "output": "2\n"}, {"input": "21\n", "output": "42"}]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\na\n```", ("python", "a\n")),
        ("```python\na\n```\nthen\n```\nb\nc\n```\n", ("", "b\nc\n")),
        ("```Python3 title=x\na\n```", ("python3 title=x", "a\n")),
        ("````\n```\nnot the end\n```\n````", ("", "```\nnot the end\n```\n")),
        ("```\na\n```python\nb\n```", ("", "a\n```python\nb\n")),
        ("   ```py\na\n   ```", ("py", "a\n")),
        ("```\n```", ("", "")),
        ("```python\na\n```\n```python\nb", None),
        ("no `code` here", None),
        ("x ```python\na\n```", None),
        ("1. so:\n     ```py\n     a\n       b\n     ```", ("py", "a\n  b\n")),
        ('```\na = """\n    ```\n"""\n```', ("", 'a = """\n    ```\n"""\n')),
        ("<think>\n```python\na\n</think>\n```python\nb\n```", ("python", "b\n")),
        ("<think>\n```python\na\n```\n</think>\n```python\nb", None),
        ("", None),
    ],
)
def test_the_last_closed_block_is_found(text, expected):
    last = closed_blocks(text)[-1:]
    assert last == ([] if expected is None else [Block(tag=expected[0], source=expected[1])])


def test_a_long_response_of_fences_takes_linear_time():
    start = time.process_time()
    closed_blocks("```python\n" * 200_000)
    closed_blocks("`" * 1_000_000)
    assert time.process_time() - start < 3.0


def test_a_response_without_a_block_is_no_answer():
    verdict = judge_code("f = 1", json.dumps(SQUARES), SETTINGS)
    assert (verdict.score, verdict.reason) == (0.0, "no_answer")


@needs_sandbox
def test_a_right_program_scores_one_and_a_wrong_one_says_which_test_failed():
    right = judge_code(fenced("def f(x): return x * x"), json.dumps(SQUARES), SETTINGS)
    assert (right.score, right.reason) == (1.0, "correct")
    wrong = judge("def f(x): return x if x == 1 else 9", SQUARES)
    assert (wrong.verdict().score, wrong.reason, wrong.num_passed) == (0.0, "wrong", 2)
    assert wrong.details == "test 3: assert f(-2) == 4 fails"


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "reason", "details"),
    [
        ("def f(x: return x", "wrong", "SyntaxError"),
        ("1 / 0\ndef f(x): return x * x", "wrong", "ZeroDivisionError: division by zero"),
        ("def g(x): return x * x", "wrong", "test 1: NameError: name 'f' is not defined"),
        ("def f(x): raise KeyError('no')", "wrong", "test 1: KeyError"),
        ("def f(x): return f(x)", "wrong", "RecursionError"),
        ("import numpy_that_is_not_there", "wrong", "ModuleNotFoundError"),
        ("def f(x): return [0] * 10**10", "wrong", "MemoryError"),
    ],
)
def test_a_program_that_breaks_is_wrong_and_the_details_say_how(source, reason, details):
    judgement = judge(source, SQUARES)
    assert judgement.reason == reason
    assert details in judgement.details


@needs_sandbox
def test_a_program_that_takes_too_long_is_too_slow_by_cpu_or_by_the_clock():
    impatient = CodeSettings(seconds=240.0, cpu_seconds=1)
    assert judge("while True: pass", SQUARES, impatient).reason == "too_slow"
    assert judge("while True: pass", DOUBLE, impatient).details == "test 1: CPU time"
    sleeps = "import time\ndef f(x):\n    time.sleep(10**6 * (x - 1))\n    return x * x"
    for seconds in (1.5, 15.0, 150.0):  # until the limit is one in which this machine gets to the second test
        slow = judge(sleeps, SQUARES, CodeSettings(seconds=seconds))
        if slow.details.startswith("in test 2"):
            break
    assert (slow.reason, slow.details) == ("too_slow", f"in test 2: over {seconds:g} s for the item")


@needs_sandbox
@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "def f(x):\n    import os\n    os._exit(0)",
        "def f(x):\n    raise SystemExit",
        # These answers claim to equal everything.
        "class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()",
        "class Any(int):\n    def __eq__(self, other): return True\ndef f(x): return Any()",
        # Names that the tests use.
        "import builtins\nbuiltins.AssertionError = ValueError\ndef check(c): pass\ndef f(x): return 0",
        # The report of a test that passed, on every file there is.
        "import os\nfor p in os.listdir('/proc'):\n  for n in range(30):\n    try:\n"
        "      with open(f'/proc/{p}/fd/{n}', 'wb') as f: f.write(b'pass 0\\npass 1\\npass 2\\nend 3\\n')\n"
        "    except OSError: pass\n",
        "import os\nfor n in range(3, 64):\n  try: os.write(n, b'pass 0\\nend 1\\n')\n  except OSError: pass\n",
        # The tests in memory, on the stack and in the tester.
        "import gc, sys\ndef f(x):\n  frame = sys._getframe()\n  while frame:\n    for v in frame.f_locals.values():\n"
        "      if isinstance(v, dict) and 'asserts' in v: v['asserts'].clear()\n    frame = frame.f_back\n"
        "  for o in gc.get_objects():\n"
        "    if isinstance(o, list) and o and 'assert f(1) == 1' in map(str, o[:3]): o.clear()\n",
        "import os\ndef f(x):\n    os.kill(os.getppid(), 9)\n    os.kill(-1, 9)\n    os._exit(0)",
        "def f(x): print('pass 0\\npass 1\\npass 2\\nend 3', flush=True)",
    ],
)
def test_a_program_that_goes_for_its_tests_scores_nothing(source):
    judgement = judge(source, SQUARES)
    assert judgement.reason == "wrong", judgement


@needs_sandbox
@pytest.mark.parametrize("kind", ["asserts", "function_io"])
def test_a_program_is_alone_in_its_sandbox_and_what_is_expected_is_nowhere_in_its_memory(kind):
    # Right only if nothing is there. So it does not matter whether Yama keeps processes of one user apart.
    source = """
import os
assert os.getppid() == 0 and list(filter(str.isdigit, os.listdir('/proc'))) == ['1'], 'other processes'
links = ['/proc/self/fd/' + fd for fd in os.listdir('/proc/self/fd')]
files = [os.readlink(link) for link in links if os.path.lexists(link)]
assert all(name.startswith(('/dev/null', 'socket:', 'pipe:')) for name in files), files
for line in open('/proc/self/maps'):
    start, end = (int(part, 16) for part in line.split()[0].split('-'))
    if ' r' in line and '[v' not in line:
        with open('/proc/self/mem', 'rb', 0) as file:
            file.seek(start)
            memory = file.read(end - start)
        place = memory.find(b'321234567')
        while place >= 0:
            assert list(memory[place + 9 : place + 11]) != [56, 57], 'what is expected'
            place = memory.find(b'321234567', place + 1)
def f(x): return x if x == 1 else 32123456787 + x
"""
    tests = {
        "asserts": {"type": "asserts", "asserts": ["assert f(1) == 1", "assert f(2) == 32123456789"]},
        "function_io": {"type": "function_io", "fn_name": "f", "inputs": [[1], [2]], "outputs": [1, 32123456789]},
    }
    judgement = judge(source, tests[kind])
    assert judgement.reason == "correct", judgement
    leaky = judge(source.replace("32123456787 + x", "32123456789"), tests[kind])
    assert "what is expected" in leaky.details, leaky  # the look into memory finds what is there


@needs_sandbox
def test_a_module_that_the_tests_name_is_the_real_one_and_a_function_may_bear_a_modules_name():
    fake = "class math:\n    @staticmethod\n    def isclose(*_): return True\ndef f(x): return 0"
    assert judge(fake, {"type": "asserts", "asserts": ["assert math.isclose(f(3), 9)"]}).reason == "wrong"
    assert (
        judge("def bisect(x): return x", {"type": "asserts", "asserts": ["assert bisect(3) == 3"]}).reason == "correct"
    )


@needs_sandbox
def test_the_pool_kind_settles_what_needs_no_run_and_judges_the_rest():
    assert settle_code("nothing", json.dumps(SQUARES)) == judge_code("nothing", json.dumps(SQUARES))
    settled = settle_code(fenced("def f(x): return x * x"), json.dumps(SQUARES))
    assert settled == fenced("def f(x): return x * x")
    assert judge_code(settled, json.dumps(SQUARES), SETTINGS).reason == "correct"
    texts = [fenced("def f(x): return x * x"), "nothing", fenced("def f(x): return 1")]

    async def judged(rewards: Rewards) -> list[str]:
        task = Prompt(id="p", domain="code", prompt="square", answer=json.dumps(SQUARES))
        return [verdict.reason for verdict in await rewards.verdicts(task, [Attempt(text=text) for text in texts])]

    with Rewards(RewardSection(kind="code", workers=1, code=CodeSection(seconds=240))) as rewards:
        assert asyncio.run(judged(rewards)) == ["correct", "no_answer", "wrong"]


def test_the_configuration_has_the_settings_fields_and_defaults():
    assert CodeSettings(**CodeSection().model_dump()) == CodeSettings()
    assert set(CodeSection.model_fields) == {field.name for field in dataclasses.fields(CodeSettings)}


@needs_sandbox
def test_text_that_is_no_text_costs_only_itself():
    assert judge("def f(x): return '\ud800'", SQUARES).reason == "wrong"
    assert judge("def f(x): return x\0", SQUARES).reason == "wrong"
    broken = {"type": "stdin_stdout", "cases": [{"input": "\ud800", "output": ""}]}
    assert judge("print()", broken).reason == "error"
    assert judge("(" * 100_000, SQUARES).reason == "wrong"
    assert judge("def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y", SQUARES).reason == "wrong"


@needs_sandbox
def test_an_answer_forged_as_a_pickle_cannot_touch_the_tester():
    # One frame calls os._exit in the process that decodes it. Another makes int's equality true.
    forge = """
import os, sys
def f(x):
    for fd in range(3, 20):
        try: os.write(fd, len(DATA).to_bytes(8, 'little') + DATA)
        except OSError: pass
    return 0
DATA = {data!r}
"""
    for data in (
        b"cposix\n_exit\n(I0\ntR.",
        b"cbuiltins\neval\n(V1\ntR.",
        b"cbuiltins\nint\n(NX\x06\x00\x00\x00__eq__cbuiltins\nint\nd\x86b.",
        b"\x80\x04",
    ):
        judgement = judge(forge.format(data=data), SQUARES)
        assert judgement.reason == "wrong", (data, judgement)
        assert judgement.num_passed == 0


@needs_sandbox
def test_helpers_and_builtins_that_the_tests_use_are_not_the_programs():
    tests = {
        "type": "humaneval",
        "entry_point": "root",
        "prefix": "def poly(c, x):\n    return c[0] + c[1] * x\n\ndef root(c):\n    '''a zero of poly'''\n",
        "test": "import math\ndef check(candidate):\n    assert abs(poly([1, 2], candidate([1, 2]))) < 1e-6\n",
    }
    assert judge("def root(c): return -c[0] / c[1]", tests).reason == "correct"
    assert judge("    return -c[0] / c[1]", tests).reason == "correct"
    assert judge("def poly(c, x): return 0\ndef abs(x): return 0\ndef root(c): return 7", tests).reason == "wrong"


@needs_sandbox
def test_values_of_every_usual_kind_come_back_as_they_are():
    source = """
from collections import Counter, deque, namedtuple
import enum, math
Point = namedtuple("Point", "x y")
class Colour(enum.IntEnum): RED = 3
class Node:
    def __init__(self, value, next=None): self.value, self.next = value, next
    def __eq__(self, other): return self.value == other.value
def echo(x): return x
def point(): return Point(1, 2)
def count(t): return Counter(t)
def walk(n):
    for i in range(n): yield i
def total(node): return node.value + (total(node.next) if node.next else 0)
def fill(items): items.append(4)
def adder(n): return lambda m: n + m
def fail(): raise ValueError("bad")
"""
    asserts = [
        "for v in (1, 1.5, 'a', b'b', None, True, 2j, (1, (2,)), [1, [2]], {1: (2, 3)}, {1, 2}, frozenset([1])):\n"
        "    assert echo(v) == v and type(echo(v)) is type(v)",
        "assert point() == (1, 2)",
        "assert count('aab') == {'a': 2, 'b': 1}",
        "assert list(walk(3)) == [0, 1, 2]",
        "n = Node(1)\nn.next = Node(2)\nassert total(n) == 3 and n.next.value == 2",
        "assert Node(2) == Node(2) and Node(1) != Node(2)",
        "x = [1]\nfill(x)\nassert x == [1, 4]",
        "assert adder(2)(3) == 5",
        "assert int(Colour.RED) == 3 and echo(range(3)) == range(3)",
        "try:\n    fail()\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'bad'",
        "assert isinstance(echo([math.nan])[0], float)",
        "assert sorted(walk(3), reverse=True) == [2, 1, 0]",
    ]
    judgement = judge(source, {"type": "asserts", "asserts": asserts, "setup": "import math"})
    assert judgement.reason == "correct", judgement


@needs_sandbox
def test_values_of_the_standard_library_come_back_as_they_are():
    source = """
from collections import Counter, OrderedDict, deque, namedtuple
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
Point = namedtuple("Point", "x y")
def echo(x): return x
def price(): return Decimal("1.50")
def third(): return Fraction(1, 3)
def day(): return date(2024, 2, 29)
def later(d): return d + timedelta(days=1, hours=2)
def queue(): return deque([1, 2], 5)
def point(): return Point(1, y=2)
def first(p): return p.x
def keys(d): return d.keys()
"""
    asserts = [
        "assert price() == Decimal('1.5') and str(price()) == '1.50'",
        "assert third() * 3 == 1 and type(third()) is Fraction",
        "assert day() == date(2024, 2, 29) and day().weekday() == 3",
        "assert later(datetime(2024, 2, 28, 23)) == datetime(2024, 3, 1, 1) and later(day()) > day()",
        "assert queue() == deque([1, 2]) and queue().maxlen == 5 and list(queue()) == [1, 2]",
        "assert point() == (1, 2) and point().x == 1 and point()._fields == ('x', 'y')",
        "assert first(namedtuple('P', 'x')(7)) == 7",
        "assert keys({1: 2}) == {1} and list(keys({1: 2})) == [1] and 1 in keys({1: 2})",
        "for v in (Counter('aab'), OrderedDict(b=1, a=2), 10**5000, float('inf'), {(1, 2): {3}}, range(0, 9, 2)):\n"
        "    assert echo(v) == v and type(echo(v)) is type(v)",
    ]
    setup = "from collections import *\nfrom datetime import *\nfrom decimal import *\nfrom fractions import *"
    judgement = judge(source, {"type": "asserts", "asserts": asserts, "setup": setup})
    assert judgement.reason == "correct", judgement


@needs_sandbox
def test_what_objects_of_the_programs_classes_may_do_in_tests():
    source = """
import enum, functools, itertools, json
from dataclasses import dataclass, field
class Empty(Exception):
    pass
class Stack:
    limit = 5
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self):
        if not self.items: raise Empty("nothing to pop")
        return self.items.pop()
    def count(self, item): return self.items.count(item)
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __str__(self): return str(self.items)
    def __eq__(self, other): return self.items == other.items
    def __add__(self, other): return Stack(*self.items, *other.items)
    def __lt__(self, other): return len(self) < len(other)
    def merged(self, other): return self + other
    def __getitem__(self, index): return self.items[index]
    def __setitem__(self, index, item): self.items[index] = item
    def __contains__(self, item): return item in self.items
    def __neg__(self): return Stack(*[-item for item in self.items])
class Countdown:
    def __init__(self, start): self.start = start
    def __iter__(self):
        self.left = self.start
        return self
    def __next__(self):
        if self.left == 0: raise StopIteration
        self.left -= 1
        return self.left + 1
    def __len__(self): return self.start
class Broke(Exception):
    pass
class Poor(Broke):
    def __init__(self, missing):
        super().__init__("no")
        self.missing = missing
@dataclass
class Ticket:
    price: int
    number: int = field(default_factory=itertools.count().__next__, compare=False)
    np = 5
class Name:
    def __init__(self, text): self.text = text
    def __eq__(self, other): return self.text == other.text
    def __hash__(self): return hash(self.text)
def favour(x): return x * x
def ordered(items): items.sort()
def withdraw(amount): raise Poor(amount)
def parse(text): return json.loads(text)
def look(key): return {}[key]
def without(values, kind): return [v for v in values if not isinstance(v, kind)]
def apply(function, values): return [function(v) for v in values]
def folded(function, values): return functools.reduce(function, values)
def append(found): found["x"].append(1)
@dataclass
class Account:
    owner: str
    balance: int = 0
    def deposit(self, amount): self.balance += amount; return self.balance
class Node:
    def __init__(self, value, next=None): self.value, self.next = value, next
class Colour(enum.Enum):
    RED = 1
def largest(stack): return max(stack.items)
def favourite(): return Colour.RED
def build(values):
    node = None
    for value in reversed(values): node = Node(value, node)
    return node
def opened(): return Account("Ann", 5)
def total(account): return account.balance * 2
"""
    asserts = [
        "s = Stack(1)\ns.push(3)\nassert s.pop() == 3 and s.count(1) == 1 and s.items == [1] and Stack.limit == 5",
        "s = Stack(4, 2)\nassert len(s) == 2 and list(s) == [4, 2] and str(s) == f'{s}' == '[4, 2]'",
        "assert largest(Stack(4, 2)) == 4",
        "s = Stack(4, 2)\nassert s and not Stack() and sum(s) == 6",
        "assert isinstance(Stack(), Stack) and not isinstance(3, Stack) and not isinstance(Node(1), Stack)",
        "assert Stack(1) == Stack(1) != Stack(2) and Stack(1) + Stack(2) == Stack(1, 2) and Stack() < Stack(1)",
        "assert len(Stack(1) + Stack(2)) == 2 and sorted([Stack(1, 2), Stack(3)])[0] == Stack(3)",
        "try:\n    Stack().pop()\n    assert False\nexcept Empty as error:\n    assert str(error) == 'nothing to pop'",
        "a = Account('Ann')\nassert a.deposit(5) == 5 and a.balance == 5\na.balance = 7\nassert total(a) == 14",
        "assert opened() == Account('Ann', 5) and opened() != Account('Bob', 5) and opened().owner == 'Ann'",
        "assert favourite() == Colour.RED and favourite() is Colour.RED and favourite().value == 1",
        "node = build([1, 2])\nseen = []\nwhile node:\n    seen.append(node.value)\n    node = node.next\n"
        "assert seen == [1, 2] and node is None",
        "n = Node(1)\nn.next = Node(2, n)\nassert n.next.next is n and n.next != None and n.next.next.value == 1",
        "assert Stack(1).push(2).push(3).pop() == 3 and str(Stack(1).merged(Stack(2))) == '[1, 2]'",
        "c = Countdown(2)\nassert list(c) == [2, 1] and list(c) == [2, 1] and len(c) == 2",
        "try:\n    withdraw(5)\n    assert 0\nexcept Broke as e:\n    assert e.missing == 5 and str(e) == 'no'",
        "import json\ntry:\n    parse('{')\n    assert 0\nexcept json.JSONDecodeError as e:\n    assert e.pos == 1",
        "try:\n    look('k')\n    assert 0\nexcept KeyError as e:\n    assert e.args[0] == 'k'",
        "assert issubclass(Poor, Broke) and Stack(1).__dict__ == {'items': [1]}",
        "assert Ticket(1) == Ticket(1) != Ticket(2)",
        "s = Stack(5, 6)\ns[0] = 7\nassert s[0] == 7 and 6 in s and 5 not in s and (-s).items == [-7, -6]",
        "assert len({Name('a'), Name('a'), Name('b')}) == 2",
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
        "    assert list(pool.map(favour, range(99))) == [i * i for i in range(99)]",
        "items = [3, 1]\nordered(items=items)\nassert items == [1, 3]",
        "assert datetime.date(2024, 1, 1) < datetime.date.today() and copy.copy([1]) == [1]",
        "assert without((4, 7.7, 1), int) == [7.7] and apply(abs, [-1]) == [1] and apply(str.upper, ['a']) == ['A']",
        "import operator\nfrom collections import defaultdict\nd = defaultdict(list)\nappend(d)\n"
        "assert d == {'x': [1]} and d['y'] == [] and folded(operator.add, [1, 2]) == 3",
        "np, nt = 3, 4\nassert apply(float, [np, nt]) == [3.0, 4.0] and Ticket(1).np == 5",
    ]
    judgement = judge(source, {"type": "asserts", "asserts": asserts})
    assert judgement.reason == "correct", judgement
    own = {"type": "asserts", "asserts": ["assert total(Account('Eve', 4)) == 8 and opened() == Account('Ann', 5)"]}
    own["setup"] = "from dataclasses import dataclass\n@dataclass\nclass Account:\n    owner: str\n    balance: int = 0"
    assert judge(source, own).reason == "correct"


@needs_sandbox
def test_a_prefix_may_be_the_head_of_a_function_alone():
    tests = {"type": "humaneval", "entry_point": "f", "test": "def check(c):\n    assert c(3) == 9\n"}
    for head in ("def f(x):\n", "def f(x):\n    # the square\n"):
        assert judge("    return x * x", {**tests, "prefix": head}).reason == "correct"


def keys_of_one_hash(count: int) -> bytes:
    """Return packed keys of one hash: hash(-1) is hash(-2). Each comparison of two keys takes a while."""
    same = b'["tuple",' + b'["Fraction","0x1","0x2"],' * 12
    return b",".join(same + b",".join(b"-1" if n >> i & 1 else b"-2" for i in range(14)) + b"]" for n in range(count))


HOSTILE_ANSWERS = {
    "a complaint of many digits": b'["line",["list","value",["int","0x' + b"f" * 9000 + b'"],["list"]]]',
    "an array as a complaint": b'["line",["list","value",["numpy","|u1",[2],"0101"],["list"]]]',
    "a number of sixteen bytes": b'["line",["list","value",["numpy","<f16",null,"' + b"00" * 16 + b'"],["list"]]]',
    "text that is none": b'["line",["list","value",["numpy","<U1",[1],"ffffffff"],["list"]]]',
    "an array in an ordered dict": b'["line",["list","value",["OrderedDict","a",["numpy","|u1",[2],"0102"]],["list"]]]',
    "a long range": b'["line",["range",0,600000000,1]]',
    "an empty array of many rows": b'["line",["list","value",["numpy","|u1",[300000000,0],""],["list"]]]',
    "a long range as arguments": b'["line",["list","raised",null,"m","E","E",["range",0,600000000,1],["dict"]]]',
    "an exception without a name": b'["line",["list","raised",null,"m","E",["int","0xff"],["list"],["dict"]]]',
    "a signalling NaN": b'["line",["list","value",["Decimal","sNaN"],["list"]]]',
    "keys of one hash": b'["line",["list","value",["set",' + keys_of_one_hash(9000) + b'],["list"]]]',
}


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE_ANSWERS)
def test_no_answer_makes_the_judge_fail_or_wait(name):
    write = "for fd in range(3, 64):\n        try: os.write(fd, line + b'\\n')\n        except OSError: pass"
    tests = {"type": "function_io", "fn_name": "f", "inputs": [[2]], "outputs": [{"a": [1, 3]}]}
    for where in ("if True", "def f(x)"):
        source = f"import os\nline = {HOSTILE_ANSWERS[name]!r}\n{where}:\n    {write}\n"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        assert judge(source, tests).reason == "wrong"
        assert time.process_time() - start < 5.0
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


@needs_sandbox
@pytest.mark.parametrize(
    "test",
    [
        "errors = []\nfor i in range(3):\n    try: assert f(i) == i * i\n    except Exception as e: errors.append(e)\n"
        "if errors: raise errors[0]",
        "try: f(1)\nfinally:\n    try: assert f(2) == 4\n    except Exception: pass",
        "try: f(3)\nexcept Exception as e: raise type(e)(f'f(3) raised {e}') from e",
    ],
)
def test_an_import_error_of_the_program_is_its_own_however_it_travels(test):
    judgement = judge("def f(x): raise ImportError(str(x))", {"type": "asserts", "asserts": [test]})
    assert judgement.reason == "wrong", judgement


@needs_sandbox
def test_tests_that_need_what_the_sandbox_does_not_have_are_an_error():
    tests = {"type": "asserts", "setup": "import not_installed_anywhere", "asserts": ["assert f(1) == 1"]}
    judgement = judge("def f(x): return x", tests)
    assert (judgement.reason, "not_installed_anywhere" in judgement.details) == ("error", True)
    assert judge("import not_installed_anywhere\ndef f(x): return x", SQUARES).reason == "wrong"


@needs_sandbox
def test_function_calls_take_functions_and_solution_classes():
    tests = {"type": "function_io", "fn_name": "pair", "inputs": [[1, 2], [3, 4]], "outputs": [[1, 2], [3, 4]]}
    assert judge("def pair(a, b): return (a, b)", tests).reason == "correct"
    assert judge("class Solution:\n    def pair(self, a, b): return [a, b]", tests).reason == "correct"
    wrong = judge("def pair(a, b): return [a, 2]", tests)
    assert (wrong.reason, wrong.details) == ("wrong", "test 2: expected [3, 4], got [3, 2]")
    assert judge("def other(a, b): return [a, b]", tests).details == "the program does not define pair"
    wrapped = {"type": "function_io", "fn_name": "even", "inputs": [[1], [2]], "outputs": [[False], [True]]}
    assert judge("def even(n): return n % 2 == 0", wrapped).reason == "correct"


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("print(int(input()) * 2)", "correct"),
        ("import sys\nfor line in sys.stdin: print(int(line) * 2, end=' \\n\\n')", "correct"),
        ("n = int(open('/dev/stdin').read())\nprint(n * 2)\nexit()", "correct"),
        ("import threading, sys\ndef main(): sys.stdout.write(str(int(input()) * 2))\n"
         "if __name__ == '__main__':\n    t = threading.Thread(target=main); t.start()", "correct"),
        ("import os\nos.write(1, b'%d' % (int(os.read(0, 100)) * 2))\nos._exit(0)", "correct"),
        ("print('\\n\\n', int(input()) * 2)", "correct"),
        ("assert len(open(__file__).read()) > 10\nprint(int(input()) * 2)", "correct"),
        ("print(int(input()) + 1)", "wrong"),
        ("print(int(input()) * 2)\n1 / 0", "wrong"),
        ("print(int(input()) * 2)\nimport sys\nsys.exit(1)", "wrong"),
        ("print('2 2')", "wrong"),
        ("pass", "wrong"),
        ("while True: print('x' * 10000)", "wrong"),
        ("import gc\nn = input()\nfor o in gc.get_objects():\n"
         "  if isinstance(o, tuple) and len(o) == 2 and o[0] == n + '\\n': print(o[1])", "wrong"),
    ],
)  # fmt: skip
def test_programs_on_stdin_are_judged_by_what_they_print(source, reason):
    assert judge(source, DOUBLE).reason == reason


@needs_sandbox
def test_each_run_on_stdin_is_a_process_of_its_own():
    source = "import sys\nif hasattr(sys, 'seen'): print('again')\nelse: print(int(input()) * 2)\nsys.seen = True"
    assert judge(source, DOUBLE).reason == "correct"


@needs_sandbox
@pytest.mark.skipif(not os.access(GXX, os.X_OK), reason="there is no g++ on this machine: apt-get install g++")
def test_cpp_is_compiled_where_the_settings_name_a_compiler():
    settings = CodeSettings(seconds=240.0, cpp_compiler=(GXX, "-O1", "-std=c++17"))
    right = "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << 2 * n; }"
    assert judge(right, DOUBLE, settings, "cpp").reason == "correct"
    assert "test 2: expected" in judge(right.replace("2 * n", "n + 1"), DOUBLE, settings, "c++").details
    assert "does not compile" in judge(right.replace(";", ""), DOUBLE, settings, "cpp").details
    assert judge("int main() { volatile int* p = 0; return *p; }", DOUBLE, settings, "cpp").details.startswith(
        "test 1: ended with signal 11"
    )
    assert judge(right, DOUBLE, SETTINGS, "cpp").reason == "wrong"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("not json", "tests must be JSON: Expecting value"),
        ("{}", "the type of tests must be one of asserts, humaneval, pytest, function_io, stdin_stdout, got None"),
        ('{"type": "essay"}', "the type of tests must be one of asserts, humaneval, pytest"),
        ('{"type": "asserts", "asserts": []}', "no test in it"),
        ('{"type": "function_io", "fn_name": "f", "inputs": [[1]], "outputs": []}', "1 inputs and 0 outputs"),
        ("[]", "tests must be an object of JSON, got []"),
    ],
)
def test_tests_that_cannot_be_read_are_an_error_and_not_the_programs_fault(answer, message):
    judgement = judge_response(fenced("x = 1"), answer, SETTINGS)
    assert judgement.reason == "error"
    assert message in judgement.details


@needs_sandbox
def test_tests_that_do_not_compile_are_an_error():
    assert judge("def f(x): return x", {"type": "asserts", "asserts": ["assert f("]}).reason == "error"


def rows(**wanted: str) -> list[dict]:
    if not DATA.exists():
        pytest.skip(f"{DATA} is not on this machine")
    everything = map(json.loads, DATA.read_text().splitlines())
    return [row for row in everything if row["tests"]["type"] == wanted["type"]]


@needs_sandbox
def test_a_table_of_the_expected_outputs_passes_the_real_stdin_tasks_and_one_wrong_entry_fails():
    tasks = [row["tests"] for row in rows(type="stdin_stdout")][::12]
    assert len(tasks) >= 15
    for tests in tasks:
        table = {case["input"]: case["output"] for case in tests["cases"]}
        if len(table) < len(tests["cases"]):
            continue
        source = "import sys\nprint({!r}[sys.stdin.read()])"
        assert judge(source.format(table), tests).reason == "correct"
        table[tests["cases"][-1]["input"]] += " 0"
        wrong = judge(source.format(table), tests)
        assert (wrong.reason, wrong.num_passed) == ("wrong", len(table) - 1)


SOLUTIONS = {
    "HumanEval/30": "def get_positive(l): return [e for e in l if e > 0]",
    935: "def series_sum(n): return n * (n + 1) * (2 * n + 1) // 6",
}


@needs_sandbox
@pytest.mark.parametrize(("kind", "task"), [("humaneval", "HumanEval/30"), ("asserts", 935)])
def test_solutions_of_real_tasks_pass_and_wrong_ones_fail(kind, task):
    row = next(row for row in rows(type=kind) if row["meta"]["task_id"] == task)
    tests = {**row["tests"], "prefix": row["prompt"] if kind == "humaneval" else ""}
    assert judge(SOLUTIONS[task], tests).reason == "correct"
    assert judge(SOLUTIONS[task].replace("> 0", "> 4").replace("+ 1", "+ 2"), tests).reason == "wrong"


class Fusion(http.server.BaseHTTPRequestHandler):
    """Stands in for SandboxFusion in ten lines, by this machine's own sandbox."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        record = Sandbox().run_python(body["code"], body["stdin"].encode(), Limits(wall_seconds=body["run_timeout"]))
        status = "TimeLimitExceeded" if record.limit == "wall" else "Finished"
        run = {"status": status, "return_code": record.exit_code, "execution_time": record.seconds}
        run |= {"stdout": record.stdout.decode(), "stderr": record.stderr.decode()}
        answer = json.dumps(
            {"status": "Success" if record.exit_code == 0 else "Failed", "message": "", "run_result": run}
        )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_):
        pass


@needs_sandbox
def test_a_sandbox_fusion_server_judges_the_same_way():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fusion) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = CodeSettings(seconds=240.0, endpoint=f"http://127.0.0.1:{server.server_port}")
        assert judge("def f(x): return x * x", SQUARES, settings).reason == "correct"
        assert judge("def f(x): return x", SQUARES, settings).details == "test 2: assert f(3) == 9 fails"
        impatient = dataclasses.replace(settings, seconds=2.0)
        assert judge("import time\ntime.sleep(10**6)", SQUARES, impatient).reason == "too_slow"
        server.shutdown()
    gone = judge("def f(x): return x * x", SQUARES, settings)
    assert (gone.reason, "endpoint" in gone.details) == ("error", True)


def test_an_endpoint_that_is_not_there_is_said_at_the_start():
    with pytest.raises(SandboxUnavailable, match=r"127.0.0.1:9.*start a SandboxFusion server"):
        warm_up(CodeSettings(endpoint="http://127.0.0.1:9"))
    runner.cache_clear()
