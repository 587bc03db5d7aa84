"""Stands in for pytest inside of the tests' sandbox: the part of it that files of tests for generated programs use.

`import pytest` in a test gives this module: `raises`, `approx`, `fail`, `fixture`, `param` and `mark`. A test that asks
for more cannot be judged, and is told so. It needs the standard library only, and imports nothing at its start, since
every job of tests loads it. It asks nothing of an object of the program: only its type is looked at.
"""

from __future__ import annotations

# For mypy, which knows this name. Importing typing costs a program 15 ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_FUNCTION: type = type(lambda: None)
_METHOD: type = type((lambda _: None).__get__(0))
_GENERATOR: type = type(iter(() for _ in ()))


class Unsupported(BaseException):
    """Says that tests need what this stand-in does not have. It is no Exception, so that tests do not catch it."""


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise Unsupported(f"the tests need pytest.{name}, which the judge does not have")


def fail(reason: str = "", **_: Any) -> Any:
    raise AssertionError(reason)


class raises:
    """Expects an exception: `with raises(ValueError, match="...") as caught`, or `raises(ValueError, f, ...)`."""

    def __init__(self, expected: Any, *call: Any, match: str | None = None, **keywords: Any) -> None:
        self._expected, self._pattern = expected, match
        self.value: Any = None
        if call:
            with self:
                call[0](*call[1:], **keywords)

    def __enter__(self) -> raises:
        return self

    def __exit__(self, kind: Any, error: Any, _trace: Any) -> bool:
        if kind is None:
            fail(f"no {getattr(self._expected, '__name__', self._expected)} was raised")
        if not isinstance(error, self._expected):
            return False
        self.value = error
        return self._pattern is None or self.match(self._pattern)

    @property
    def type(self) -> Any:
        return type(self.value)

    def match(self, pattern: str) -> bool:
        if not __import__("re").search(pattern, str(self.value)):
            fail(f"{str(self.value)!r} does not match {pattern!r}")
        return True


class approx:
    """Equals a number within a millionth, or a list, tuple, dict or array of such numbers."""

    __array_ufunc__ = None  # numpy leaves the comparison to this class
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: Any = None, abs: Any = None, nan_ok: bool = False) -> None:  # noqa: A002
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, abs, nan_ok

    def __repr__(self) -> str:
        return f"about {self.expected!r}"

    def __eq__(self, got: Any) -> bool:
        return self._near(_plain(got), _plain(self.expected))

    def _near(self, got: Any, expected: Any) -> bool:
        if type(expected) is dict:
            same = type(got) is dict and got.keys() == expected.keys()
            return same and all(self._near(got[key], expected[key]) for key in expected)
        if type(expected) in (list, tuple):
            same = type(got) in (list, tuple) and len(got) == len(expected)
            return same and all(map(self._near, got, expected))
        if type(got) in (list, tuple):
            return False
        if got == expected:
            return True
        try:
            return self._near_number(got, expected)
        except TypeError:  # no numbers
            return False

    def _near_number(self, got: Any, expected: Any) -> bool:
        if got != got or expected != expected:
            return bool(self.nan_ok and got != got and expected != expected)
        if float("inf") in (abs(got), abs(expected)):
            return False
        absolute = 1e-12 if self.abs is None else self.abs
        share = self.rel if self.rel is not None else 1e-6 if self.abs is None else 0.0
        return bool(abs(got - expected) <= max(absolute, share * float(abs(expected))))


def _plain(value: Any) -> Any:
    return value.tolist() if type(value).__module__ == "numpy" else value


class param:
    """Holds one set of arguments of `mark.parametrize`."""

    def __init__(self, *values: Any, **_: Any) -> None:
        self.values = values


