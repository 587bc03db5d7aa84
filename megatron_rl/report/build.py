"""Runs `megatron-rl report`, which makes a page from run directories."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.files import write_whole
from megatron_rl.report.curves import bin_width, curves
from megatron_rl.report.families import groups, offsets, parents
from megatron_rl.report.follow import run_follow
from megatron_rl.report.page import render
from megatron_rl.report.rollouts import evenly, read_step, steps_with_rollouts
from megatron_rl.report.runs import Run, read_runs
from megatron_rl.report.sections import sections_for
from megatron_rl.report.status import status
from megatron_rl.report.summary import changes, evaluations, facts, starts, written_by
from megatron_rl.train.run.metrics import bar

log = logging.getLogger(__name__)

# These bound the page's size: points of all curves of one metric, steps and characters of all responses.
_POINTS, _FEWEST_POINTS = 4000, 200
_MOST_POINTS = 1000
_STEPS, _FEWEST_STEPS = 60, 4
_STEPS_OF_ONE_RUN = 20
_CHARACTERS, _LONGEST_RESPONSE, _SHORTEST_RESPONSE = 6_000_000, 6000, 600
_RESPONSES_OF_A_STEP = 64
_NAMES = 4  # in the title


def run_report(
    directories: Sequence[Path],
    output: Path | None,
    steps_shown: int | None,
    evaluation: Sequence[Path],
    follow: bool = False,
    port: int = 0,
) -> int:
    """Write the page, or serve it. Returns the exit code."""
    if steps_shown is not None and steps_shown < 0:
        raise ValueError(f"--steps-shown must be at least 0, got {steps_shown}; 0 shows no responses")
    if follow:
        for directory in directories:
            status(directory)  # which refuses what is no run
        return run_follow(
            directories,
            lambda version: render(page_data(read_runs(directories), steps_shown, evaluation) | {"version": version}),
            port,
        )
    runs = read_runs(directories)
    output = output or (directories[0] / "report.html" if len(directories) == 1 else Path("report.html"))
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output must be a file in a folder that exists, got {output}")
    page = render(page_data(runs, steps_shown, evaluation))
    write_whole(output, page)
    log.info("wrote %s, %.1f MB; open it in a browser", output, len(page) / 1e6)
    return 0


def page_data(runs: Sequence[Run], steps_shown: int | None, evaluation: Sequence[Path]) -> dict[str, Any]:
    """Return what the page's scripts read."""
    parent_of = parents(runs)
    points = max(_FEWEST_POINTS, min(_MOST_POINTS, _POINTS // len(runs)))
    width = bin_width(max(run.num_steps for run in runs), points)
    if steps_shown is None:
        steps_shown = max(_FEWEST_STEPS, min(_STEPS_OF_ONE_RUN, _STEPS // len(runs)))
    responses = max(1, steps_shown * len(runs) * _RESPONSES_OF_A_STEP)
    characters = max(_SHORTEST_RESPONSE, min(_LONGEST_RESPONSE, _CHARACTERS // responses))
    shown: list[dict[str, Any]] = []
    for run, parent, offset in zip(runs, parent_of, offsets(runs, parent_of), strict=True):
        steps = steps_with_rollouts(run)
        chosen = evenly(steps, steps_shown)
        shown.append(
            {
                "name": run.name,
                "directory": str(run.directory),
                "facts": facts(run, runs[parent].name if parent is not None else None),
                "changes": changes(run),
                "starts": starts(run),
                "config": run.config_text,
                "curves": curves(run, width),
                "parent": parent,
                "offset": offset,
                "resumed_at": run.resumed_at,
                "num_rollout_files": len(steps),
                "rollouts": [read_step(run, step, characters) for step in bar(chosen, f"responses of {run.name}")],
            }
        )
    drawn = [run["curves"]["metrics"] for run in shown]
    present = {name for metrics in drawn for name in metrics}
    zero = {name for name in present if not any(np.any(m[name][-1]) for m in drawn if name in m)}
    found = groups(runs, parent_of)
    return {
        "title": _title(runs, [group.label for group in found] if len(found) < len(runs) else [r.name for r in runs]),
        "subtitle": f"Run report of {written_by()}",
        "width": width,
        "runs": shown,
        "groups": [{"label": g.label, "members": g.members, "differences": g.differences} for g in found],
        "evaluations": evaluations(runs, evaluation),
        "sections": sections_for(present, zero),
    }


def _title(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the names of runs, after that of the folder that they share."""
    folders = {run.directory.resolve().parent for run in runs}
    shared = f"{folders.pop().name}: " if len(folders) == 1 and len(runs) > 1 else ""
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return shared + ", ".join(names[:_NAMES]) + more
