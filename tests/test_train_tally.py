"""Tests the reduction of a step's metrics: sums by tokens, and distributions by quantiles of all values."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rl.train.step.step_metrics import MetricAccumulator, Reports, Terms

REPORTS = Reports(means=("entropy",), distributions={"x": ("mean", "min", "max", "p001", "p50", "p999")})


@pytest.fixture(scope="module", autouse=True)
def world() -> object:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def terms(total: float, entropy: float, values: np.ndarray) -> Terms:
    return Terms(
        total=torch.tensor(total), sums={"entropy": torch.tensor(entropy)}, values={"x": torch.from_numpy(values)}
    )


def test_sums_are_divided_by_tokens_and_the_loss_by_the_denominator() -> None:
    tally = MetricAccumulator(REPORTS)
    tally.add(terms(3.0, 10.0, np.zeros(0)), num_tokens=4)
    tally.add(terms(-1.0, 2.0, np.zeros(0)), num_tokens=2)
    tally.reduce(None, reports=True)
    found = tally.metrics(denominator=8.0)
    assert (found["loss"], found["entropy"], tally.num_tokens) == (0.25, 2.0, 6)
    assert found["x_p50"] == found["x_mean"] == found["x_max"] == 0.0  # no values


def test_quantiles_of_signed_values_are_within_a_bin_of_the_exact_ones() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1.0, 50_000) * 10.0 ** rng.integers(-6, 2, 50_000)
    tally = MetricAccumulator(REPORTS)
    for part in np.split(values, 5):
        tally.add(terms(0.0, 0.0, part), num_tokens=1)
    tally.reduce(None, reports=True)
    found = tally.metrics(1.0)
    assert found["x_mean"] == pytest.approx(values.mean())
    assert (found["x_min"], found["x_max"]) == (values.min(), values.max())
    for name, q in {"x_p001": 0.001, "x_p50": 0.5, "x_p999": 0.999}.items():
        exact = float(np.quantile(values, q, method="inverted_cdf"))
        assert found[name] == pytest.approx(exact, rel=10 ** (1 / 64) - 1 + 1e-9), name


def test_equal_values_come_out_exactly_at_every_quantile() -> None:
    for value in (0.0, 0.25, -3.0):
        tally = MetricAccumulator(REPORTS)
        tally.add(terms(0.0, 0.0, np.full(7, value)), num_tokens=7)
        tally.reduce(None, reports=True)
        assert {tally.metrics(1.0)[f"x_{k}"] for k in ("mean", "min", "max", "p001", "p50", "p999")} == {value}


def test_a_rank_that_does_not_report_leaves_no_trace() -> None:
    tally = MetricAccumulator(REPORTS)
    tally.add(terms(5.0, 5.0, np.ones(3)), num_tokens=3)
    tally.reduce(None, reports=False)
    found = tally.metrics(1.0)
    assert math.isnan(found.pop("entropy"))  # the mean over no tokens
    assert set(found.values()) == {0.0}