class _Mark:
    """Gives decorators. `parametrize` and those that skip a test mean something; others, as `slow`, say nothing
    here."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **_: arguments[0] if arguments and _is_test(arguments[0]) else lambda marked: marked

    def parametrize(self, names: Any, values: Any, indirect: Any = False, **_: Any) -> Callable:
        if indirect:
            raise Unsupported("the tests need parametrize(indirect=...), which the judge does not have")
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        sets = []
        for value in values:
            one = value.values if type(value) is param else (value,) if len(names) == 1 else tuple(value)
            sets.append(dict(zip(names, one, strict=True)))

        def decorate(marked: Any) -> Any:
            marked._sets_of_arguments = [sets, *getattr(marked, "_sets_of_arguments", [])]
            return marked

        return decorate

    def skip(self, *arguments: Any, **_: Any) -> Any:
        if not arguments or not _is_test(arguments[0]):
            return self.skip
        arguments[0]._skipped = True
        return arguments[0]

    xfail = skip

    def skipif(self, condition: Any, **_: Any) -> Any:
        return self.skip if condition else lambda marked: marked


mark = _Mark()


def _is_test(value: Any) -> bool:
    return type(value) is _FUNCTION or isinstance(value, type)


def fixture(*arguments: Any, **options: Any) -> Any:
    """Mark a function whose result tests get by the name of their argument; it is made anew for each of them."""
    if not arguments:
        return lambda function: _as_fixture(function, **options)
    return _as_fixture(arguments[0], **options)


def _as_fixture(function: Any, name: str = "", autouse: bool = False, params: Any = None, **_: Any) -> Any:
    if params is not None:
        raise Unsupported("the tests need fixture(params=...), which the judge does not have")
    function._fixture, function._autouse = name or function.__name__, autouse
    return function


class _Fixtures:
    """Gives one call of a test what it gets by the names of its arguments: each is made once, and ended after the
    test."""

    def __init__(self, space: dict, owner: Any) -> None:
        found = [*space.values(), *([getattr(owner, name) for name in dir(owner)] if owner is not None else [])]
        functions = [value for value in found if type(value) in (_FUNCTION, _METHOD)]
        self._functions = {f._fixture: f for f in functions if hasattr(f, "_fixture")}
        self._made: dict = {}
        self._open: list = []

    def call(self, function: Any, given: dict) -> None:
        try:
            for name in self._functions:
                if self._functions[name]._autouse:
                    self._make(name)
            result = function(**{name: given[name] if name in given else self._make(name) for name in needs(function)})
            if hasattr(result, "cr_code"):
                __import__("asyncio").run(result)
        finally:
            for generator in reversed(self._open):
                next(generator, None)

    def _make(self, name: str) -> Any:
        if name not in self._made:
            if name not in self._functions:
                raise Unsupported(f"the tests need the fixture {name!r}, which the judge does not have")
            function = self._functions[name]
            value: Any = function(**{other: self._make(other) for other in needs(function)})
            if type(value) is _GENERATOR:
                self._open.append(value)
                value = next(self._open[-1])
            self._made[name] = value
        return self._made[name]


def needs(function: Any) -> list:
    """Return the names of the arguments that have no default, without self."""
    plain = getattr(function, "__func__", function)
    names = list(plain.__code__.co_varnames[: plain.__code__.co_argcount - len(plain.__defaults__ or ())])
    return names if plain is function else names[1:]


def collected(space: dict) -> list:
    """Return one function for each test that the file defines, which raises if the test fails."""
    tests: list = []
    for name, value in list(space.items()):
        # A test is not what the file imports under such a name, and an object of the program is never asked.
        if not _is_test(value) or value.__module__ != space["__name__"] or hasattr(value, "_skipped"):
            continue
        if type(value) is _FUNCTION and name.startswith("test"):
            tests += [_test(space, None, name, given) for given in _sets(value)]
        elif type(value) is not _FUNCTION and (name.startswith("Test") or _is_case(value)):
            for method in dir(value):
                function = getattr(value, method)
                if method.startswith("test") and type(function) is _FUNCTION and not hasattr(function, "_skipped"):
                    tests += [_test(space, value, method, given) for given in _sets(value, function)]
    if not tests:
        raise Unsupported("the file has no test that runs")
    return tests


def _is_case(kind: type) -> bool:
    return any(base.__module__ == "unittest.case" and base.__name__ == "TestCase" for base in kind.__mro__)


def _sets(*marked: Any) -> Iterator[dict]:
    """Yield every combination of the sets of arguments; one empty set where there are none."""
    combined: list = [{}]
    for sets in [sets for one in marked for sets in getattr(one, "_sets_of_arguments", [])]:
        combined = [{**given, **more} for given in combined for more in sets]
    yield from combined


def _test(space: dict, kind: Any, name: str, given: dict) -> Callable:
    def run() -> None:
        try:
            _run(space, kind, name, given)
        except AssertionError as error:
            values = ", ".join(f"{key}={value!r:.40}" for key, value in given.items())
            raise AssertionError(f"{name}({values}) fails {error}".strip()) from None

    return run


def _run(space: dict, kind: Any, name: str, given: dict) -> None:
    if kind is None:
        for hook in ("setup_module", "setup_function"):
            _hook(space.get(hook))
        return _Fixtures(space, None).call(space[name], given)
    owner = kind(name) if _is_case(kind) else kind()
    for hook in ("setup_class", "setUpClass", "setup_method", "setUp"):
        _hook(getattr(owner, hook, None))
    try:
        return _Fixtures(space, owner).call(getattr(owner, name), given)
    finally:
        for hook in ("tearDown", "teardown_method"):
            _hook(getattr(owner, hook, None))


def _hook(function: Any) -> None:
    if type(function) in (_FUNCTION, _METHOD):
        function(*[None] * len(needs(function)))
