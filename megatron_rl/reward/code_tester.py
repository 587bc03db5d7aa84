"""Runs tests that are programs themselves, in a sandbox of its own, against a program in another.

It asks `code_program.py` on the other side of a socket; `code_remote.py` says what comes back. Standard library only.

The job comes on stdin, one value of plain data:
    {"kind": "asserts", "humaneval" or "pytest", "source": program, "prefix": source, "setup": source,
     "tests": [source, ...], "entry_point": name, Solution().name or empty}
The report goes to stdout, a line of plain data for each step:
    ["broken", text]           the tests cannot be read, or need what is not here
    ["begin"]                  they could be read; from here on nothing is their fault
    ["loaded"]                 the program, and what comes before the first test
    ["passed"]                 one test
    ["failed", kind, text]     the test that was reached, or the start; kind: "wrong", or "gone": the program's process
                               has ended
    ["end", number of tests]   all passed
"""

from __future__ import annotations

import builtins
import os
import sys

from megatron_rl.reward.code_program import DETAIL_CHARACTERS, Lines, allow_long_integers, serve, silence
from megatron_rl.reward.code_pytest import Unsupported, collected
from megatron_rl.reward.code_remote import HOLDER, Connection, Gone, Refused, Remote, RemoteClass, exception_class
from megatron_rl.reward.plain_data import unpack

# For mypy, which knows this name. Importing typing costs a program 15 ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# The module that stands for the program in files of tests for pytest, as in KodCode.
SOLUTION = "solution"
GONE = "the program ended the process"
_ONLY_AST = 0x400  # ast.PyCF_ONLY_AST; importing ast takes longer than most tests
_IMPORTABLE = {**{name: name for name in sys.stdlib_module_names}, "numpy": "numpy", "np": "numpy"}


class Broken(Exception):
    """Says that the test is at fault, not the program."""


class Names:
    """Finds which names source code reads, binds, calls, and asks for attributes, by its syntax tree."""

    def __init__(self) -> None:
        self.read: set = set()
        self.bound: set = set()
        self.called: set = set()
        self.opened: set = set()  # math in math.pi
        self.attributes: set = set()
        self.imports: set = set()  # modules, but those of a try statement
        self.from_solution: dict = {}  # name here -> name in the module that stands for the program

    def add(self, tree: Any) -> None:
        waiting = [(tree, False)]
        while waiting:
            node, in_try = waiting.pop()
            kind = type(node).__name__
            self._note(node, kind, in_try)
            if kind == "ImportFrom" and node.module == SOLUTION:
                continue  # these names are the program's, and not bound here
            in_try = in_try or kind in ("Try", "TryStar")
            for name in node._fields:
                value = getattr(node, name, None)
                waiting += [(v, in_try) for v in (value if type(value) is list else [value]) if hasattr(v, "_fields")]

    def _note(self, node: Any, kind: str, in_try: bool) -> None:
        if kind == "Name":
            (self.read if type(node.ctx).__name__ == "Load" else self.bound).add(node.id)
        elif kind == "Call" and type(node.func).__name__ == "Name":
            self.called.add(node.func.id)
        elif kind == "Attribute":
            self.attributes.add(node.attr)
            if type(node.value).__name__ == "Name":
                self.opened.add(node.value.id)
                if node.value.id == SOLUTION:
                    self.from_solution[f"{SOLUTION}.{node.attr}"] = node.attr
        elif kind == "alias":
            self.bound.add(node.asname or node.name.partition(".")[0])
        elif kind == "arg":
            self.bound.add(node.arg)
        elif kind in ("FunctionDef", "AsyncFunctionDef", "ClassDef", "ExceptHandler", "MatchAs", "MatchStar"):
            self.bound.add(node.name)
        if kind == "Import" and not in_try:
            self.imports.update(alias.name for alias in node.names)
        elif kind == "ImportFrom" and node.module == SOLUTION:
            self.from_solution.update((a.asname or a.name, a.name) for a in node.names if a.name != "*")
        elif kind == "ImportFrom" and not in_try and not node.level:
            self.imports.add(node.module)

    def modules(self) -> dict:
        """Return name -> module, for names that can only be modules: their attributes are asked for, they are not
        called."""
        free = self.opened - self.bound - self.called
        return {name: _IMPORTABLE[name] for name in sorted(free) if name in _IMPORTABLE}

    def is_about(self, name: str) -> bool:
        """Tell whether the tests are about the program's class of this name. They call or open it, and never bind the
        name."""
        here = {name} | {local for local, there in self.from_solution.items() if there == name}
        used = self.called | self.opened | {f"{SOLUTION}.{name}"}  # in `here` where the tests write that
        return name[:1].isupper() and here.isdisjoint(self.bound) and not here.isdisjoint(used) and name != HOLDER


