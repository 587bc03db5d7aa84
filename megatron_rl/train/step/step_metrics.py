"""Collects the metrics of an optimizer step, typed by how they are reduced over micro-batches and ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Values are counted in signed logarithmic bins, so quantiles of any number of tokens cost the same: 4 % wide, from 1e-9
# up, with one bin for what is nearer to 0.
_BINS_PER_DECADE, _LOWEST_DECADE, _DECADES = 64, -9, 11
_SIDE = _BINS_PER_DECADE * _DECADES


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """Names what an objective reports beside its loss.

    means: names of sums that are divided by the loss tokens of the step.
    distributions: per name the statistics wanted of its values: mean, min, max, or pNNN for the quantile 0.NNN.
    """

    means: tuple[str, ...] = ()
    distributions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Holds an objective's answer for one micro-batch.

    total: the sum to be divided by the denominator, differentiable.
    sums: detached scalars, one for each of `Reports.means`. values: detached [n], n of any size, one for each of
    `Reports.distributions`; what is not finite is left out.
    """

    total: Tensor
    sums: Mapping[str, Tensor]
    values: Mapping[str, Tensor] = field(default_factory=dict)


class MetricAccumulator:
    """Adds up the terms of a step's micro-batches on this rank; `reduce` adds up the ranks, once.

    Until then everything stays on the device where the terms are, and the host waits for nothing.
    """

    def __init__(self, reports: Reports, where: torch.device | str = "cpu") -> None:
        self._reports = reports
        # loss tokens, loss, means
        self._sums = torch.zeros(2 + len(reports.means), dtype=torch.float64, device=where)
        self._distributions = {name: _Distribution(where) for name in reports.distributions}

    def add(self, terms: Terms, num_tokens: int) -> None:
        rows = [terms.total.detach(), *(terms.sums[name] for name in self._reports.means)]
        self._sums[0] += num_tokens
        self._sums[1:] += torch.stack([row.double() for row in rows])
        for name, distribution in self._distributions.items():
            distribution.add(terms.values[name])

    def reduce(self, group: Any, reports: bool) -> None:
        """Add up the ranks. Collective. Afterwards every rank has the sum over the ranks that report: those that hold
        loss tokens which no other one counts."""
        parts = list(self._distributions.values())
        sums = torch.cat([self._sums, *(part.sums for part in parts)]).cpu()
        extremes = torch.cat([self._sums[:0], *(part.extremes for part in parts)]).cpu()
        if not reports:
            sums.zero_()
            extremes.fill_(-math.inf)
        dist.all_reduce(sums, group=group)
        if parts:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        self._sums = sums[: len(self._sums)]
        for i, part in enumerate(parts):
            start = len(self._sums) + i * len(part.sums)
            part.sums = sums[start : start + len(part.sums)]
            part.extremes = extremes[2 * i : 2 * i + 2]

    @property
    def num_tokens(self) -> int:
        return int(self._sums[0])

    def metrics(self, denominator: float) -> dict[str, float]:
        """Return the loss (divided by the denominator), the means per loss token (no number where there is none), and
        NAME_STATISTIC for each distribution."""
        means = (self._sums[2:] / self._sums[0]).tolist()
        found = {"loss": float(self._sums[1]) / denominator, **dict(zip(self._reports.means, means, strict=True))}
        for name, statistics in self._reports.distributions.items():
            found |= {f"{name}_{kind}": self._distributions[name].statistic(kind) for kind in statistics}
        return found


class _Distribution:
    """Counts values in bins, for quantiles. sums: [count, sum, bins from the lowest to the highest value]. extremes:
    [maximum, -minimum]."""

    def __init__(self, where: torch.device | str) -> None:
        self.sums = torch.zeros(2 + 2 * _SIDE + 1, dtype=torch.float64, device=where)
        self.extremes = torch.full((2,), -math.inf, dtype=torch.float64, device=where)

    def add(self, values: Tensor) -> None:
        """Count these values. Sizes depend on no value, so that on a device nobody waits for one."""
        if not len(values):
            return
        values = values.double()
        counted = values.isfinite()
        lowest, highest = values.masked_fill(~counted, math.inf).min(), values.masked_fill(~counted, -math.inf).max()
        values = values.masked_fill(~counted, 0.0)
        self.sums[0] += counted.sum()
        self.sums[1] += values.sum()
        self.extremes = torch.maximum(self.extremes, torch.stack([highest, -lowest]))
        bins = ((values.abs().log10() - _LOWEST_DECADE) * _BINS_PER_DECADE).floor().clamp(-1, _SIDE - 1).long() + 1
        self.sums[2:].index_add_(0, _SIDE + bins * values.sign().long(), counted.double())

    def statistic(self, kind: str) -> float:
        """Return a statistic of the values; 0 when there are none."""
        count, total = self.sums[:2].tolist()
        highest, lowest = float(self.extremes[0]), -float(self.extremes[1])
        if count == 0:
            return 0.0
        if kind in ("mean", "min", "max"):
            return {"mean": total / count, "min": lowest, "max": highest}[kind]
        assert kind[0] == "p", kind
        rank = torch.tensor(math.ceil(float(f"0.{kind[1:]}") * count), dtype=torch.float64)
        position = int(torch.searchsorted(self.sums[2:].cumsum(0), rank)) - _SIDE
        return min(highest, max(lowest, _upper_edge(position)))


def _upper_edge(position: int) -> float:
    """Return the upper edge of the bin `position` places above (or, negative, below) the one around 0."""
    if position > 0:
        return 10.0 ** (_LOWEST_DECADE + position / _BINS_PER_DECADE)
    if position < 0:
        return -(10.0 ** (_LOWEST_DECADE + (-position - 1) / _BINS_PER_DECADE))
    return 0.0
