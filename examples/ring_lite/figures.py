"""This module draws the figures of the examples: six panels over the steps of runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_AVERAGED = 11  # steps


@contextmanager
def panels(titles: Mapping[str, str], path: Path) -> Iterator[dict[str, Any]]:
    """Give axes to draw on for each of the six quantities, by its name. The figure is written to `path` afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    found = dict(zip(titles, axes.flat, strict=True))
    for name, axis in found.items():
        axis.set_title(titles[name], fontsize=10)
        axis.grid(alpha=0.3)
    yield found
    figure.savefig(path, dpi=110)


def draw(axis: Any, steps: range, values: Sequence[float], label: str) -> Any:
    """Draw the values pale, and over them the mean of the steps around each. nan leaves a gap. Return the colour."""
    import numpy as np

    (pale,) = axis.plot(steps, values, linewidth=0.8, alpha=0.35)
    padded = np.pad(np.asarray(values, float), _AVERAGED // 2, constant_values=np.nan)
    windows = np.ma.masked_invalid(np.lib.stride_tricks.sliding_window_view(padded, _AVERAGED))
    axis.plot(steps, windows.mean(1).filled(np.nan), color=pale.get_color(), linewidth=1.6, label=label)
    return pale.get_color()
