"""This module is `megatron-rl check`: it shows every check of a start in one table, with what to do, before a job waits
for its machines."""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.kinds import kind_of
from megatron_rl.config.limits import doubtful
from megatron_rl.config.load import load_config, read_values
from megatron_rl.config.schema import CommandConfig, RlConfig, RunConfig, SamplingConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.gpus import visible_gpus
from megatron_rl.preflight import checks, thorough
from megatron_rl.preflight.registry import CHECKS, THOROUGH, Check, Start

_REGISTERED = (checks, thorough)  # their checks, by being imported
_WIDEST = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Holds what one check found. state: "ok", "problem", "doubt", "not here" for what is of another machine, or
    "unknown" where what was found before has to be mended first. told: what was found, each with its remedy behind the
    last semicolon."""

    check: str
    about: str
    state: str
    told: tuple[str, ...] = ()


def run_check(arguments: argparse.Namespace) -> int:
    """Print what all checks find. Return the exit code: 2 when one finds a problem."""
    kind: Any = kind_of(read_values(arguments.config, arguments.set))
    config = load_config(kind, arguments.config, arguments.set)
    start, is_here = start_of(config, arguments.nproc, arguments.resume)
    results = [*results_of(start, is_here)]
    problems = sum(len(result.told) for result in results if result.state == "problem")
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(result) for result in results], indent=2) + "\n")
        return 2 if problems else 0
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    for result in results:
        sys.stdout.write("\n".join(as_lines(result, width)) + "\n")
    told = "no problem" if not problems else f"{problems} problem{'' if problems == 1 else 's'}"
    sys.stdout.write(f"{len(results)} checks, {told}\n")
    return 2 if problems else 0


def start_of(config: CommandConfig, num_ranks: int | None, resume: bool) -> tuple[Start, bool]:
    """Return the start that a configuration means, and whether it is meant for this machine. It has as many training
    ranks as `num_ranks`, else those of its cluster, else one."""
    cluster = config.cluster
    elsewhere = cluster is not None and (cluster.nodes > 1 or cluster.gpus_per_node != len(visible_gpus()))
    if isinstance(config, RunConfig):
        size = num_ranks or (cluster.training_ranks if cluster is not None else 1)
        return Start(config=config, world_size=size, resume=resume), num_ranks is not None or not elsewhere
    model: Path | None = None
    asks_teacher = isinstance(config, SamplingConfig) and config.teacher is not None
    if isinstance(config, EvaluateConfig | SamplingConfig) and config.model is not None and not asks_teacher:
        model = config.model.path
    assert isinstance(config, EvaluateConfig | SelectConfig | SamplingConfig)
    return Start(config=config, model=model), not elsewhere


def results_of(start: Start, is_here: bool) -> Iterator[Result]:
    """Yield what every check finds, in their order. is_here: the start is meant for this machine. What an earlier check
    has said is not repeated."""
    said: set[str] = set()
    failed: set[str] = set()
    for one in (*CHECKS.values(), *THOROUGH.values()):
        if one.of_machine and not is_here:
            yield Result(check=one.name, about=one.about, state="not here")
            continue
        found = _found(one, start) if one.after not in failed else None
        new = tuple(text for text in found or () if text not in said)
        said.update(new)
        if found or found is None:
            failed.add(one.name)
        state = "problem" if new else "ok" if found == [] else "unknown"
        yield Result(check=one.name, about=one.about, state=state, told=new)
    if start.trains and isinstance(start.config, RlConfig):
        doubts = tuple(doubtful(start.config))
        about, state = "numbers that work and are hardly meant", "doubt" if doubts else "ok"
        yield Result(check="meaning", about=about, state=state, told=doubts)


def as_lines(result: Result, width: int) -> Iterator[str]:
    """Yield a row of the table, and below it what was found and what to do."""
    yield f"{result.state:<9}{result.check:<14}{result.about}"[:width].rstrip()
    for line in (line.strip() for text in result.told for line in text.splitlines()):
        found, _, remedy = line.rpartition("; ")
        yield from _wrapped(found or remedy, width, "")
        if found:
            yield from _wrapped(remedy, width, "-> ")


def _found(one: Check, start: Start) -> list[str]:
    try:
        return list(one.find(start))
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename or one.name}: {error.strerror or error}; mend that first"]


def _wrapped(text: str, width: int, mark: str) -> list[str]:
    indent = " " * 9
    return textwrap.wrap(
        text, width, initial_indent=indent + mark, subsequent_indent=indent + " " * len(mark), break_on_hyphens=False
    )
