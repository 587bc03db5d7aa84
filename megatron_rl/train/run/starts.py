"""Records the starts of a run: each keeps the configuration that it trains with, and says what it changed.

`run_dir/starts/start_N_step_M.toml` is that of the N-th start, which went on after M steps; `run_dir/config.toml` is
the last one's. Both are written when a start is accepted: nothing can refuse it any more.
"""

import logging
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.load import dump_config
from megatron_rl.config.reference import REQUIRED, as_toml, flattened, keys_of, told
from megatron_rl.config.schema import RunConfig
from megatron_rl.files import write_whole
from megatron_rl.parsing import parse_toml, read_text

log = logging.getLogger(__name__)

CONFIG, STARTS = "config.toml", "starts"
_FILE = re.compile(r"start_(\d+)_step_(\d+)\.toml")

Values = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Holds a key whose value is not what it was; None stands for a value that is not set."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {told(self.before)} -> {told(self.now)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStart:
    """Holds the number-th start of a run, after `step` steps."""

    number: int
    step: int
    values: Values


def record_start(config: RunConfig, step: int, resume: bool) -> list[Change]:
    """Keep the configuration of a start that goes on after `step` steps, and log what it changes. Return the changes
    since the last start; none for a run that begins anew."""
    folder, path = config.run_dir / STARTS, config.run_dir / CONFIG
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    before = _values(path) if resume else None
    folder.mkdir(exist_ok=True)
    if before is not None and not _files(folder):  # it was written before there were such files
        shutil.copyfile(path, folder / "start_1_step_0.toml")
    number = 1 + max((number for number, _, _ in _files(folder)), default=0)
    text = dump_config(config)
    for file_path in (folder / f"start_{number}_step_{step}.toml", path):
        write_whole(file_path, text)
    changes = [] if before is None else differences(before, dict(flattened(parse_toml(text))), type(config))
    if changes:
        log.info("changed since the last start: %s", "; ".join(map(str, changes)))
    return changes


def read_starts(run_dir: Path) -> list[RecordedStart]:
    """Read every start of a run, in order; none for a run from before starts were kept."""
    return [
        RecordedStart(number=number, step=step, values=values)
        for number, step, path in _files(run_dir / STARTS)
        if (values := _values(path)) is not None
    ]


def differences(before: Values, now: Values, kind: type[RunConfig]) -> list[Change]:
    """List the keys whose values differ. A key that the earlier file lacks had its default: the version that wrote it
    had no such key."""
    defaults = {key.path: as_toml(key.default) for key in keys_of(kind) if key.default is not REQUIRED}
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = (values.get(key, defaults.get(key)) for values in (before, now))
        if key != "run_dir" and old != new:
            found.append(Change(key=key, before=old, now=new))
    return found


def what_differs(config: RunConfig, keys: Collection[str], files: str = "") -> str:
    """Say for a refusal which of these keys, and of the keys below them, the last start had otherwise. files: what else
    may have changed."""
    before = _values(config.run_dir / CONFIG)
    if before is None:
        return f"one of {', '.join(keys)} has changed"
    now = dict(flattened(parse_toml(dump_config(config))))
    changed = [
        f"{change.key} is {told(change.now)} and was {told(change.before)}"
        for change in differences(before, now, type(config))
        if any(f"{change.key}.".startswith(f"{key}.") for key in keys)
    ]
    return "; ".join(changed) or f"no key has changed, so {files or 'a file'} has"


def _files(folder: Path) -> list[tuple[int, int, Path]]:
    """Return (number, step, path) of each start, in order."""
    found = [(_FILE.fullmatch(path.name), path) for path in folder.glob("start_*.toml")]
    return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)


def _values(path: Path) -> Values | None:
    """Read the values in a file by key; None where there is no file that can be read."""
    try:
        return dict(flattened(parse_toml(read_text(path))))
    except (OSError, ValueError):
        return None
