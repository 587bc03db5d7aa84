"""Says in words what a run was: the facts of the page's first table, and what of its configuration is not the
default."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pydantic import BaseModel

from megatron_rl import __version__
from megatron_rl.config.reference import REQUIRED, as_toml, keys_of, told
from megatron_rl.config.schema import RlConfig, RunConfig, SftConfig
from megatron_rl.evaluation.validations import best_row, read_validations, told_score
from megatron_rl.families import read_architecture
from megatron_rl.parsing import read_json
from megatron_rl.report.runs import Run
from megatron_rl.report.status import status
from megatron_rl.train.run.starts import differences, read_starts

# Several of these may be true of one response: one that is cut off also has no answer.
_FAILURES = {
    "wrong answer": "wrong_share",
    "no answer": "no_answer_share",
    "cut off at the limit": "truncated_share",
    "too slow": "too_slow_share",
    "not judged": "reward_error_share",
}
_KINDS: dict[str, type[RunConfig]] = {"rl": RlConfig, "sft": SftConfig}


def facts(run: Run, parent: str | None) -> list[tuple[str, str]]:
    """Return (name, value) pairs. parent: the run that it started from."""
    tokens = _column(run, "num_loss_tokens")
    seconds = _column(run, "step_seconds")
    found = [
        ("trained by", f"RL, {run.config_values.get('algorithm.name', 'c3po')}" if run.kind == "rl" else "SFT"),
        ("state", _state(run)),
        ("steps", f"{run.num_steps:,}" + (f" of {run.planned_steps:,}" if run.planned_steps else "")),
        ("reward, first → last tenth", _ends(run, "reward")),
        ("best ten steps", _best(run, "reward")),
        ("failed responses, last tenth", _failures(run)),
        ("loss, first → last tenth", _ends(run, "loss") if run.kind == "sft" else ""),
        ("last validation loss", _last(run, "validation_loss")),
        *_validated(run),
        ("seed", str(run.config_values.get("seed", 1))),
        ("tokens trained", _count(sum(tokens))),
        ("tokens sampled", _count(sum(_column(run, "num_generated_tokens")))),
        ("time in steps", _hours(sum(seconds))),
        ("median step", f"{median(seconds):.3g} s" if seconds else ""),
        ("model", _model(run)),
        ("starts from", parent or str(run.config_values.get("model.path", "–"))),
        ("resumed at steps", ", ".join(map(str, run.resumed_at))),
        ("last step written", f"{datetime.fromtimestamp(_changed(run)):%Y-%m-%d %H:%M}"),
    ]
    return [(name, value) for name, value in found if value]


def changes(run: Run) -> list[tuple[str, str, str]]:
    """Return (key, value, default) of every value that is not the default.

    The default is "required" where there is none, and "unknown" where this version of the package has no such key.
    """
    defaults = dict(_defaults(_KINDS[run.kind]))
    return [
        (key, told(value), _told_default(key, defaults))
        for key, value in run.config_values.items()
        if key not in defaults or (value != defaults[key] and value != as_toml(defaults[key]))
    ]


def starts(run: Run) -> list[tuple[str, str, str]]:
    """Return (start, steps before it, what it changed) of every start but the first."""
    known = read_starts(run.directory)
    return [
        (
            f"start {now.number}",
            f"{now.step:,}",
            "; ".join(map(str, differences(before.values, now.values, _KINDS[run.kind]))) or "nothing",
        )
        for before, now in pairwise(known)
    ]


def _told_default(key: str, defaults: Mapping[str, Any]) -> str:
    """Say the default of a key, or of the table that it is in where that may have any keys."""
    parts = key.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((told(defaults[name]) for name in names if name in defaults), "unknown")


def evaluations(runs: Sequence[Run], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the accuracy by benchmark of every `megatron-rl evaluate` output that is named or lies in a run
    directory."""
    found = [(folder.name, folder / "results.json") for folder in folders]
    named = {path.resolve() for _, path in found}
    for run in runs:
        inside = sorted(run.directory.glob("*/results.json"))
        found += [(f"{run.name}, {path.parent.name}", path) for path in inside if path.resolve() not in named]
    rows = []
    for name, path in found:
        try:
            benchmarks = read_json(path)["benchmarks"]
            shown = {
                key: {n: float(one["average"][n]) for n in ("value", "low", "high")} for key, one in benchmarks.items()
            }
        except FileNotFoundError:
            raise ValueError(
                f"{path} does not exist; name the --output of a `megatron-rl evaluate` that has ended"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            if path.parent in folders:
                raise ValueError(f"{path} is no result of `megatron-rl evaluate`; name its --output") from None
            continue
        rows.append({"name": name, "benchmarks": shown})
    return rows


def written_by() -> str:
    return f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, by megatron_rl {__version__}"


def _defaults(kind: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    for key in keys_of(kind):
        yield key.path, "required" if key.default is REQUIRED else key.default


def _state(run: Run) -> str:
    found = status(run.directory)
    told = "not ended" if found["state"] == "unknown" else found["state"]
    if found["state"] in ("running", "silent", "killed"):
        return f"{told} ({found['phase']})"
    return f"{told}: {found['message']}" if found["message"] else told


def _model(run: Run) -> str:
    """Return the size of a run's model, where its configuration is still to be found."""
    for folder in (run.directory / "hf", run.located(str(run.config_values.get("model.path", ".")))):
        try:
            if (folder / "config.json").is_file():
                return f"{_count(read_architecture(folder / 'config.json').num_parameters())} parameters"
        except (ValueError, OSError):
            continue
    return ""


def _column(run: Run, name: str) -> list[float]:
    return [row[name] for row in run.rows if isinstance(row.get(name), int | float)]


def _ends(run: Run, name: str) -> str:
    values = _column(run, name)
    size = max(1, len(values) // 10)
    return f"{fmean(values[:size]):.3f} → {fmean(values[-size:]):.3f}" if values else ""


def _best(run: Run, name: str) -> str:
    values = _column(run, name)
    if len(values) < 10:
        return ""
    means = [fmean(values[i : i + 10]) for i in range(len(values) - 9)]
    at = max(range(len(means)), key=means.__getitem__)
    return f"{means[at]:.3f} from step {at}"


def _failures(run: Run) -> str:
    """Return the kinds of failure with their shares, the most frequent first; "" for a run whose log has none."""
    found = []
    for name, metric in _FAILURES.items():
        values = _column(run, metric)
        if values:
            found.append((fmean(values[-max(1, len(values) // 10) :]), name))
    return ", ".join(f"{name} {share:.0%}" for share, name in sorted(found, reverse=True) if share >= 0.005)


def _validated(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the best and the last score of each benchmark of validation."""
    rows = read_validations(run.directory)
    for name in dict.fromkeys(name for row in rows for name in row["benchmarks"]):
        best, last = best_row(rows, name), [row for row in rows if name in row["benchmarks"]][-1]
        shown = [last] if best is None or best["step"] == last["step"] else [best, last]
        told = (f"{told_score(row, name)} after {row['step']} steps" for row in shown)
        yield f"validation of {name}, best and last", ", ".join(told)


def _last(run: Run, name: str) -> str:
    values = _column(run, name)
    return f"{values[-1]:.4f}" if values else ""


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}" if number else ""


def _hours(seconds: float) -> str:
    if not seconds:
        return ""
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _changed(run: Run) -> float:
    return (run.directory / "metrics.jsonl").stat().st_mtime
