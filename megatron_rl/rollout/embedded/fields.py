"""Reads the fields of a JSON body. Every refusal is a RequestError that names the field and the value."""

import reprlib
from typing import Any

MAX_TEXT = 1024
MAX_PATH = 4096  # of Linux


class RequestError(ValueError):
    """Says what the client did wrong; it is answered with `status`."""

    status = 400


class BodyTooLarge(RequestError):
    """Says that the body has more bytes than any request needs that the server would take."""

    status = 413


class BodyTooSlow(RequestError):
    """Says that a large body did not come in time."""

    status = 408


class TooMuchInFlight(RequestError):
    """Says that a request may be asked again once other requests have ended."""

    status = 429


def default(body: dict[str, Any], key: str, otherwise: Any) -> Any:
    """Return the value of a key; an explicit null means the default, as in SGLang."""
    value = body.get(key)
    return otherwise if value is None else value


def integer(name: str, value: Any, minimum: int, maximum: int) -> int:
    """Return `value` if it is an integer in that range, ends included."""
    if type(value) is not int or not minimum <= value <= maximum:
        raise RequestError(f"{name} must be an integer in [{minimum}, {maximum}], got {cut(value)}")
    return value


def number(name: str, value: Any, minimum: float, maximum: float) -> float:
    """Return `value` if it is a number in that range, ends included. No integer is too large to be compared."""
    if type(value) not in (int, float) or not minimum <= value <= maximum:
        raise RequestError(f"{name} must be a number in [{minimum:g}, {maximum:g}], got {cut(value)}")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise RequestError(f"{name} must be true or false, got {cut(value)}")
    return value


def text(body: dict[str, Any], key: str, otherwise: str | None = None, maximum: int = MAX_TEXT) -> str:
    """Return the value of a key if it is a string that is not empty; `otherwise` when the key is absent or null."""
    return string(key, default(body, key, otherwise), maximum)


def string(name: str, value: Any, maximum: int = MAX_TEXT) -> str:
    """Return `value` if it is a string of 1 to `maximum` characters that can be written as UTF-8."""
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} must be a string, not empty, got {cut(value)}")
    if len(value) > maximum:
        raise RequestError(f"{name} must be at most {maximum} characters long, got {len(value)}: {cut(value)}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{name} must be Unicode text, got half of a surrogate pair: {cut(value)}")
    return value


def flag(body: dict[str, Any], key: str, otherwise: bool) -> bool:
    return boolean(key, default(body, key, otherwise))


def cut(value: Any) -> str:
    """Write a value as a message shows it. What is left out is never written down, however large or deep it is."""
    shown = _SHOWN.repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxlong, _SHOWN.maxother = 3, 70, 70, 70
