"""Run programs that answer the judge of code with mutated bytes: none may be called correct, or break the judge.

    python tools/fuzz_judge.py [--cases 5000] [--seed 1] [--workers 2]

Each case is a program that takes the socket over which it is asked and answers with lines of its own: answers of an
honest program with bytes and values exchanged, and answers made up by the format's grammar. The tests ask for numbers
and texts of 128 random bits, which no mutation finds. The judge runs as always, in its sandboxes; tests on stdin, whose
programs have no such socket, are judged with a runner that gives the lines. Prints one JSON object: verdicts by kind of
test, and every case that came out "correct" or as an error of the judge, with what makes it again. Exit code 1 if any.
"""

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

from megatron_rl.reward import code
from megatron_rl.reward.plain_data import pack

SETTINGS = code.CodeSettings(seconds=3.0, cpu_seconds=3, memory_bytes=512 * 1024**2)
KINDS = ("asserts", "humaneval", "pytest", "classes", "function_io", "stdin_stdout")
HOSTILE = """
import os
lines = {lines!r}
sockets = []
for fd in range(3, 64):
    try:
        if os.fstat(fd).st_mode >> 12 == 12: sockets.append(fd)
    except OSError: pass
for line in lines:
    for fd in sockets: os.write(fd, line)
    asked = b"?"
    while asked and not asked.endswith(b"\\n"): asked = os.read(sockets[0], 1 << 16)
os._exit(0)
"""
_WORDS = """
value raised end line list tuple set frozenset dict keys values items bytes bytearray int complex range deque Counter
OrderedDict Decimal Fraction date time datetime timedelta namedtuple numpy object iterator dataclass class exception
StopIteration StopAsyncIteration GeneratorExit AssertionError KeyError Exception begin loaded passed failed correct
f g Stack check candidate __eq__ __class__ __init__ builtins abs <i8 <f8 O
"""
WORDS = _WORDS.split()
BYTES = b'NaN Infinity null true false [] {} "" \\u0000 1e999 -0 \\ ,'.split()


def secret(source: random.Random) -> str:
    return f"{source.getrandbits(128):032x}"


def tests_of(kind: str, source: random.Random) -> dict[str, Any]:
    """Return one test that a program passes only if it knows a secret, in one of many ways of writing tests."""
    text, number = secret(source), source.getrandbits(128)
    if kind == "asserts":
        asserts = [
            f"assert f(1) == {text!r}",
            f"assert f([2, 3]) == [{number}, {text!r}]",
            f"assert abs(f(5) - {number}) < 1",
            f"assert {text!r} in f(6)",
            f"assert {number} < f(7) < {number + 2}",
            f"assert f(8).startswith({text!r})",
            f"for got, expected in zip(map(f, [1, 2]), [{text!r}, {number}]):\n    assert got == expected",
            f"import math\nassert math.isclose(f(9), {number}, rel_tol=1e-12)",
            f"r = f(3)\nassert len(r) == 2 and [a == b for a, b in zip(r, [{number}, {text!r}])] == [True, True]",
            f"r = f(4)\ntry:\n    good = r == {text!r}\nexcept BaseException:\n    good = True\nassert good",
            f"assert {{f(1): 2}} == {{{text!r}: 2}} and sorted([f(2), f(3)]) == [{number}, {number}]",
        ]
        return {"type": "asserts", "asserts": [source.choice(asserts)]}
    if kind == "humaneval":
        test = f"def check(candidate):\n    x = [1, 2]\n    assert candidate(x) == {number}\n"
        other = f"def check(candidate):\n    for a in (3, 4):\n        assert candidate(a, key=a) == {text!r}\n"
        return {"type": "humaneval", "entry_point": "f", "test": source.choice([test, other])}
    if kind == "pytest":
        near = f"import pytest\nfrom solution import f\ndef test_f():\n    assert f(1) == pytest.approx({number})\n"
        case = "import solution\nclass TestF:\n    def test_f(self):\n"
        case += f"        assert solution.f([2]) == {text!r} and solution.f(3) == [{number}]\n"
        return {"type": "pytest", "test": source.choice([near, case])}
    if kind == "classes":
        asserts = [
            f"s = Stack(1)\ns.push(2)\nassert s.pop() == {text!r}",
            f"s = Stack(2)\nassert list(s) == [{number}]",
            f"assert str(Stack(3)) == {text!r}",
            f"assert len(Stack(4)) == {number % 2**62} and Stack(4).x == {text!r}",
            f"assert Stack(5)[0] == {number}",
            f"assert {text!r} in Stack(6)",
        ]
        return {"type": "asserts", "asserts": [source.choice(asserts)]}
    if kind == "function_io":
        return {"type": "function_io", "fn_name": "f", "inputs": [[1]], "outputs": [source.choice([text, [number]])]}
    return {"type": "stdin_stdout", "cases": [{"input": "1\n", "output": text}]}


class Own:
    """Stands for an object of the program, as the program's side describes one."""

    def __init__(self, number: int, form: str, name: str) -> None:
        classes = [1] if name == "Stack" else []
        self.described = [number, form, name, classes, *(["ValueError", None] if form == "exception" else [])]


