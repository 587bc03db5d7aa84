"""The figures of the examples: six panels over the steps of runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def panels(titles: Mapping[str, str], path: Path) -> Iterator[dict[str, Any]]:
    """Axes of each of the six quantities, by its name, to be drawn on; written to `path` afterwards."""
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
