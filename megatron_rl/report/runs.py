"""A run directory as a record: its configuration, its metrics, and when it was started."""

import json
import struct
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_rl.config.kinds import kind_of
from megatron_rl.config.schema import RlConfig, SftConfig
from megatron_rl.train.metrics import read_metrics

_KINDS = {RlConfig: "rl", SftConfig: "sft"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """name: of its folder, or more of its path where that is needed to tell runs apart. kind: "rl" or "sft".

    config: the resolved configuration as nested tables; config_text: as it stands in the file. rows: of metrics.jsonl,
    by rising step. resumed_at: the steps from which the run went on after it had stopped.
    """

    directory: Path
    name: str
    kind: str
    config: Mapping[str, Any]
    config_text: str
    rows: Sequence[Mapping[str, Any]]
    resumed_at: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        """Up to the last one that is logged."""
        return int(self.rows[-1]["step"]) + 1

    @property
    def planned_steps(self) -> int | None:
        """None for a run in epochs."""
        steps = self.config_values.get("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def has_ended(self) -> bool:
        """The directory of the result is the last thing that a run makes."""
        return (self.directory / "hf").exists()

    @cached_property
    def config_values(self) -> dict[str, Any]:
        """The configuration as key.path: value."""
        return dict(flattened(self.config))

    def located(self, path: str) -> Path:
        """A path of the configuration, which is relative to the folder where the run was started, with links followed.

        That folder is what is above `run_dir`, unless the run has been moved: then this one is as good as any.
        """
        parts = Path(self.config["run_dir"]).parts
        here = self.directory.resolve()
        anchor = Path(*here.parts[: -len(parts)]) if here.parts[-len(parts) :] == parts else Path.cwd()
        return (anchor / path).resolve()


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """ValueError for what is no run, or one without a step."""
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
        text = config_path.read_text()
        config = tomllib.loads(text)
    except FileNotFoundError:
        raise ValueError(
            f"{directory} has no config.toml, so it is no run directory; name the run_dir of a `megatron-rl train` or "
            "`sft`, not a folder above or below it"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
    return Run(
        directory=directory,
        name=name,
        kind=kind,
        config=config,
        config_text=text,
        rows=sorted(rows, key=lambda row: row["step"]),
        resumed_at=tuple(sorted({step for step in _starts(directory / "tensorboard") if step > 0})),
    )


def short_names(directories: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart."""
    for length in range(1, 1 + max(len(d.parts) for d in directories)):
        names = ["/".join(d.parts[-length:]) for d in directories]
        if len(set(names)) == len(names):
            break
    return names


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key.path, value) of every value. A table whose keys are no names, such as files with weights, is one value."""
    for key, value in table.items():
        if isinstance(value, dict) and all(map(str.isidentifier, value)):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def told(value: Any) -> str:
    """A value of a configuration, for people."""
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _starts(folder: Path) -> Iterator[int]:
    """The first step of every start, of which each left a file of TensorBoard that begins with it.

    Read by hand, as importing TensorBoard takes longer than the whole report. A record is: length (8 bytes), checksum
    (4), Event, checksum (4). Of an Event, field 2 is the step, 0 where it is missing, and field 7 the session log.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        with path.open("rb") as file:
            data = file.read(4096)
        for _ in range(3):
            if len(data) < 12:
                break
            (length,) = struct.unpack("<Q", data[:8])
            fields = dict(_fields(data[12 : 12 + length]))
            if 7 in fields:
                yield fields.get(2, 0)
            data = data[16 + length :]


def _fields(message: bytes) -> Iterator[tuple[int, int]]:
    """(number, value) of the fields of a protocol buffer; a value that is no varint is given as 0. Stops at a cut."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value, at

    at = 0
    try:
        while at < len(message):
            tag, at = varint(at)
            value = 0
            match tag & 7:
                case 0:
                    value, at = varint(at)
                case 1:
                    at += 8
                case 2:
                    length, at = varint(at)
                    at += length
                case _:
                    at += 4
            yield tag >> 3, value
    except IndexError:
        return
