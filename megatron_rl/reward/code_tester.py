"""Runs tests that are programs themselves, in a sandbox of its own, against a program in another.

It asks `code_program.py` on the other side of a socket, and believes nothing of it: answers are plain data, an object
of the program's own stands here as a `Remote`, and what a Remote may do in a test is a small set (docs/sandbox.md). An
operation outside of that set fails the test, even where the test catches what is raised. Standard library only.

The job comes on stdin, one value of plain data:
    {"kind": "asserts", "source": program, "prefix": source, "setup": source, "asserts": [source, ...]}
    {"kind": "humaneval", "source": program, "prefix": source, "test": source, "entry_point": name}
The report goes to stdout, a line of plain data for each step:
    ["begin"]                  the tests could be read; from here on nothing is their fault
    ["loaded"]                 the program, and what comes before the first test
    ["passed"]                 one test
    ["failed", kind, text]     the test that was reached, or the start; kind: "wrong", "gone" (the program's process has
                               ended), or "broken" (the test is at fault)
    ["end", number of tests]   all passed
"""

from __future__ import annotations

import builtins
import os
import sys

from megatron_rl.reward.code_program import BINARY, DETAIL_CHARACTERS, UNARY, Lines, serve
from megatron_rl.reward.plain_data import NotPlain, pack, unpack

# For mypy, which knows this name. Importing typing costs a program 15 ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Of all answers of a program to its tests.
MAX_ANSWER_BYTES = 256 * 1024 * 1024
# The tester's own processor and memory limit what it reads, so keys need no limit of their own here.
_ANY_KEYS = 1 << 40
# Methods of plain values. What a function returns in place of a plain value must not answer in its name.
_PLAIN = (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range)
_PLAIN_METHODS = frozenset(name for plain in _PLAIN for name in dir(plain))
# The only names with two underscores that are asked for: others are how libraries get hold of an object's insides.
_SPECIAL_NAMES = ("__name__", "__qualname__", "__doc__")
_ENDS_OF_LOOPS = (StopIteration, StopAsyncIteration)


class Gone(BaseException):
    """The program's process has ended. No Exception, so that few tests catch it."""


class Refused(BaseException):
    """An operation that an object of the program must not do in a test."""


class Broken(Exception):
    """The test is at fault, not the program."""


class Connection:
    """The tester's end. Once it has failed every test fails: no test can catch that away."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._bytes_left = MAX_ANSWER_BYTES
        self._objects: dict = {}  # (number, may it do what an object of the test's may) -> Remote
        self.failure: BaseException | None = None
        self.raised: BaseException | None = None  # the last that the program raised

    def ask(self, operation: str, *arguments: Any, trust: bool = True, keywords: dict | None = None) -> Any:
        """What the program's side says.

        trust: an object in the answer that the test made before keeps what such an object may do.
        Raises the program's exception as one of the same name, TypeError for an argument that cannot be sent, and Gone
        or Refused for good.
        """
        if self.failure is not None:
            raise self.failure
        try:
            request = pack([operation, list(arguments), keywords or {}], _described)
        except NotPlain as error:
            raise TypeError(f"an argument of the test cannot be sent to the program: {error}") from None
        try:
            self._lines.write(request)
            answer = self._lines.read()
            self._bytes_left -= len(answer)
            if self._bytes_left < 0:
                raise NotPlain(f"more than {MAX_ANSWER_BYTES} bytes of answers")
            kind, *parts = unpack(answer, lambda described: self._object(described, trust), _ANY_KEYS)
            if kind == "value":
                result, changed = parts
                changed = [(index, after) for index, after in changed]
            else:
                own, base, name, text = parts
        except (EOFError, OSError):
            self.fail(Gone())
        except (NotPlain, TypeError, ValueError) as error:
            self.fail(Refused(f"the program's answer cannot be read: {error}"))
        if kind != "value":
            self.raised = _exception(own, base, name, text)
            raise self.raised
        if operation == "call":
            for index, after in changed:
                if type(index) is int and 0 <= index < len(arguments) - 1:
                    _replace(arguments[1 + index], after)
        return result

    def fail(self, failure: BaseException) -> Any:
        self.failure = failure
        raise failure from None

    def made_by_test(self, value: Any) -> Any:
        """The same object, which may do from now on what an object of the test's may; plain values as they are."""
        if not isinstance(value, Remote):
            return value
        state = value._remote_state
        key = (state.number, True)
        if key not in self._objects:
            twin = State(self, state.number, state.name, trusted=True)
            twin.exception = state.exception
            self._objects[key] = type(value)(twin)
        return self._objects[key]

    def _object(self, described: list, trust: bool) -> Any:
        number, form, name, *base = described
        if type(number) is not int or type(name) is not str:
            raise NotPlain("an object without a number")
        if trust and (number, True) in self._objects:
            return self._objects[number, True]
        if (number, False) not in self._objects:
            state = State(self, number, name)
            if form == "exception":
                state.exception = type(name, (_plain_exception(base[0]),), {})
            self._objects[number, False] = _KINDS.get(form, Remote)(state)
        return self._objects[number, False]


