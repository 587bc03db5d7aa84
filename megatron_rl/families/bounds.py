"""This module holds types for the fields of config.json: numbers within bounds, and nothing that only converts to one
(true, "8", 8.0)."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Strict

from megatron_rl.parsing import shown

# Far above every model that there is, and small enough that names of all tensors fit into memory.
MAX_WIDTH = 2**20
MAX_TOKENS = 2**24
MAX_MTP_LAYERS = 64


def whole_number(value: Any, low: int, high: int) -> int:
    """Return the value if it is a whole number within bounds; ValueError says what it must be."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"must be a whole number from {low} to {high}, got {shown(value)}")
    return value


def whole(low: int, high: int) -> BeforeValidator:
    """Accept a whole number within bounds."""
    return BeforeValidator(lambda value: whole_number(value, low, high))


def above_zero(high: float) -> BeforeValidator:
    """Accept a number above 0, up to a bound. NaN and infinity are none."""

    def check(value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value <= high:
            raise ValueError(f"must be a number above 0 and up to {high:g}, got {shown(value)}")
        return float(value)

    return BeforeValidator(check)


Width = Annotated[int, whole(1, MAX_WIDTH)]
MaybeWidth = Annotated[int, whole(0, MAX_WIDTH)]
TokenId = Annotated[int, whole(0, MAX_TOKENS)]
Flag = Annotated[bool, Strict()]