class Tester:
    """Runs the tests of one job."""

    def __init__(self, job: dict, connection: Connection) -> None:
        self.job, self.connection, self.names = job, connection, Names()

    def read(self) -> None:
        """Read the tests. Raise Broken where a test cannot be compiled or needs what is not here. Nothing of the
        program has run yet, so nothing else can be the reason."""
        texts = [self.job["setup"], *self.job["tests"]]
        self.codes = [_parse(text) for text in texts]
        prefix = self.job["prefix"]
        try:
            self.prefix = _parse(prefix)
        except Broken:  # the head of a function alone
            prefix += "\n    pass"
            self.prefix = _parse(prefix)
        for text in texts:
            self.names.add(compile(text, "tests.py", "exec", _ONLY_AST))
        self.connection.mentioned = self.names.read | self.names.attributes
        self.modules = self.names.modules()
        needed = Names()
        needed.add(compile(prefix, "prefix.py", "exec", _ONLY_AST))
        sys.modules["pytest"] = sys.modules[collected.__module__]
        for module in sorted({*self.modules.values(), *self.names.imports, *needed.imports} - {SOLUTION}):
            try:
                __import__(module)
            except ImportError as error:
                raise Broken(f"the tests need what the sandbox's Python does not have: {error}") from None

    def start(self) -> list:
        """Load the program and what comes before the tests; return one function for each test, which raises if it
        fails."""
        self.connection.ask("load", self.job["source"])
        entry_point = self.job["entry_point"]
        space = self._space(entry_point.partition("(")[0])
        candidate = self._candidate(entry_point, space)
        exec(self.codes[0], space)
        if self.job["kind"] == "asserts":
            return [
                lambda code=code, text=text: _check(code, text, space)
                for code, text in zip(self.codes[1:], self.job["tests"], strict=True)
            ]
        exec(self.codes[1], space)
        if self.job["kind"] == "pytest":
            return collected(space)
        return [lambda: space["check"](candidate)]

    def _candidate(self, entry_point: str, space: dict) -> Any:
        """Return what `check` gets: a function of the program, or a method, of a new object at each call."""
        name, is_method, method = entry_point.partition("().")
        if name and name not in space:
            raise NameError(f"the program does not define {name}")
        if is_method:
            return lambda *arguments, **keywords: getattr(space[name](), method)(*arguments, **keywords)
        return space.get(name)

    def _space(self, entry_point: str) -> dict:
        """Return the tests' globals: what the task gives, then from the program what the tests read and nothing
        gives."""
        module = sys.modules["tests"] = type(sys)("tests")  # dataclasses look their module up
        space = vars(module)
        exec(self.prefix, space)
        space.pop(entry_point, None)
        # A program may bind `math` to anything, so the tests get the real module.
        space.update((name, __import__(module)) for name, module in self.modules.items() if name not in space)
        given = {*space, *dir(builtins), *self.names.from_solution}
        imported = {*self.names.from_solution.values()}
        wanted = sorted(({*self.names.read, entry_point} - given) | {entry_point, *imported} - {""})
        found = self.connection.ask("names", wanted)
        for name in sorted(imported - {*found}):
            raise NameError(f"the program does not define {name}")
        solution = vars(sys.modules.setdefault(SOLUTION, type(sys)(SOLUTION)))
        for name in wanted:
            if type(found) is dict and name in found:
                solution[name] = self._named(name, found[name])
                if name not in imported:
                    space[name] = solution[name]
        return space

    def _named(self, name: str, value: Any) -> Any:
        """Return what the program has under a name of the tests'."""
        if not isinstance(value, Remote):
            return value
        if isinstance(value, RemoteClass) and self.names.is_about(name):
            self.connection.trusted_classes.add(value._remote_state.number)
        named = value._remote_named()
        named._remote_state.holder = name == HOLDER
        return exception_class(named)


def _check(code: Any, text: str, space: dict) -> None:
    try:
        exec(code, space)
    except AssertionError as error:
        raise AssertionError(f"{text.strip()} fails {_text(error)}".strip()) from None


def _parse(text: str) -> Any:
    try:
        return compile(text, "tests.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Broken(f"the test cannot be compiled: {error}") from None


def _text(error: BaseException) -> str:
    """Return what an exception says; it may hold an object that does not want to be printed."""
    try:
        return str(error)
    except BaseException:
        return ""


def _failure(error: BaseException) -> list:
    if isinstance(error, Gone):
        return ["failed", "gone", GONE]
    if isinstance(error, Unsupported):
        return ["broken", _text(error)[:DETAIL_CHARACTERS]]
    text = _text(error)
    if not isinstance(error, (AssertionError, Refused)) or not text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return ["failed", "wrong", text[:DETAIL_CHARACTERS]]


def run_tests(job: dict, connection: Connection, say: Callable[[list], None]) -> None:
    tester = Tester(job, connection)
    try:
        tester.read()
    except Broken as error:
        return say(["broken", _text(error)[:DETAIL_CHARACTERS]])
    say(["begin"])
    try:
        tests = tester.start()
        if connection.failure is not None:
            raise connection.failure
    except BaseException as error:
        return say(_failure(connection.failure or error))
    say(["loaded"])
    for test in tests:
        try:
            test()
        except BaseException as error:
            return say(_failure(connection.failure or error))
        if connection.failure is not None:
            return say(_failure(connection.failure))
        say(["passed"])
    return say(["end", len(tests)])


def main(lines: Lines) -> None:
    """Run the job on stdin against the program's process, to which `lines` lead, and report on stdout."""
    report = Lines(-1, os.dup(1))
    silence(1)
    allow_long_integers()
    with open(0, "rb", closefd=False) as file:
        job = unpack(file.read())
    run_tests(job, Connection(lines), report.write_value)
    os._exit(0)


def main_of_both(user: int = 65534) -> None:
    """Run tester and program side by side where there is one container only: a SandboxFusion server. The program's
    process is of another user where this is root; else the tester is only hidden from it (PR_SET_DUMPABLE)."""
    import ctypes

    if ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) != 0:  # PR_SET_DUMPABLE
        raise OSError("prctl(PR_SET_DUMPABLE) failed")
    requests, answers = os.pipe(), os.pipe()
    if os.fork() == 0:
        silence(0, 1)
        for descriptor in (requests[1], answers[0]):
            os.close(descriptor)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        serve(Lines(requests[0], answers[1]))
    os.close(requests[0])
    os.close(answers[1])
    main(Lines(answers[0], requests[1]))
