"""Reads a run directory into a record: its configuration, its metrics, and when it was started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_rl.config.kinds import kind_of
from megatron_rl.config.reference import flattened
from megatron_rl.config.schema import RlConfig, SftConfig
from megatron_rl.evaluation.validations import read_validations, validation_metrics
from megatron_rl.parsing import parse_toml, read_text
from megatron_rl.train.run.metrics import read_metrics

_KINDS = {RlConfig: "rl", SftConfig: "sft"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Holds the record of a run. name: of its folder, or more of its path where that is needed to tell runs apart.
    kind: "rl" or "sft".

    config: the resolved configuration as nested tables; config_text: as it stands in the file. rows: of metrics.jsonl,
    by rising step. resumed_at: the steps from which the run went on after it had stopped. last_validation: none, or the
    metrics of the weights after the last step, which have no row of their own.
    """

    directory: Path
    name: str
    kind: str
    config: Mapping[str, Any]
    config_text: str
    rows: Sequence[Mapping[str, Any]]
    resumed_at: tuple[int, ...]
    last_validation: Sequence[Mapping[str, Any]] = ()

    @property
    def num_steps(self) -> int:
        """Count the steps up to the last one that is logged."""
        return int(self.rows[-1]["step"]) + 1

    @property
    def planned_steps(self) -> int | None:
        """Return the steps of the whole run; None for a run in epochs."""
        steps = self.config_values.get("train.steps")
        return steps if isinstance(steps, int) else None

    @cached_property
    def config_values(self) -> dict[str, Any]:
        """Return the configuration as key.path: value."""
        return dict(flattened(self.config))

    def located(self, path: str) -> Path:
        """Resolve a path of the configuration, which is relative to the folder where the run was started; links are
        followed.

        That folder is what is above `run_dir`, unless the run has been moved: then this one is as good as any.
        """
        parts = Path(self.config["run_dir"]).parts
        here = self.directory.resolve()
        anchor = Path(*here.parts[: -len(parts)]) if here.parts[-len(parts) :] == parts else Path.cwd()
        return (anchor / path).resolve()


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Read the runs. Raise ValueError for what is no run, or one without a step."""
    resolved = [directory.resolve() for directory in directories]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise ValueError(f"{directories[index]} is named twice; name every run once")
    return [read_run(d, name) for d, name in zip(directories, short_names(resolved), strict=True)]


def read_run(directory: Path, name: str) -> Run:
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; name the run_dir of a `megatron-rl train` or `sft`")
    config_path, metrics_path = directory / "config.toml", directory / "metrics.jsonl"
    try:
        text = read_text(config_path)
        config = parse_toml(text)
    except FileNotFoundError:
        raise ValueError(
            f"{directory} has no config.toml, so it is no run directory; name the run_dir of a `megatron-rl train` or "
            "`sft`, not a folder above or below it"
        ) from None
    except ValueError as error:
        raise ValueError(f"{config_path} is not valid TOML: {error}; put back what the run wrote") from None
    kind = _KINDS.get(kind_of(config))
    if kind is None or not isinstance(config.get("run_dir"), str):
        raise ValueError(
            f"{config_path} is not the configuration of a `megatron-rl train` or `sft`, which alone have runs"
        )
    rows = read_metrics(metrics_path)
    if not rows:
        raise ValueError(f"{metrics_path} has no step yet; wait until the run has ended its first step")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(
                f"{metrics_path}, line {number} is no metrics of a step (an object with `step`); remove it"
            )
    rows.sort(key=lambda row: row["step"])
    return Run(
        directory=directory,
        name=name,
        kind=kind,
        config=config,
        config_text=text,
        rows=rows,
        last_validation=[
            {"step": row["step"], "validation_seconds": row["seconds"], **validation_metrics(row)}
            for row in read_validations(directory)
            if row["step"] > rows[-1]["step"]
        ][-1:],
        resumed_at=tuple(b["step"] for a, b in pairwise(rows) if b.get("num_starts", 1) != a.get("num_starts", 1)),
    )


def short_names(directories: Sequence[Path]) -> list[str]:
    """Return the last parts of each path, as many as tell all of them apart."""
    for length in range(1, 1 + max(len(d.parts) for d in directories)):
        names = ["/".join(d.parts[-length:]) for d in directories]
        if len(set(names)) == len(names):
            break
    return names