def _plain_exception(name: Any) -> type:
    """The built-in exception of that name. Not one that ends a loop: `all(map(f, ...))` would call it a success."""
    found = getattr(builtins, name, None) if type(name) is str else None
    if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, _ENDS_OF_LOOPS):
        return found
    return RuntimeError


def _exception(own: Any, base: Any, name: Any, text: Any) -> BaseException:
    kind: Any = _exception_class(own)
    if not isinstance(kind, type):
        kind = _plain_exception(base)
    error = kind.__new__(kind)  # some take more arguments than a text
    error.args = (str(text) if kind.__name__ == name else f"{name}: {text}",)
    return error


def _exception_class(value: Any) -> Any:
    """For an exception class of the program a class of the same name, which a test can catch; all else as it is.

    Only where the test names it, or where it is raised: a call of it is no call of the program's."""
    return value._remote_state.exception or value if isinstance(value, RemoteClass) else value


def _described(value: Any) -> list:
    """For `pack`: an object of the program is its number, a dataclass of the test its fields."""
    if isinstance(value, Remote):
        return [value._remote_state.number]
    if hasattr(type(value), "__dataclass_fields__"):
        return ["dataclass", type(value).__name__, _fields(value)]
    raise NotPlain(f"a value of type {type(value).__name__} is not plain data")


def _fields(record: Any) -> dict:
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}


def _replace(target: Any, after: Any) -> None:
    """What the program did to an argument, done to the test's own."""
    if type(target) is not type(after):
        return
    if type(target) in (list, bytearray):
        target[:] = after
    elif type(target).__name__ == "deque":
        target.clear()
        target.extend(after)
    elif isinstance(target, (dict, set)):
        target.clear()
        target.update(after)


class State:
    """What a Remote knows of itself, in one place: all other names are the program's.

    trusted: the test named the object, or made it by calling a class that it names.
    makes: a class that the test names, such as Stack; what calling it returns is trusted.
    """

    __slots__ = ("connection", "ended", "exception", "makes", "name", "number", "trusted")

    def __init__(self, connection: Connection, number: int, name: str, trusted: bool = False) -> None:
        self.connection, self.number, self.name, self.trusted = connection, number, name[:50], trusted
        self.makes = self.ended = False
        self.exception: type | None = None

    def refuse(self, what: str) -> Any:
        return self.connection.fail(Refused(f"the program's object of class {self.name!r} {what}"))


class Remote:
    """An object of the program. It can be called, its attributes be read and set, be compared with another such object,
    and be handed back. A trusted one may also be counted, iterated, printed and combined with another. All else, and
    everything with a plain value beside it, is refused."""

    __slots__ = ("_remote_state",)

    def __init__(self, state: State) -> None:
        object.__setattr__(self, "_remote_state", state)

    def __getattr__(self, name: str) -> Any:
        state = self._remote_state
        if name[:2] == "__" and name not in _SPECIAL_NAMES:
            raise AttributeError(f"{name} of the program's object of class {state.name!r} cannot be read")
        found = state.connection.ask("get", self, name)
        if isinstance(found, Remote) and name in _PLAIN_METHODS and not state.trusted:
            state.refuse(f"stands where a plain value is expected: {name} is asked of it")
        return _exception_class(found) if state.trusted else found

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote_state.connection.ask("set", self, name, value)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        state = self._remote_state
        result = state.connection.ask("call", self, *arguments, trust=state.makes, keywords=keywords)
        return state.connection.made_by_test(result) if state.makes else result

    def __eq__(self, other: object) -> bool:
        state = self._remote_state
        if other is None or self is other:
            return self is other
        if not isinstance(other, Remote):
            return state.refuse(f"is compared with a plain value ({type(other).__name__})")
        return state.number == other._remote_state.number or state.connection.ask("eq", self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._remote_state.number)

    def __bool__(self) -> bool:
        return not self._remote_state.trusted or self._remote_state.connection.ask("bool", self)

    def __format__(self, form: str) -> str:
        return format(str(self), form)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._remote_state.refuse("is copied")


