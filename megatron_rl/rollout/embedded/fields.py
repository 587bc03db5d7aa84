"""Reading the fields of a JSON body. Every refusal is a RequestError that names the field and the value."""

import math
from typing import Any


class RequestError(ValueError):
    """The client's fault: answered with status 400."""


def default(body: dict[str, Any], key: str, otherwise: Any) -> Any:
    """The value of a key; an explicit null means the default, as in SGLang."""
    value = body.get(key)
    return otherwise if value is None else value


def integer(name: str, value: Any, minimum: int | None) -> int:
    if type(value) is not int or (minimum is not None and value < minimum):
        least = "" if minimum is None else f" of at least {minimum}"
        raise RequestError(f"{name} must be an integer{least}, got {cut(value)}")
    return value


def number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, got {cut(value)}")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise RequestError(f"{name} must be true or false, got {cut(value)}")
    return value


def text(body: dict[str, Any], key: str, otherwise: str | None = None) -> str:
    """A string that is not empty; `otherwise` when the key is absent or null."""
    value = default(body, key, otherwise)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{key} must be a string, not empty, got {cut(value)}")
    return value


def flag(body: dict[str, Any], key: str, otherwise: bool) -> bool:
    return boolean(key, default(body, key, otherwise))


def cut(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
