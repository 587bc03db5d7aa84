"""Lists every key of a configuration with its type, default and description, read from the sections themselves."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

REQUIRED = object()
_PLAIN = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path", Any: "any value"}
_BOUNDS = ((Gt, "gt", "above"), (Ge, "ge", "at least"), (Lt, "lt", "below"), (Le, "le", "at most"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Describes a key. path: such as "train.steps"; NAME stands for a name that the user chooses. default: REQUIRED
    without one, None for not set."""

    path: str
    type: str
    default: Any
    description: str

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]


def keys_of(kind: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """List the keys of a section and of the sections in it, in their order.

    Tables by name and arrays of tables are keys themselves, and are followed by those of their tables.
    """
    for name, field in kind.model_fields.items():
        path = f"{prefix}{name}"
        if field.annotation is NoneType:  # a kind of file that lacks what another has
            continue
        section, repeated = _section_of(field.annotation)
        if section is not None and not repeated:
            yield from keys_of(section, f"{path}.")
            continue
        default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
        yield Key(path=path, type=_type(field), default=default, description=field.description or "")
        if section is not None:
            yield from keys_of(section, f"{path}.NAME." if get_origin(_plain(field.annotation)) is dict else f"{path}.")


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key.path, value) of every value. A table whose keys are no names, such as files with weights, is one
    value."""
    for key, value in table.items():
        if isinstance(value, dict) and all(map(str.isidentifier, value)):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def as_toml(value: Any) -> Any:
    """Return what a value is once it has been written to a file and read from it."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def told(value: Any) -> str:
    """Return a value of a configuration as text for people: with quotes where one could not see where it ends."""
    if value is None:
        return "not set"
    if isinstance(value, str) and value and value == value.strip() and value.isprintable():
        return value
    return json.dumps(value, default=str, ensure_ascii=False)


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the section that a field is, may be, or has several of; and whether it has several."""
    plain = _plain(annotation)
    repeated = get_origin(plain) in (tuple, dict)
    inner = _plain((get_args(plain) or (None,))[-1 if get_origin(plain) is dict else 0]) if repeated else plain
    return (inner, repeated) if isinstance(inner, type) and issubclass(inner, BaseModel) else (None, False)


def _plain(annotation: Any) -> Any:
    """Return a type without what Annotated adds, and without None beside one other type."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        others = [one for one in get_args(annotation) if one is not NoneType]
        return _plain(others[0]) if len(others) == 1 else annotation
    return annotation


def _type(field: FieldInfo) -> str:
    return _type_of(field.annotation, tuple(field.metadata))


def _type_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += tuple(more)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_type_of(one, metadata) for one in inner if one is not NoneType)
    if origin is Literal:
        return ", ".join(f'"{one}"' for one in inner)
    if origin is tuple:
        return "list of " + (_type_of(inner[0]) if Ellipsis in inner else f"{len(inner)}: {_type_of(inner[0])}")
    if origin is dict:
        return f"table, for each name {_type_of(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a table"
    return _PLAIN.get(annotation, "value") + _bounds(metadata)


def _bounds(metadata: tuple[Any, ...]) -> str:
    parts = [part for one in metadata for part in (one, *getattr(one, "metadata", ()))]
    found = [
        f"{word} {getattr(part, name):.10g}" for part in parts for kind, name, word in _BOUNDS if isinstance(part, kind)
    ]
    return f" {', '.join(dict.fromkeys(found))}" if found else ""
