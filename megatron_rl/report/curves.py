"""Turns metrics of a run into curves of about a thousand points, however long it was."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rl.report.runs import Run

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_VALIDATION, _LOW, _HIGH = "validation/", "validation_low/", "validation_high/"
_DIGITS = 5  # significant ones in the page
_PHASES = tuple(f"{phase}_seconds" for phase in ("rollout", "plan", "update_weights", "train", "offload", "reload"))


def bin_width(num_steps: int, points: int) -> int:
    """Return the steps that one point stands for, so that a run has at most `points` points."""
    return max(1, -(-num_steps // points))


def binned(steps: Ints, values: Floats, width: int) -> tuple[Floats, Floats, Floats]:
    """Return (mean, lowest, highest) [m] of the values [n] in each bin that has a step.

    Bin k holds the steps from k * width on. steps [n] rise. NaN is a missing value; a bin of nothing else is NaN.
    """
    starts = np.flatnonzero(np.diff(steps // width, prepend=-1))
    there = np.isfinite(values)
    counts = np.add.reduceat(there.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(there, values, 0.0), starts)
    some = counts > 0
    lowest = np.minimum.reduceat(np.where(there, values, np.inf), starts)
    highest = np.maximum.reduceat(np.where(there, values, -np.inf), starts)
    mean = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=some)
    return mean, np.where(some, lowest, np.nan), np.where(some, highest, np.nan)


def curves(run: Run, width: int) -> dict[str, Any]:
    """Return what the page draws of a run.

    bins, x, tokens, hours: [m], the number of each bin, and its mean step, and loss tokens and hours up to its end.
    metrics: name: [means] where a bin is a step, else [means, lowest, highest]; of a validation always with the ends of
    its interval. A value that is not there is None.
    """
    rows = [*run.rows, *run.last_validation]
    steps = np.array([row["step"] for row in rows], dtype=np.int64)
    columns = metric_columns(rows)
    validated = [name.removeprefix(_VALIDATION) for name in columns if name.startswith(_VALIDATION)]
    intervals = {name: [columns.pop(end + name, None) for end in (_LOW, _HIGH)] for name in validated}
    starts = np.flatnonzero(np.diff(steps // width, prepend=-1))
    ends = np.append(starts[1:], len(steps)) - 1

    def up_to(name: str) -> Floats:
        return np.nancumsum(columns.get(name, np.full(len(steps), np.nan)))[ends]

    found = {}
    for name, values in columns.items():
        mean, low, high = binned(steps, values, width)
        found[name] = [_rounded(mean)] if width == 1 else [_rounded(mean), _rounded(low), _rounded(high)]
    for name, interval in intervals.items():
        drawn = [columns[_VALIDATION + name], *(end for end in interval if end is not None)]
        found[_VALIDATION + name] = [_rounded(binned(steps, values, width)[0]) for values in drawn]
    return {
        "bins": (steps[starts] // width).tolist(),
        "x": _rounded(binned(steps, steps.astype(np.float64), width)[0], digits=9),
        "tokens": _rounded(up_to("num_loss_tokens")),
        "hours": _rounded((up_to("step_seconds") + up_to("validation_seconds")) / 3600),
        "metrics": found,
    }


def metric_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    """Return every number of the rows [n] by its name; NaN where a row has none.

    rest_seconds: of a step, outside its phases.
    """
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    columns = {}
    for name in names:
        values = np.array([_number(row.get(name)) for row in rows])
        if np.isfinite(values).any():
            columns[name] = values
    if "step_seconds" in columns and _PHASES[0] in columns:
        phases = [columns[name] for name in _PHASES if name in columns]
        columns["rest_seconds"] = np.maximum(0.0, columns["step_seconds"] - np.nansum(phases, axis=0))
    return columns


def _number(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value) if abs(value) < 1e300 else np.nan
        except OverflowError:
            return np.nan
    return np.nan


def _rounded(values: Floats, digits: int = _DIGITS) -> list[float | None]:
    """Round values; whole numbers become integers, which are shorter in JSON."""
    rounded = [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in values.tolist()]
    return [int(v) if v is not None and v == int(v) and abs(v) < 2**53 else v for v in rounded]
