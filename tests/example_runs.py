"""Run an example's rl.toml on tiny inputs, and read the numbers that two equal runs have in common."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked
from inputs import ROOT

from megatron_rl.metric_names import unknown
from megatron_rl.train.run.metrics import read_metrics

# Metrics with these words in their names depend on the clock or on the number of starts.
_NOT_COMPARED = ("seconds", "num_starts", "per_second")


def command(example: str, inputs: Path, run: Path, small: Sequence[str], *options: str) -> list[str]:
    """Return the command that trains an example in `run`. small: settings that make it quick."""
    settings = [f"run_dir={run}", f"model.path={inputs}/model", f"data.train={inputs}/data/train.jsonl", *small]
    flags = [part for setting in settings for part in ("--set", setting)]
    config = str(ROOT / "examples" / example / "rl.toml")
    return [sys.executable, "-m", "megatron_rl.cli", "train", config, *flags, *options]


def finish(arguments: list[str]) -> str:
    """Run a command to its end, which has to be a good one; returns what it said on stderr."""
    done = forked.run(arguments, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def numbers(run: Path) -> list[dict[str, Any]]:
    """Read the metrics of every step, without what two equal runs may differ in. All of them must be known."""
    rows = read_metrics(run / "metrics.jsonl")
    assert unknown(name for row in rows for name in row) == []
    return [{k: v for k, v in row.items() if not any(part in k for part in _NOT_COMPARED)} for row in rows]
