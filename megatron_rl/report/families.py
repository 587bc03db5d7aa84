"""Tells how runs belong together: those that differ by seed alone are a group, and one may start from another's
model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.reference import told
from megatron_rl.config.tracking import TrackingSection
from megatron_rl.report.runs import Run

# These settings change where and how fast a run goes, but not what it trains.
_PLACES = {"run_dir", "seed", "threads", "rollout.port", "rollout.urls", "rollout.sglang_python"}
_PLACES |= {f"tracking.{name}" for name in TrackingSection.model_fields}
_MOST_NAMED = 3
_PARTS = re.compile(r"([-_/])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Holds runs that differ by seed alone. members: indices of its runs. differences: of the keys in which groups
    differ, this one's values."""

    label: str
    members: tuple[int, ...]
    differences: Mapping[str, str]


def parents(runs: Sequence[Run]) -> list[int | None]:
    """Return for each run the index of the one from whose model it started, or None."""
    return [next((i for i, run in enumerate(runs) if run is not child and _is_in(child, run)), None) for child in runs]


def offsets(runs: Sequence[Run], parent_of: Sequence[int | None]) -> list[int]:
    """Return the step at which each run begins on an axis on which stages follow each other."""

    def offset(index: int, above: tuple[int, ...] = ()) -> int:
        parent = parent_of[index]
        if parent is None or parent in above:  # two runs that name each other: neither was first
            return 0
        return offset(parent, (*above, index)) + _steps_taken(runs[parent], runs[index].config_values["model.path"])

    return [offset(index) for index in range(len(runs))]


def groups(runs: Sequence[Run], parent_of: Sequence[int | None]) -> list[Group]:
    """Group the runs whose configurations are equal but for seeds and places, in the order of their first members."""
    keys = [_without_seed(run) for run in runs]
    # Runs whose parents are of one group start from the same model, whatever it is called.
    group_of: dict[int, int] = {}
    members: list[list[int]] = []
    for index in sorted(range(len(runs)), key=lambda i: _depth(i, parent_of)):
        parent = parent_of[index]
        for number, group in enumerate(members):
            other = parent_of[group[0]]
            same_start = parent is not None and other is not None and group_of.get(parent) == group_of.get(other)
            ignored = {"model.path"} if same_start else set()
            if all(keys[index].get(k) == keys[group[0]].get(k) for k in {*keys[index], *keys[group[0]]} - ignored):
                group.append(index)
                group_of[index] = number
                break
        else:
            group_of[index] = len(members)
            members.append([index])
    members.sort(key=min)
    found = [[runs[i] for i in group] for group in members]
    labels = _labels(found)
    return [
        Group(label=label, members=tuple(sorted(group)), differences=_differences(of, found))
        for label, group, of in zip(labels, members, found, strict=True)
    ]


def _is_in(child: Run, run: Run) -> bool:
    """Tell whether the child's starting weights are of this run: by the folder, or as both configurations call it."""
    path = child.config_values.get("model.path")
    if path is None:
        return False
    return run.directory.resolve() in child.located(path).parents or Path(run.config["run_dir"]) in Path(path).parents


def _steps_taken(parent: Run, path: str) -> int:
    """Count the steps of the parent before the child began: what a checkpoint's name says, else all."""
    found = re.fullmatch(r"step_(\d+)", Path(path).name)
    return int(found[1]) if found else parent.num_steps


def _depth(index: int, parent_of: Sequence[int | None]) -> int:
    depth, seen, at = 0, {index}, parent_of[index]
    while at is not None and at not in seen:
        seen.add(at)
        depth, at = depth + 1, parent_of[at]
    return depth


def _without_seed(run: Run) -> dict[str, Any]:
    """Return every value that says what is trained. Where a path has a run's own seed as a word, runs/seed_2, that is
    *."""
    seed = re.compile(rf"(?<![0-9A-Za-z])(s|seed)?{run.config.get('seed', 1)}(?![0-9A-Za-z])")

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {without(path): weight for path, weight in value.items()}
        return seed.sub(r"\1*", value) if isinstance(value, str) else value

    return {key: without(value) for key, value in run.config_values.items() if key not in _PLACES}


def _differences(group: Sequence[Run], others: Sequence[Sequence[Run]]) -> dict[str, str]:
    """Return the keys in which the first run of this group differs from that of another one of its kind, with its
    values."""
    firsts = [other[0].config_values for other in others if other[0].kind == group[0].kind]
    mine = group[0].config_values
    keys = sorted({key for values in firsts for key in values} - _PLACES)
    return {key: told(mine.get(key)) for key in keys if any(values.get(key) != mine.get(key) for values in firsts)}


def _labels(found: Sequence[Sequence[Run]]) -> list[str]:
    """Return the values in which groups differ, while they are few and no paths; else the names of their folders."""
    differences = [_differences(group, found) for group in found]
    keys = sorted(
        {key for values in differences for key in values if not any("/" in v.get(key, "") for v in differences)}
    )
    if 0 < len(keys) <= _MOST_NAMED and len({group[0].kind for group in found}) == 1:
        labels = [", ".join(_named(key, values.get(key, "")) for key in keys) for values in differences]
        if len(set(labels)) == len(labels):
            return labels
    labels = _without_common_end([_common_name(group) for group in found])
    return [name if labels.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(labels, start=1)]


def _named(key: str, value: str) -> str:
    leaf = key.split(".")[-1]
    return value if leaf == "name" else f"{leaf} {value}"


def _common_name(members: Sequence[Run]) -> str:
    """Return the name of the runs, with * where their names differ."""
    columns = list(zip(*(_PARTS.split(run.name) for run in members), strict=False))
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in columns)


def _without_common_end(names: Sequence[str]) -> list[str]:
    parts = [_PARTS.split(name) for name in names]
    while len(parts) > 1 and min(map(len, parts)) > 2 and len({tuple(p[-2:]) for p in parts}) == 1:
        parts = [p[:-2] for p in parts]
    return ["".join(p) for p in parts]
