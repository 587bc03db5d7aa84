"""Stands in a test for the objects of the program, and holds the connection to the program's side.

Nothing that comes from there is believed: answers are plain data, an object of the program's own is a `Remote` here,
and what a Remote may do in a test is a small set (docs/sandbox.md). An operation outside of that set fails the test,
even where the test catches what is raised. Runs inside of the tests' sandbox; standard library only.
"""

from __future__ import annotations

import _thread
import builtins
import sys

from megatron_rl.reward.code_program import BINARY, KEYED, UNARY, Lines, by_place, fields_of, is_dataclass
from megatron_rl.reward.plain_data import NotPlain, pack, unpack

# For mypy, which knows this name. Importing typing costs a program 15 ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# The limit for all answers of a program to its tests.
MAX_ANSWER_BYTES = 256 * 1024 * 1024
# Methods of plain values. An object that a function returns in place of a plain value must not answer for one.
_PLAIN = (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range)
_PLAIN_METHODS = frozenset(name for plain in _PLAIN for name in dir(plain))
# The only names with two underscores that are asked for: others are how libraries get hold of an object's insides.
_SPECIAL_NAMES = ("__name__", "__qualname__", "__dict__")
_ENDS_OF_LOOPS = (StopIteration, StopAsyncIteration)
# LeetCode's class, which only holds functions. What they return stands in place of plain values, itself included.
HOLDER = "Solution"
_LIBRARY = sys.stdlib_module_names


class Gone(BaseException):
    """Says that the program's process has ended. It is no Exception, so that few tests catch it."""


class Refused(BaseException):
    """Says that a test did with an object of the program what it must not."""


class Connection:
    """Holds the tester's end of the connection. Once it has failed every test fails: no test can catch that away."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._bytes_left = MAX_ANSWER_BYTES
        self._lock = _thread.allocate_lock()  # tests may have threads
        self._objects: dict = {}  # number -> Remote
        self.trusted_classes: set = set()  # numbers of classes that the tests are about
        self.mentioned: set = set()  # every name and attribute that the tests write
        self.failure: BaseException | None = None

    def ask(self, operation: str, *arguments: Any, keywords: dict | None = None) -> Any:
        """Ask the program's side and return what it says.

        Raises the program's exception as one of the same name, TypeError for an argument that cannot be sent, and Gone
        or Refused for good.
        """
        if self.failure is not None:
            raise self.failure
        try:
            request = pack([operation, list(arguments), keywords or {}], _described)
        except NotPlain as error:
            raise TypeError(f"an argument of the test cannot be sent to the program: {error}") from None
        with self._lock:
            result, changed, raised = self._exchange(request)
        if raised is not None:
            raise raised
        if operation == "call":
            given = by_place(list(arguments), keywords or {})
            for place, after in changed:
                if type(place) in (int, str) and place in given:
                    _replace(given[place], after)
        return result

    def _exchange(self, request: bytes) -> tuple:
        """Return (result, arguments that the call changed, exception or None). Raises Gone or Refused."""
        try:
            self._lines.write(request)
            answer = self._lines.read()
            self._bytes_left -= len(answer)
            if self._bytes_left < 0:
                raise NotPlain(f"more than {MAX_ANSWER_BYTES} bytes of answers")
            kind, *parts = unpack(answer, self._object)
            if kind == "value":
                result, changed = parts
                return result, [(place, after) for place, after in changed], None
            return None, [], self._exception(*parts)
        except (EOFError, OSError):
            self.fail(Gone())
        except (NotPlain, TypeError, ValueError, AttributeError, MemoryError) as error:
            self.fail(Refused(f"the program's answer cannot be read: {error}"))
        raise AssertionError("fail has raised")

    def fail(self, failure: BaseException) -> Any:
        self.failure = failure
        raise failure from None

    def _object(self, described: list) -> Any:
        number, form, name, classes, *bases = described
        if type(number) is not int or type(name) is not str or type(classes) is not list:
            raise NotPlain("an object without a number")
        if number not in self._objects:
            state = State(self, number, name, classes)
            if form == "exception":
                built_in, own = bases
                base = exception_class(own)
                state.exception = type(name, (base if isinstance(base, type) else _plain_exception(built_in),), {})
            self._objects[number] = _KINDS.get(form, Remote)(state)
        return self._objects[number]

    def _exception(self, own: Any, module: Any, base: Any, name: Any, arguments: Any, attributes: Any) -> BaseException:
        kind: Any = self._library_exception(module, name) or exception_class(own)
        if not isinstance(kind, type):
            kind = _plain_exception(base)
        arguments = list(arguments)
        if kind.__name__ != name:
            arguments = [f"{name}: {', '.join(map(str, arguments))}"]
        try:
            error = kind(*arguments)
        except Exception:  # it takes others
            error = kind.__new__(kind)
            error.args = tuple(arguments)
        for attribute, value in attributes.items():
            if hasattr(error, "__dict__") and attribute[:2] != "__":
                error.__dict__[attribute] = value
        return error

    def _library_exception(self, module: Any, name: Any) -> type | None:
        """Return an exception of the standard library that the tests name: json.JSONDecodeError. Others may mean
        success to somebody, as unittest.SkipTest does."""
        if name not in self.mentioned or module == "builtins" or str(module).partition(".")[0] not in _LIBRARY:
            return None
        found = getattr(sys.modules.get(module), name, None)
        return found if isinstance(found, type) and issubclass(found, Exception) else None


def _plain_exception(name: Any) -> type:
    """Return the built-in exception of that name. It is not one that ends a loop: `all(map(f, ...))` would call it a
    success."""
    found = getattr(builtins, name, None) if type(name) is str else None
    if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, _ENDS_OF_LOOPS):
        return found
    return RuntimeError


def exception_class(value: Any) -> Any:
    """Give for an exception class of the program one of the same name, which a test can catch; all else as it is.

    Only where the test names it, or where it is raised: a call of it is no call of the program's."""
    return value._remote_state.exception or value if isinstance(value, RemoteClass) else value


