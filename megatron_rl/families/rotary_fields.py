"""Reads how positions are rotated, from either spelling of transformers' config.json."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.parsing import shown

# What each kind needs and what it may have beside, by transformers' names, with the default where it has one.
_PARAMETERS: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "default": ((), {}),
    "linear": (("factor",), {}),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), {}),
    "yarn": (
        ("factor",),
        {
            "original_max_position_embeddings": None,
            "attention_factor": None,
            "beta_fast": None,
            "beta_slow": None,
            "mscale": None,
            "mscale_all_dim": None,
            "truncate": None,
        },
    ),
}
_NOT_SCALING = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rotary_fields(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Rotary. values: of config.json. given: the same with the defaults of the family's class.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; some files have both. They
    must agree. ValueError names what does not, and a kind that is not implemented.
    """
    new, old = _table(values, "rope_parameters"), _table(values, "rope_scaling")
    theta = _agreed("rope_theta", new.get("rope_theta"), old.get("rope_theta"), values.get("rope_theta"))
    fraction = _agreed("partial_rotary_factor", new.get("partial_rotary_factor"), values.get("partial_rotary_factor"))
    kind, scaling = _scaling("rope_parameters", new)
    if old:
        told = _scaling("rope_scaling", old)
        if new and told != (kind, scaling):
            raise ValueError(
                f"rope_parameters and rope_scaling contradict each other ({shown(dict(new))}, {shown(dict(old))}); "
                "leave one of them out"
            )
        kind, scaling = told
    found: dict[str, Any] = {"kind": kind, "theta": theta if theta is not None else given.get("rope_theta", 10000.0)}
    found["fraction"] = fraction if fraction is not None else given.get("partial_rotary_factor", 1.0)
    if kind != "default":
        found |= {"scaling": scaling, "model_positions": given.get("max_position_embeddings", 0)}
    return found


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = values.get(name)
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a table, got {shown(table)}")
    if any(isinstance(value, dict) for value in table.values()):
        raise ValueError(f"{name} differs between kinds of layers, which is not implemented; got {shown(table)}")
    return {key: value for key, value in table.items() if value is not None}


def _scaling(name: str, table: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The kind, and its parameters in the order of their names."""
    kind = _agreed(f"{name}.rope_type", table.get("rope_type"), table.get("type")) or "default"
    if kind not in _PARAMETERS:
        raise ValueError(f"{name}.rope_type must be one of {', '.join(_PARAMETERS)}, got {shown(kind)}")
    needed, optional = _PARAMETERS[kind]
    given = {key: value for key, value in table.items() if key not in _NOT_SCALING}
    for key, value in given.items():
        if key not in needed and key not in optional:
            # A plain table may repeat the model's own length.
            if kind == "default" and key in ("original_max_position_embeddings", "factor") and _is_neutral(key, value):
                continue
            raise ValueError(f"{name}.{key} means nothing for rope_type {kind!r}, got {shown(value)}; leave it out")
        if not isinstance(value, int | float):
            raise ValueError(f"{name}.{key} must be a number, got {shown(value)}")
    missing = [key for key in needed if key not in given]
    if missing:
        raise ValueError(f"{name} of rope_type {kind!r} lacks {', '.join(missing)}")
    parameters = {key: value for key, value in given.items() if key in needed or key in optional}
    return kind, tuple(sorted(parameters.items()))


def _is_neutral(key: str, value: Any) -> bool:
    return key != "factor" or value == 1


def _agreed(name: str, *values: Any) -> Any:
    """The one value of several places that may give it; None where none does."""
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given[1:]):
        raise ValueError(f"{name} is given twice, as {' and '.join(shown(value) for value in given)}; leave one out")
    return given[0] if given else None
