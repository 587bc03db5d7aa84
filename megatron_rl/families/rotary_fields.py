"""This module reads how positions are rotated, from either spelling of transformers' config.json."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_rl.parsing import shown

_ORIGINAL = "original_max_position_embeddings"
# The fields that each kind needs, and those that it may have, by transformers' names.
_PARAMETERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (
        ("factor", _ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
_NOT_SCALING = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rotary_fields(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of a Rotary. values: those of config.json. given: the same with the defaults of the family's
    class.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; some files have both. They
    must agree. ValueError names what does not, and a kind that is not implemented.
    """
    new, old = _table(values, "rope_parameters"), _table(values, "rope_scaling")
    theta = agreed("rope_theta", new.get("rope_theta"), old.get("rope_theta"), values.get("rope_theta"))
    name = "partial_rotary_factor"
    fraction = agreed(name, new.get(name), old.get(name), values.get(name))
    length = values.get(_ORIGINAL), given.get("max_position_embeddings")
    kind, scaling = _scaling("rope_parameters", new, *length)
    if old:
        told = _scaling("rope_scaling", old, *length)
        if new and told != (kind, scaling):
            raise ValueError(
                f"rope_parameters and rope_scaling contradict each other ({shown(dict(new))}, {shown(dict(old))}); "
                "leave one of them out"
            )
        kind, scaling = told
    theta = given.get("rope_theta", 10000.0) if theta is None else theta
    if kind == "yarn" and isinstance(theta, int | float) and theta <= 1:
        raise ValueError(f"rope_theta must be above 1 for rope_type 'yarn', got {shown(theta)}")
    return {
        "kind": kind,
        "theta": theta,
        "fraction": given.get(name, 1.0) if fraction is None else fraction,
        "scaling": scaling,
    }


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = values.get(name)
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a table, got {shown(table)}")
    if any(isinstance(value, dict) for value in table.values()):
        raise ValueError(f"{name} differs between kinds of layers, which is not implemented; got {shown(table)}")
    return {key: value for key, value in table.items() if value is not None}


def _scaling(
    name: str, table: Mapping[str, Any], original: Any, longest: Any
) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """Return the kind, and its parameters in the order of their names.

    original: the length that the model was trained with, where config.json says so outside of the table; it wins, as in
    transformers. longest: what takes its place where neither says it.
    """
    kind = agreed(f"{name}.rope_type", table.get("rope_type"), table.get("type")) or "default"
    if not isinstance(kind, str) or kind not in _PARAMETERS:
        raise ValueError(f"{name}.rope_type must be one of {', '.join(_PARAMETERS)}, got {shown(kind)}")
    needed, optional = _PARAMETERS[kind]
    found = {key: value for key, value in table.items() if key not in _NOT_SCALING}
    if kind == "default":  # the model's own length and a factor of 1 say nothing
        found = {key: value for key, value in found.items() if key != _ORIGINAL and (key != "factor" or value != 1)}
    if _ORIGINAL in needed and original is not None:
        found[_ORIGINAL] = original
    if kind == "yarn":
        found.setdefault(_ORIGINAL, longest)
    for key, value in found.items():
        if key not in needed and key not in optional:
            raise ValueError(f"{name}.{key} means nothing for rope_type {kind!r}, got {shown(value)}; leave it out")
        _check_number(f"{name}.{key}", key, value)
    missing = [key for key in needed if key not in found]
    if missing:
        raise ValueError(f"{name} of rope_type {kind!r} lacks {', '.join(missing)}")
    return kind, tuple(sorted(found.items()))


def _check_number(name: str, key: str, value: Any) -> None:
    if key == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {shown(value)}")
        return
    least = 1 if key in ("factor", _ORIGINAL) else 0
    is_number = type(value) in (int, float) and math.isfinite(value)
    if not is_number or value < least or value == 0:
        raise ValueError(f"{name} must be a number {'of at least 1' if least else 'above 0'}, got {shown(value)}")


def agreed(name: str, *values: Any) -> Any:
    """Return the one value of several places that may give it; None where none does. ValueError where they differ."""
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given[1:]):
        raise ValueError(f"{name} is given twice, as {' and '.join(shown(value) for value in given)}; leave one out")
    return given[0] if given else None