def is_node(value: Any) -> bool:
    """Tell whether this is an object of a class of the tests' own, as LeetCode's ListNode and TreeNode, that only holds
    values."""
    return type(value).__module__ == "tests" and hasattr(value, "__dict__") and not isinstance(value, BaseException)


def _nodes(root: Any) -> list:
    """Describe an object of the tests and all that its attributes lead to, one behind the other, since lists are long
    and may be circles: [class, {attribute: [is it a node?, its place or a value]}] for each."""
    nodes, places, described = [root], {id(root): 0}, []
    for node in nodes:  # grows
        attributes = {}
        for name, value in vars(node).items():
            if is_node(value) and id(value) not in places:
                places[id(value)] = len(nodes)
                nodes.append(value)
            attributes[name] = [True, places[id(value)]] if is_node(value) else [False, value]
        described.append([type(node).__name__, attributes])
    return described


def _described(value: Any) -> list:
    """Describe for `pack` an object of the program by its number, and one of the test by what it holds."""
    if isinstance(value, Remote):
        return [value._remote_state.number]
    if is_dataclass(type(value)):
        return ["dataclass", type(value).__name__, {name: field for name, (field, _) in fields_of(value).items()}]
    if is_node(value):
        return ["nodes", _nodes(value)]
    module = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", None)
    name = getattr(value, "__qualname__", None)
    if module in _LIBRARY and type(name) is str:  # int, abs, operator.add, str.upper
        return ["named", module, name]
    raise NotPlain(f"a value of type {type(value).__name__} is not plain data")


def _replace(target: Any, after: Any) -> None:
    """Do to the test's own argument what the program did to its copy."""
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
    """Holds all that a Remote knows of itself, in one place: all other names are the program's.

    classes: numbers of the object's classes.
    named: the test names this very object. holder: it is LeetCode's class, by that name.
    exception: the tests' own class for a class of exceptions.
    """

    __slots__ = ("classes", "connection", "ended", "exception", "holder", "name", "named", "number")

    def __init__(self, connection: Connection, number: int, name: str, classes: list) -> None:
        self.connection, self.number, self.name, self.classes = connection, number, name[:50], classes
        self.named = self.holder = self.ended = False
        self.exception: type | None = None

    @property
    def trusted(self) -> bool:
        """Tell whether the tests name the object, or its class by a name with a capital letter: they are about it."""
        return self.named or any(number in self.connection.trusted_classes for number in self.classes)

    def refuse(self, what: str) -> Any:
        return self.connection.fail(Refused(f"the program's object of class {self.name!r} {what}"))


class Remote:
    """Stands for an object of the program. It can be called, its attributes be read and set, be compared with another
    such object, and be handed back. A trusted one may also be counted, iterated, printed, asked for its elements and
    combined with another. All else, and comparing or combining it with a plain value, is refused."""

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
        return exception_class(found) if state.trusted else found

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote_state.connection.ask("set", self, name, value)

    def __call__(self, /, *arguments: Any, **keywords: Any) -> Any:
        state = self._remote_state
        result = state.connection.ask("call", self, *arguments, keywords=keywords)
        return result._remote_named() if state.holder and isinstance(result, Remote) else result

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
        state = self._remote_state
        return state.connection.ask("hash", self) if state.trusted else hash(state.number)

    def __bool__(self) -> bool:
        return not self._remote_state.trusted or self._remote_state.connection.ask("bool", self)

    def __format__(self, form: str) -> str:
        return format(str(self), form)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._remote_state.refuse("is copied")

    def _remote_named(self) -> Remote:
        """Return a Remote of the same object that counts as named by the test. A Remote that some call returns for it
        elsewhere does not."""
        state = self._remote_state
        copy = State(state.connection, state.number, state.name, state.classes)
        copy.named, copy.exception = True, state.exception
        return type(self)(copy)