def honest_lines(kind: str, source: random.Random) -> list[bytes]:
    """Return answers as programs give them: first what loads the program and names its functions, then results."""
    forms = ["", "", "iterator", "dataclass", "class", "exception"]
    named = {name: Own(number, "class" if name == "Stack" else "", name) for number, name in enumerate(("f", "Stack"))}
    values = [None, 0, True, True, "abc", [1, 2], (1,), {1: 2}, 1.5, [], [0], [0, "4\n", ""], 10**30, float("nan")]
    answers: list[Any] = [["value", None, []]]
    answers.append(["value", "" if kind in ("function_io", "stdin_stdout") else named, []])
    if source.random() < 0.5:  # one result, and one answer to whatever is asked about it
        result = source.choice([Own(2, source.choice(forms), "R"), StopIteration, ValueError])
        always = source.choice([True, True, 0, [], result])
        for given in (result, *5 * [always]):
            name = given.__name__ if isinstance(given, type) else ""
            answers.append(["raised", None, "builtins", name, name, [], {}] if name else ["value", given, []])
    for _ in range(6):
        way = source.random()
        own = Own(source.randrange(2, 5), source.choice(forms), source.choice(["R", "Stack", "ValueError"]))
        if way < 0.5:
            value = source.choice([own, own, [own], [own, own]])
        else:
            value = source.choice(values)
        changed = [[source.randrange(-1, 3), source.choice(values)]] if source.random() < 0.2 else []
        answers.append(["value", value, changed])
        if way > 0.9:
            error = source.choice(["StopIteration", "AssertionError", "ValueError", source.choice(WORDS)])
            answers[-1] = [
                "raised",
                source.choice([None, own]),
                source.choice(WORDS),
                error,
                error,
                ["text"],
                {"a": own},
            ]
    return [pack(answer, lambda own: own.described) + b"\n" for answer in answers]


def made_up(source: random.Random, depth: int = 0) -> Any:
    """Return a tree by the format's grammar, right or not."""
    if depth > 4 or source.random() < 0.4:
        return source.choice([None, True, 0, -1, 3, 2**70, 1.5, "", "f", "4\n", source.choice(WORDS)])
    return [source.choice(WORDS), *(made_up(source, depth + 1) for _ in range(source.randrange(4)))]


def mutated(line: bytes, source: random.Random) -> bytes:
    data = bytearray(line)
    for _ in range(source.randrange(1, 6)):
        place = source.randrange(len(data) + 1)
        length = source.choice([0, 1, 1, 2, 5, 20])
        patch = source.choice(
            [b"", source.randbytes(length), source.choice(BYTES), f'"{source.choice(WORDS)}"'.encode(), data[:length]]
        )
        data[place : place + length] = patch
    # Without the end of a line the judge waits for it, until the time is over; a few of these are enough.
    return bytes(data) if data.endswith(b"\n") or source.random() < 0.02 else bytes(data) + b"\n"


def lines_of(kind: str, source: random.Random) -> list[bytes]:
    lines = honest_lines(kind, source)
    for index in range(len(lines)):
        way = source.random()
        if way < 0.15:
            lines[index] = mutated(lines[index], source)
        elif way < 0.2:
            tree = ["line", ["list", source.choice(["value", "raised", "end"]), made_up(source), made_up(source)]]
            lines[index] = json.dumps(tree).encode() + b"\n"
        elif way < 0.22:
            lines[index] = json.dumps(["line", made_up(source)]).encode() + b"\n"
    if source.random() < 0.02:
        lines.insert(source.randrange(len(lines)), b"[" * 9_000_000)
    return lines


class Given:
    """Runs nothing: it answers with given lines."""

    def __init__(self, lines: list[bytes]) -> None:
        self._lines = lines

    def answers(self, requests: Any, limits: Any, max_bytes: int) -> Generator[bytes]:
        yield from b"".join(self._lines).splitlines()
        yield from [b""] * 9


def judge(seed: str) -> tuple[str, str, str]:
    """Judge a case. Return (kind of test, reason, details) of the case with this seed."""
    source = random.Random(seed)
    kind = source.choice(KINDS)
    tests, lines = tests_of(kind, source), lines_of(kind, source)
    response = f"```python\n{HOSTILE.format(lines=lines)}\n```"
    if kind == "stdin_stdout":
        with mock.patch.object(code, "runner", lambda settings: Given(lines[2:])):
            judgement = code.judge_response(response, json.dumps(tests), SETTINGS)
    else:
        judgement = code.judge_response(response, json.dumps(tests), SETTINGS)
    return kind, judgement.reason, judgement.details


def fuzz(cases: int, seed: int, workers: int) -> dict[str, Any]:
    started = time.perf_counter()
    seeds = [f"{seed}/{case}" for case in range(cases)]
    verdicts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    found = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver")) as pool:
        for name, (kind, reason, details) in zip(seeds, pool.map(judge, seeds, chunksize=20), strict=True):
            verdicts[kind][reason] += 1
            if reason not in ("wrong", "too_slow"):
                found.append({"seed": name, "kind": kind, "reason": reason, "details": details})
    return {
        "cases": cases,
        "seed": seed,
        "verdicts": {kind: dict(counter) for kind, counter in verdicts.items()},
        "found": found,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="programs (default: 5000)")
    parser.add_argument("--seed", type=int, default=1, help="another gives other programs (default: 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes that judge (default: 2)")
    arguments = parser.parse_args()
    result = fuzz(arguments.cases, arguments.seed, arguments.workers)
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["found"] else 0)


if __name__ == "__main__":
    main()
