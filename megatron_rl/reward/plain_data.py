"""Turns plain values into one line of text and back: all that may pass between a program and its judge.

The format is closed: a value is of a kind that this file names, or it does not pass. A line is JSON. None, bool, str,
float and integers below 2^63 stand for themselves; everything else is an array that begins with the name of its kind:
[1, {2}] is ["list",1,["set",2]]. Size, depth and the time that reading takes are bounded, whoever wrote the line.

The judge imports this file, and the processes inside of the sandboxes run it. So it needs the standard library only,
and little of that: `import json` takes 12 ms, for the regular expressions that it imports, and each program would pay.
"""

from __future__ import annotations

import _json
import sys

# For mypy, which knows this name. Importing typing costs a program 15 ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    # Turns an object that is not plain into plain values, written as an array of kind "object". Raises NotPlain.
    PackOther = Callable[[Any], list]
    # Turns those values into an object that stands for it on this side. Raises NotPlain.
    UnpackOther = Callable[[list], Any]

MAX_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 100
# Elements of a set or keys of a dict that may share one hash. With keys picked so, each lookup visits all others.
MAX_SAME_HASH = 100
_MAX_BITS = 100_000
_MAX_EXPONENT = 10_000
_MAX_RECORD_TYPES = 100
_MAX_FIELDS = 100
_SMALL = 1 << 63
# numpy's types that hold numbers and text, by their letter and the bytes of one element.
_NUMPY_TYPES = {"b": 1, "i": 8, "u": 8, "f": 8, "c": 16, "S": 1 << 20, "U": 1 << 20}
# Elements that an empty array may claim in its other dimensions.
_MAX_EMPTY = 10_000


class NotPlain(ValueError):
    """Says that the format has no place for a value, or that a line is not of the format; the message says which."""


def refuse(value: Any) -> Any:
    """Raise NotPlain: `pack` and `unpack` use it where objects do not pass."""
    raise NotPlain(f"a value of type {type(value).__name__} is not plain data")


def pack(value: Any, other: PackOther = refuse, max_bytes: int = MAX_BYTES) -> bytes:
    """Return one line of ASCII without its end. Raises NotPlain."""
    try:
        tree = ["line", _tree(value, other, 0)]
        line = "".join(_WRITE(tree, 0)).encode("ascii")
    except RecursionError:
        raise NotPlain("a value is nested too deep") from None
    if len(line) > max_bytes:
        raise NotPlain(f"a value of {len(line)} bytes, more than {max_bytes}")
    return line


def unpack(line: bytes, other: UnpackOther = refuse, arrays: bool = True) -> Any:
    """Return the value of a line. Whatever the line is, it raises NotPlain or returns plain data (and what `other`
    makes).

    arrays: False makes numpy's arrays lists and its scalars plain numbers.
    """
    try:
        text = line.decode("ascii").strip()
        tree, end = _READ(text, 0)
        if end != len(text) or type(tree) is not list or len(tree) != 2 or tree[0] != "line":
            raise NotPlain("not one value")
        return _Reader(other, arrays).value(tree[1], 0)
    except NotPlain:
        raise
    except MemoryError:
        raise NotPlain("a value that does not fit into memory") from None
    # The fault boundary: when a constructor of a plain type raises, the line is at fault.
    except Exception as error:
        raise NotPlain(f"not plain data: {type(error).__name__}") from None


class _JsonSettings:
    strict = True
    object_hook = object_pairs_hook = None
    parse_float = parse_constant = float
    parse_int = int

    def __init__(self) -> None:
        self.memo: dict = {}


_PARTS_OF_JSON: Any = _json
_READ = _PARTS_OF_JSON.make_scanner(_JsonSettings())
_WRITE = _PARTS_OF_JSON.make_encoder(None, None, _json.encode_basestring_ascii, None, ":", ",", False, False, True)
_NONE = type(None)
_SCALARS = {_NONE, bool, str, float}
_LISTS: dict = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
_VIEWS: dict = {type({}.keys()): "keys", type({}.values()): "values"}
_ITEMS: type = type({}.items())
# A defaultdict with another factory than these passes as a dict.
_FACTORIES = (list, int, dict, set, float, str, tuple, bool)
_FACTORY_OF: dict = {factory.__name__: factory for factory in _FACTORIES}
# A subclass of these passes as the plain value in it.
_BASES: dict = {
    int: int.__pos__,
    float: float.__pos__,
    str: str.__str__,
    bytes: bytes,
    list: list.copy,
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    dict: dict.copy,
    set: set,
    frozenset: frozenset,
}