class RemoteClass(Remote):
    """Stands for a class of the program."""

    __slots__ = ()

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and self._remote_state.connection.ask("isinstance", value, self) is True

    def __subclasscheck__(self, kind: Any) -> bool:
        return isinstance(kind, RemoteClass) and self._remote_state.connection.ask("issubclass", kind, self) is True


class RemoteIterator(Remote):
    """Stands for a generator or another iterator of the program: it gives its elements once. One that the tests are
    about may begin again and have a length."""

    __slots__ = ()

    def __iter__(self) -> RemoteIterator:
        state = self._remote_state
        if not state.trusted:
            return self
        again = state.connection.ask("iter", self)
        if not isinstance(again, RemoteIterator):
            raise TypeError(f"iter() of {state.name!r} gives no iterator")
        again._remote_state.ended = False
        return again

    def __len__(self) -> int:
        # Not refused: list() asks every iterator whether it has a length.
        state = self._remote_state
        if not state.trusted:
            raise TypeError(f"object of type {state.name!r} has no len()")
        return state.connection.ask("len", self)

    def __next__(self) -> Any:
        state = self._remote_state
        found = [] if state.ended else state.connection.ask("next", self)
        if type(found) is not list or not found:
            state.ended = True
            raise StopIteration
        return found[0]


class RemoteDataclass(Remote):
    """Stands for an object of one of the program's dataclasses. It equals another whose class has the same name and
    whose fields that count are equal here, whatever the program's `__eq__` says; that other one may be the test's."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        state = self._remote_state
        if isinstance(other, RemoteDataclass):
            if state.number == other._remote_state.number:
                return True
            return state.name == other._remote_state.name and _equal(other._remote_fields(), self._remote_fields())
        if is_dataclass(type(other)):
            return state.name == type(other).__name__ and _equal(fields_of(other), self._remote_fields())
        return Remote.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(self._remote_state.name)

    def _remote_fields(self) -> dict:
        fields = self._remote_state.connection.ask("fields", self)
        return fields if type(fields) is dict else {}


def _equal(expected: dict, fields: dict) -> bool:
    """Tell whether the fields that count are equal. The first says which of them do."""
    if expected.keys() != fields.keys():
        return False
    return all(not counts or fields[name][0] == value for name, (value, counts) in expected.items())


_KINDS = {"iterator": RemoteIterator, "dataclass": RemoteDataclass, "class": RemoteClass, "exception": RemoteClass}


def _of_trusted(name: str, refusal: str) -> Callable:
    def operation(self: Remote, *arguments: Any) -> Any:
        state = self._remote_state
        return state.connection.ask(name, self, *arguments) if state.trusted else state.refuse(refusal)

    return operation


def _binary(name: str) -> Callable:
    def operation(self: Remote, other: Any) -> Any:
        state = self._remote_state
        if not isinstance(other, Remote):
            return state.refuse(f"is combined with a plain value ({name})")
        if not (state.trusted and other._remote_state.trusted):
            return state.refuse(f"is combined with another object ({name})")
        return state.connection.ask(name, self, other)

    return operation


def _never(refusal: str) -> Callable:
    return lambda self, *_: self._remote_state.refuse(refusal)


_NEVER = """
    int float complex index round trunc floor ceil pow lshift rshift divmod
    radd rsub rmul rtruediv rfloordiv rmod rmatmul rand ror rxor rpow rlshift rrshift rdivmod
    delattr reversed bytes fspath
"""


def _define_operations() -> None:
    in_place_of_a_value = "stands where a plain value is expected ({})".format
    methods: dict = {name: _never(in_place_of_a_value(name)) for name in _NEVER.split()}
    methods.update({name.rstrip("_"): _binary(name) for name in BINARY})
    methods.update(
        {name: _of_trusted(name, f"is asked for its {name}()") for name in UNARY if name not in ("bool", "hash")}
    )
    methods.update({name: _of_trusted(name, in_place_of_a_value(name)) for name in KEYED})
    for name, method in methods.items():
        setattr(Remote, f"__{name}__", method)


_define_operations()