class RemoteClass(Remote):
    """A class of the program."""

    __slots__ = ()

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and self._remote_state.connection.ask("isinstance", value, self) is True


class RemoteIterator(Remote):
    """A generator or another iterator of the program: its elements, once."""

    __slots__ = ()
    # Not refused but absent: list() asks every iterator whether it has a length.
    __len__ = None

    def __iter__(self) -> RemoteIterator:
        return self

    def __next__(self) -> Any:
        state = self._remote_state
        found = [] if state.ended else state.connection.ask("next", self)
        if type(found) is not list or not found:
            state.ended = True
            raise StopIteration
        return found[0]


class RemoteDataclass(Remote):
    """An object of one of the program's dataclasses. It equals another whose class has the same name and whose fields
    are equal here, whatever the program's `__eq__` says; that other one may be the test's."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        state = self._remote_state
        if isinstance(other, RemoteDataclass):
            if state.number == other._remote_state.number:
                return True
            return state.name == other._remote_state.name and self._remote_fields() == other._remote_fields()
        if hasattr(type(other), "__dataclass_fields__"):
            return state.name == type(other).__name__ and self._remote_fields() == _fields(other)
        return Remote.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(self._remote_state.name)

    def _remote_fields(self) -> dict:
        fields = self._remote_state.connection.ask("fields", self)
        return fields if type(fields) is dict else {}


_KINDS = {"iterator": RemoteIterator, "dataclass": RemoteDataclass, "class": RemoteClass, "exception": RemoteClass}


def _unary(name: str) -> Callable:
    def operation(self: Remote, *_: Any) -> Any:
        state = self._remote_state
        return state.connection.ask(name, self) if state.trusted else state.refuse(f"is asked for its {name}()")

    return operation


def _binary(name: str) -> Callable:
    def operation(self: Remote, other: Any) -> Any:
        state = self._remote_state
        if not isinstance(other, Remote):
            return state.refuse(f"is combined with a plain value ({name})")
        if not (state.trusted and other._remote_state.trusted):
            return state.refuse(f"is combined with another object ({name})")
        return state.connection.made_by_test(state.connection.ask(name, self, other))

    return operation


def _never(name: str) -> Callable:
    return lambda self, *_: self._remote_state.refuse(f"stands where a plain value is expected ({name})")


_NEVER = """
    abs neg pos invert int float complex index round trunc floor ceil pow lshift rshift divmod
    radd rsub rmul rtruediv rfloordiv rmod rmatmul rand ror rxor rpow rlshift rrshift rdivmod
    contains getitem setitem delitem delattr reversed bytes fspath
