"""Tests that the table of metrics is that of docs/metrics.md, and names each metric once."""

import re
from pathlib import Path

from megatron_rl.metric_names import markdown, sections, unknown

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_the_table() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m megatron_rl.metric_names > docs/metrics.md"


def test_each_metric_is_named_once_and_says_what_it_means() -> None:
    metrics = [metric for part in sections().values() for metric in part]
    assert len({metric.name for metric in metrics}) == len(metrics)
    assert all(re.fullmatch(r"[A-Z].*[^.]\.", metric.meaning) for metric in metrics)


def test_only_metrics_with_domains_take_one() -> None:
    assert unknown(["reward", "reward/code", "num_loss_tokens/math"]) == []
    assert unknown(["rewards", "grad_norm/math"]) == ["rewards", "grad_norm/math"]