def _tree(value: Any, other: PackOther, depth: int) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is int:
        return value if -_SMALL < value < _SMALL else ["int", hex(value)]
    if depth >= MAX_DEPTH:
        raise NotPlain(f"a value is nested deeper than {MAX_DEPTH}")
    name = _LISTS.get(kind) or _VIEWS.get(kind)
    if name:
        return [name, *_trees(value, other, depth)]
    if kind is dict:
        return ["dict", *_pairs(value, other, depth)]
    if kind in (bytes, bytearray):
        return [kind.__name__, value.hex()]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is range:
        return ["range", *_trees((value.start, value.stop, value.step), other, depth)]
    if kind is _ITEMS:
        return ["items", *_pairs(dict(value), other, depth)]
    return _library_tree(value, kind, other, depth)


def _trees(values: Any, other: PackOther, depth: int) -> list:
    kinds = set(map(type, values))
    if kinds <= _SCALARS or (kinds == {int} and min(values) > -_SMALL and max(values) < _SMALL):
        return list(values)
    return [_tree(value, other, depth + 1) for value in values]


def _pairs(mapping: dict, other: PackOther, depth: int) -> list:
    return [_tree(part, other, depth + 1) for pair in mapping.items() for part in pair]


def _library_tree(value: Any, kind: type, other: PackOther, depth: int) -> Any:
    """Return the tree of a value: types of the standard library and numpy come first, then subclasses of plain types,
    then what `other` says."""
    name = kind.__name__
    if getattr(sys.modules.get(kind.__module__), name, None) is kind:
        if kind.__module__ == "collections":
            if name == "deque":
                return ["deque", value.maxlen, *_trees(value, other, depth)]
            if name in ("Counter", "OrderedDict"):
                return [name, *_pairs(value, other, depth)]
            if name == "defaultdict" and value.default_factory in _FACTORIES:
                return [name, value.default_factory.__name__, *_pairs(value, other, depth)]
        if (kind.__module__, name) in (("decimal", "Decimal"), ("fractions", "Fraction")):
            return [name, str(value)] if name == "Decimal" else [name, hex(value.numerator), hex(value.denominator)]
        if kind.__module__ == "datetime" and name in ("date", "time", "datetime", "timedelta"):
            return _time_tree(value, name)
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind.__module__.partition(".")[0] == "numpy":
        if isinstance(value, numpy.generic) and value.dtype.kind in _NUMPY_TYPES:
            return ["numpy", value.dtype.str, None, value.tobytes().hex()]
        if type(value) is numpy.ndarray and value.dtype.kind in _NUMPY_TYPES:
            return ["numpy", value.dtype.str, list(value.shape), value.tobytes().hex()]
    fields = getattr(kind, "_fields", None)
    if issubclass(kind, tuple) and type(fields) is tuple and len(fields) == len(value):
        return ["namedtuple", name, list(fields), *_trees(tuple(value), other, depth)]
    for base, plain in _BASES.items():
        if issubclass(kind, base):
            return _tree(plain(value), other, depth)
    return ["object", *_trees(other(value), other, depth)]


def _time_tree(value: Any, name: str) -> list:
    if name == "timedelta":
        return [name, value.days, value.seconds, value.microseconds]
    parts = [value.year, value.month, value.day] if name != "time" else []
    if name != "date":
        offset = value.utcoffset()
        parts += [value.hour, value.minute, value.second, value.microsecond, value.fold]
        parts.append(None if offset is None else offset.total_seconds())
    return [name, *parts]


