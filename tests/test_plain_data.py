"""Tests the format between a program and its judge: every plain value comes back as it was, and nothing else passes."""

import contextlib
import datetime
import json
import math
import os
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, IntEnum

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_rl.reward.plain_data import _READERS, MAX_BYTES, MAX_DEPTH, NotPlain, pack, unpack

Point = namedtuple("Point", "x y")
FLOATS = st.floats(allow_nan=False)
HASHABLE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        FLOATS,
        st.text(),
        st.binary(max_size=20),
        st.complex_numbers(allow_nan=False),
        st.decimals(allow_nan=False),
        st.fractions(),
        st.dates(),
        st.times(),
        st.datetimes(timezones=st.sampled_from([None, datetime.UTC, datetime.timezone(datetime.timedelta(hours=-3))])),
        st.timedeltas(),
        st.builds(range, st.integers(-(10**30), 10**30), st.integers(), st.integers(1, 9)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(tuple), st.frozensets(inner, max_size=4), st.builds(Point, inner, inner)
    ),
    max_leaves=8,
)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.sets(HASHABLE, max_size=4),
        st.dictionaries(HASHABLE, inner, max_size=4),
        st.dictionaries(HASHABLE, inner, max_size=4).map(OrderedDict),
        st.dictionaries(HASHABLE, st.integers(), max_size=4).map(Counter),
        st.dictionaries(HASHABLE, inner, max_size=4).map(lambda found: defaultdict(list, found)),
        st.builds(deque, st.lists(inner, max_size=4), st.one_of(st.none(), st.integers(4, 9))),
        st.binary(max_size=20).map(bytearray),
    ),
    max_leaves=12,
)


def kinds(value):
    """Return the types of a value and of all values in it."""
    if isinstance(value, dict):
        return (type(value).__name__, sorted(map(repr, ((kinds(k), kinds(v)) for k, v in value.items()))))
    if isinstance(value, set | frozenset):
        return (type(value).__name__, sorted(repr(kinds(item)) for item in value))
    if isinstance(value, list | tuple | deque):
        return (type(value).__name__, [kinds(item) for item in value])
    return type(value).__name__


@settings(max_examples=300, deadline=None)
@given(VALUES)
@example(float("inf"))
@example([-0.0, 2**63, -(2**63), 2**63 - 1, "\ud800", "é\n\x00", 10**5000, Decimal("Infinity"), Decimal("1.50")])
def test_every_plain_value_returns_as_it_was(value):
    line = pack(value)
    again = unpack(line)
    assert again == value
    assert kinds(again) == kinds(value)
    assert b"\n" not in line and line.isascii()


@pytest.mark.parametrize(
    "array",
    [np.arange(6).reshape(2, 3), np.array([1.5, math.inf]), np.zeros((0, 3)), np.array(["a", "bc"]), np.array(True)],
)
def test_numpy_arrays_and_scalars_return_as_they_were(array):
    again = unpack(pack(array))
    assert again.dtype == array.dtype and again.shape == array.shape
    assert np.array_equal(again, array)
    again[...] = again  # it can be written to
    for scalar in array.reshape(-1)[:1]:
        assert unpack(pack(scalar)) == scalar and type(unpack(pack(scalar))) is type(scalar)


def test_nan_dict_views_and_subclasses_of_plain_types_pass_as_their_plain_value():
    assert math.isnan(unpack(pack([float("nan")]))[0]) and unpack(pack(Decimal("NaN"))).is_nan()
    counts = {"a": 1, "b": 2}
    assert unpack(pack(counts.keys())) == counts.keys() and unpack(pack(counts.items())) == counts.items()
    assert list(unpack(pack(counts.values()))) == [1, 2]

    class Colour(IntEnum):
        RED = 3

    class Liar(int):
        __class__ = str  # type: ignore[assignment]

        def __eq__(self, other):
            return True

        def __pos__(self):
            return 5

    for value, plain in ((Colour.RED, 3), (defaultdict(lambda: 1, {1: [2]}), {1: [2]}), (Liar(4), 4)):
        again = unpack(pack(value))
        assert again == plain and type(again) is type(plain)


@dataclass
class Record:
    x: int


class Own(Enum):
    A = 1


@pytest.mark.parametrize(
    "value",
    [object(), Record(1), Own.A, int, len, lambda: 0, os, iter([]), ValueError(), np.array([object()]), {1: os}],
)
def test_what_is_not_plain_does_not_pass(value):
    with pytest.raises(NotPlain):
        pack(value)


def test_an_object_passes_as_what_its_side_says_of_it_and_the_other_side_decides_what_stands_for_it():
    line = pack([Record(7), 1], lambda value: ["record", value.x, {"deep": (1,)}])
    assert line == b'["line",["list",["object","record",7,["dict","deep",["tuple",1]]],1]]'
    assert unpack(line, lambda parts: ("seen", *parts)) == [("seen", "record", 7, {"deep": (1,)}), 1]
    with pytest.raises(NotPlain):
        unpack(line)