"""


def _define_operations() -> None:
    methods: dict = {name: _never(name) for name in _NEVER.split()}
    methods.update({name.rstrip("_"): _binary(name) for name in BINARY})
    methods.update({name: _unary(name) for name in UNARY if name != "bool"})
    for name, method in methods.items():
        setattr(Remote, f"__{name}__", method)


_define_operations()


class Tester:
    """The tests of one job."""

    def __init__(self, job: dict, connection: Connection) -> None:
        self.job, self.connection = job, connection

    def read(self) -> None:
        """Broken where a test cannot be compiled; nothing runs yet."""
        texts = [self.job["setup"], *self.job["asserts"]] if self.job["kind"] == "asserts" else [self.job["test"]]
        self.codes = [_parse(text) for text in texts]
        self.texts = texts
        self.prefix = _parse(self.job["prefix"])

    def start(self) -> list:
        """Load the program and what comes before the tests; one function for each test, which raises if it fails."""
        self.connection.ask("load", self.job["source"])
        if self.job["kind"] == "asserts":
            space = self._space(self.codes)
            self._run(self.codes[0], space)
            return [
                lambda code=code, text=text: self._check(code, text, space)
                for code, text in zip(self.codes[1:], self.job["asserts"])  # noqa: B905 (Python 3.9)
            ]
        name = self.job["entry_point"]
        space = self._space(self.codes, name)
        if name not in space:
            raise NameError(f"the program does not define {name}")
        candidate = space[name]
        self._run(self.codes[0], space)
        return [lambda: space["check"](candidate)]

    def _run(self, code: Any, space: dict) -> None:
        """A test that needs a module which is not here says nothing about the program."""
        try:
            exec(code, space)
        except ImportError as error:
            if error is self.connection.raised:
                raise
            raise Broken(f"the tests need what the sandbox's Python does not have: {error}") from None

    def _check(self, code: Any, text: str, space: dict) -> None:
        try:
            self._run(code, space)
        except AssertionError as error:
            raise AssertionError(f"{text.strip()} fails {_text(error)}".strip()) from None

    def _space(self, codes: list, entry_point: str = "") -> dict:
        """The tests' globals: what the task gives, then from the program what the tests name and nothing gives."""
        module = sys.modules["tests"] = type(sys)("tests")  # dataclasses look their module up
        space = vars(module)
        self._run(self.prefix, space)
        space.pop(entry_point, None)
        named = {entry_point} if entry_point else set()
        for code in codes:
            named |= _names_of(code)
        wanted = sorted(name for name in named if not hasattr(builtins, name) and name not in space)
        found = self.connection.ask("names", wanted)
        for name in wanted:
            if name != entry_point and self._is_module(name):
                self._run(_parse(f"import {'numpy as np' if name == 'np' else name}"), space)
            elif type(found) is dict and name in found:
                value = self.connection.made_by_test(found[name])
                if isinstance(value, RemoteClass):
                    value._remote_state.makes = name[:1].isupper()
                space[name] = _exception_class(value)
        return space

    def _is_module(self, name: str) -> bool:
        """What a program binds to `math` could be anything, so the tests get the real one. A name of a module that
        they call is a function of that name: bisect(...)."""
        if name not in sys.stdlib_module_names and name not in ("numpy", "np"):
            return False
        return not any(f"{name}(" in text for text in self.texts)


def _parse(text: str) -> Any:
    try:
        return compile(text, "tests.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Broken(f"the test cannot be compiled: {error}") from None


def _names_of(code: Any) -> set:
    found = set(code.co_names)
    for constant in code.co_consts:
        if type(constant) is type(code):
            found |= _names_of(constant)
    return found


def _text(error: BaseException) -> str:
    """What an exception says; it may hold an object that does not want to be printed."""
    try:
        return str(error)
    except BaseException:
        return ""


def _failure(error: BaseException) -> list:
    if isinstance(error, Gone):
        return ["failed", "gone", "the program ended the process"]
    if isinstance(error, Broken):
        return ["failed", "broken", _text(error)[:DETAIL_CHARACTERS]]
    text = _text(error)
    if not isinstance(error, (AssertionError, Refused)) or not text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return ["failed", "wrong", text[:DETAIL_CHARACTERS]]


def run_tests(job: dict, connection: Connection, say: Callable[[list], None]) -> None:
    tester = Tester(job, connection)
    try:
        tester.read()
        say(["begin"])
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


def main(channel: int) -> None:
    """channel: descriptor of the socket to the program's process."""
    report = os.dup(1)
    nothing = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nothing, 1)
    with open(0, "rb", closefd=False) as file:
        job = unpack(file.read(), max_keys=_ANY_KEYS)
    lines = Lines(channel, channel)
    run_tests(job, Connection(lines), Lines(-1, report).write_value)
    os._exit(0)


def main_of_both(user: int = 65534) -> None:
    """Tester and program side by side where there is one container only: a SandboxFusion server. The program's process
    is of another user where this is root; else the tester is only hidden from it (PR_SET_DUMPABLE)."""
    import ctypes

    if ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) != 0:  # PR_SET_DUMPABLE
        raise OSError("prctl(PR_SET_DUMPABLE) failed")
    requests, answers = os.pipe(), os.pipe()
    nothing = os.open("/dev/null", os.O_RDWR)
    if os.fork() == 0:
        for target in (0, 1):
            os.dup2(nothing, target)
        for descriptor in (nothing, requests[1], answers[0]):
            os.close(descriptor)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        serve(Lines(requests[0], answers[1]))
    os.close(requests[0])
    os.close(answers[1])
    report = os.dup(1)
    os.dup2(nothing, 1)
    with open(0, "rb", closefd=False) as file:
        job = unpack(file.read(), max_keys=_ANY_KEYS)
    run_tests(job, Connection(Lines(answers[0], requests[1])), Lines(-1, report).write_value)
    os._exit(0)