class _Reader:
    """Reads one tree; counts what takes time."""

    def __init__(self, other: UnpackOther, arrays: bool) -> None:
        self.other, self.arrays = other, arrays
        self.record_types: dict = {}

    def value(self, node: Any, depth: int) -> Any:
        if type(node) is not list:
            if type(node) is dict:
                raise NotPlain("an object of JSON")
            return node
        if depth > MAX_DEPTH:
            raise NotPlain(f"a value is nested deeper than {MAX_DEPTH}")
        kind = node[0] if node and type(node[0]) is str else ""
        if kind in _READERS:
            return _READERS[kind](self, node[1:], depth)
        raise NotPlain(f"a value of kind {kind[:20]!r}")

    def values(self, nodes: list, depth: int) -> list:
        if {list, dict}.isdisjoint(map(type, nodes)):
            return nodes
        return [self.value(node, depth + 1) for node in nodes]

    def keys(self, nodes: list, depth: int) -> list:
        keys = self.values(nodes, depth)
        if len(keys) > MAX_SAME_HASH and set(map(type, keys)) != {str}:  # Python gives texts other hashes at each start
            seen: dict = {}
            for key in keys:
                seen[hash(key)] = seen.get(hash(key), 0) + 1
            if max(seen.values()) > MAX_SAME_HASH:
                raise NotPlain(f"more than {MAX_SAME_HASH} keys with the same hash")
        return keys

    def pairs(self, nodes: list, depth: int) -> dict:
        keys, values = self.keys(nodes[::2], depth), self.values(nodes[1::2], depth)
        if len(keys) != len(values):
            raise NotPlain("a key without its value")
        return dict(zip(keys, values, strict=True))

    def collection(self, name: str) -> Any:
        return getattr(__import__("collections"), name)

    def decimal(self, nodes: list, _depth: int) -> Any:
        (text,) = nodes
        value = __import__("decimal").Decimal(text if len(text) <= _MAX_BITS else "")
        if value.is_finite() and value and abs(value.adjusted()) > _MAX_EXPONENT:
            raise NotPlain(f"a Decimal with an exponent above {_MAX_EXPONENT}")
        return value

    def fraction(self, nodes: list, _depth: int) -> Any:
        above, below = (int(text, 16) for text in nodes)
        if max(above.bit_length(), below.bit_length()) > _MAX_BITS:
            raise NotPlain(f"a Fraction of more than {_MAX_BITS} bits")
        return __import__("fractions").Fraction(above, below)

    def time(self, kind: str, nodes: list) -> Any:
        module = __import__("datetime")
        if kind in ("date", "timedelta"):
            year, month, day = nodes
            return getattr(module, kind)(year, month, day)
        *when, fold, offset = nodes
        if set(map(type, when)) != {int}:
            raise NotPlain("a time of what are no numbers")
        zone = None if offset is None else module.timezone(module.timedelta(seconds=offset))
        return getattr(module, kind)(*when, fold=fold, tzinfo=zone)

    def namedtuple(self, nodes: list, depth: int) -> Any:
        name, fields, *values = nodes
        key = (name, tuple(fields))
        if key not in self.record_types:
            if len(fields) > _MAX_FIELDS or len(self.record_types) >= _MAX_RECORD_TYPES:
                raise NotPlain("too many fields or kinds of namedtuples")
            self.record_types[key] = self.collection("namedtuple")(name, fields)
        return self.record_types[key](*self.values(values, depth))

    def numpy(self, nodes: list, _depth: int) -> Any:
        kind, shape, data = nodes
        numpy = __import__("numpy")
        dtype = numpy.dtype(str(kind)[:20])
        if dtype.hasobject or not 0 < dtype.itemsize <= _NUMPY_TYPES.get(dtype.kind, 0):
            raise NotPlain(f"an array of {kind[:20]}")
        flat = numpy.frombuffer(bytes.fromhex(data), dtype).copy()
        if dtype.kind == "U" and flat.size and flat.view(dtype.byteorder + "u4").max() > sys.maxunicode:
            raise NotPlain("an array of what is no text")
        if not flat.size and sum(shape) > _MAX_EMPTY:
            raise NotPlain(f"an empty array of shape {str(shape)[:50]}")
        if not self.arrays:
            return flat.reshape(tuple(shape)).tolist() if shape is not None else flat[0].item()
        return flat[0] if shape is None else flat.reshape(tuple(shape))


def _of(make: Callable) -> Callable:
    return lambda reader, nodes, depth: make(reader.values(nodes, depth))


def _of_keys(make: Callable) -> Callable:
    return lambda reader, nodes, depth: make(reader.keys(nodes, depth))


def _of_pairs(make: Callable) -> Callable:
    return lambda reader, nodes, depth: make(reader.pairs(nodes, depth))


_READERS: dict = {
    "list": _of(list),
    "tuple": _of(tuple),
    "set": _of_keys(set),
    "frozenset": _of_keys(frozenset),
    "dict": _of_pairs(dict),
    "keys": _of_keys(lambda keys: dict.fromkeys(keys).keys()),
    "values": _of(lambda values: dict(enumerate(values)).values()),
    "items": _of_pairs(lambda pairs: pairs.items()),
    "bytes": lambda reader, nodes, depth: bytes.fromhex(*nodes),
    "bytearray": lambda reader, nodes, depth: bytearray.fromhex(*nodes),
    "int": lambda reader, nodes, depth: int(nodes[0], 16),
    "complex": lambda reader, nodes, depth: complex(*nodes),
    "range": _of(lambda ends: range(*ends)),
    "deque": lambda reader, nodes, depth: reader.collection("deque")(reader.values(nodes[1:], depth), nodes[0]),
    "Counter": lambda reader, nodes, depth: reader.collection("Counter")(reader.pairs(nodes, depth)),
    "OrderedDict": lambda reader, nodes, depth: reader.collection("OrderedDict")(reader.pairs(nodes, depth)),
    "defaultdict": lambda reader, nodes, depth: reader.collection("defaultdict")(
        _FACTORY_OF[nodes[0]], reader.pairs(nodes[1:], depth)
    ),
    "Decimal": _Reader.decimal,
    "Fraction": _Reader.fraction,
    "date": lambda reader, nodes, depth: reader.time("date", nodes),
    "time": lambda reader, nodes, depth: reader.time("time", nodes),
    "datetime": lambda reader, nodes, depth: reader.time("datetime", nodes),
    "timedelta": lambda reader, nodes, depth: reader.time("timedelta", nodes),
    "namedtuple": _Reader.namedtuple,
    "numpy": _Reader.numpy,
    "object": lambda reader, nodes, depth: reader.other(reader.values(nodes, depth)),
}