def test_depth_and_size_are_bounded_on_both_sides():
    nested: list = []
    for _ in range(MAX_DEPTH + 1):
        nested = [nested]
    with pytest.raises(NotPlain, match="nested deeper than 100"):
        pack(nested)
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(NotPlain, match="nested"):
        pack(nested)
    for depth in (MAX_DEPTH + 2, 100_000):
        with pytest.raises(NotPlain):
            unpack(b'["line",' + b'["list",' * depth + b"1" + b"]" * (depth + 1))
    with pytest.raises(NotPlain, match=f"more than {MAX_BYTES}"):
        pack("x" * MAX_BYTES)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"1",
        b'["line"]',
        b'["line",1]x',
        b'["line",1,2]',
        b'["line",{"a":1}]',
        b'["line",[]]',
        b'["line",[["list"]]]',
        b'["line",["module","os"]]',
        b'["line",["eval","1"]]',
        b'["line",["set",["list"]]]',
        b'["line",["dict",1]]',
        b'["line",["dict",["list"],1]]',
        b'["line",["int","zz"]]',
        b'["line",["int"]]',
        b'["line",["namedtuple","P",["import os"],1]]',
        b'["line",["namedtuple","P; import os",["x"],1]]',
        b'["line",["namedtuple","P",["x"]]]',
        b'["line",["numpy","O",[1],"00"]]',
        b'["line",["numpy","<i4,O",[1],"000000000000000000000000"]]',
        b'["line",["numpy","<i8",[9],"00"]]',
        b'["line",["deque",-1,1]]',
        b'["line",["range",1,2,0]]',
        b'["line",["Decimal","x"]]',
        b'["line",["Fraction","1","0"]]',
        b'["line",["date",2020,13,1]]',
        b'["line",["datetime",2020]]',
        b'["line",["bytes","0"]]',
        b'["line",' + b"1" * 5000 + b"]",
        "é".encode(),
        b"cposix\n_exit\n(I0\ntR.",
        b"\x80\x04K\x01.",
    ],
)
def test_a_line_that_is_not_of_the_format_is_refused(line):
    with pytest.raises(NotPlain):
        unpack(line)


PLAIN_TYPES = {"NoneType", "bool", "int", "float", "complex", "str", "bytes", "bytearray", "list", "tuple", "set"}
PLAIN_TYPES |= {"frozenset", "dict", "dict_keys", "dict_values", "dict_items", "deque", "Counter", "OrderedDict"}
PLAIN_TYPES |= {"defaultdict"}
PLAIN_TYPES |= {"Decimal", "Fraction", "date", "time", "datetime", "timedelta", "range", "P"}
_KINDS = [*sorted(_READERS), "os", "__class__"]
_SCALARS = st.one_of(
    st.none(), st.integers(), FLOATS, st.sampled_from(["list", "set", "dict", "int", "P", "x", "-1", "O", ""])
)
TREES = st.recursive(
    st.one_of(
        st.none(), st.integers(), FLOATS, st.sampled_from(["list", "set", "dict", "int", "P", "x", "-1", "O", ""])
    ),
    lambda inner: st.lists(inner, max_size=4).flatmap(
        lambda rest: st.sampled_from(_KINDS).map(lambda kind: [kind, *rest])
    ),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(TREES)
def test_whatever_a_line_says_it_gives_plain_data_or_is_refused(tree):
    try:
        value = unpack(json.dumps(["line", tree]).encode())
    except NotPlain:
        return
    waiting = [value]
    while waiting:
        item = waiting.pop()
        assert type(item).__name__ in PLAIN_TYPES or type(item).__module__ == "numpy", item
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list | tuple | set | frozenset | deque):
            waiting += item


@pytest.mark.parametrize(
    "line",
    [
        b'["line",["set",' + b",".join(b"%d" % (i * (2**61 - 1)) for i in range(200_000)) + b"]]",
        b'["line",["Decimal","1E+999999999"]]',
        b'["line",["Fraction","' + b"f" * 4_000_000 + b'","' + b"e" * 4_000_000 + b'"]]',
        b'["line",["list",' + b",".join([b'["namedtuple","P%d",["x"],1]' % i for i in range(100_000)]) + b"]]",
        b'["line",["list",' + b",".join([b"[]"] * 2_000_000) + b"]]",
        b'["line",' + b"1" * 8_000_000 + b".5]",
        b'["line",["deque",99999999999999999999999,1]]',
    ],
    ids=["hashes", "exponent", "fraction", "records", "lists", "digits", "maxlen"],
)
def test_a_line_made_to_be_slow_is_read_or_refused_soon(line):
    start = time.process_time()
    with contextlib.suppress(NotPlain):
        unpack(line)
    assert time.process_time() - start < 5.0
