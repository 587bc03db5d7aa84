"""Runs `megatron-rl status`, which tells where runs are, by their files alone, while they run, when they have ended,
after a kill."""

import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from megatron_rl.checkpoint.newest import newest
from megatron_rl.config.kinds import kind_of
from megatron_rl.config.schema import RlConfig
from megatron_rl.config.train import TrainSection
from megatron_rl.parsing import parse_toml, read_json, read_text
from megatron_rl.terminal import duration
from megatron_rl.train.run.alarms import Alarms
from megatron_rl.train.run.metrics import metric_rows
from megatron_rl.train.run.starts import CONFIG
from megatron_rl.train.run.watchdog import BEAT_SECONDS, HEARTBEAT

# After so long without a heartbeat a process on another machine is gone, or its machine is.
_SILENT_SECONDS = 6 * BEAT_SECONDS
_STEPS_FOR_ETA = 20
_SHOWN = {  # names of metrics for people, in the order in which they are shown
    "reward": "reward {:.3f}",
    "loss": "loss {:.4f}",
    "entropy": "entropy {:.3f}",
    "grad_norm": "gradient norm {:.3g}",
    "response_tokens_mean": "{:,.0f} tokens a response",
    "trained_tokens_per_second": "{:,.0f} tokens/s trained",
    "step_seconds": "{:.3g} s a step",
}
_ALARMS_TOLD = 3


def run_status(directories: Sequence[Path], as_json: bool) -> int:
    """Print where each run is. Returns the exit code."""
    found = [status(directory) for directory in directories]
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(as_text(one) for one in found))
    return 0


def status(directory: Path) -> dict[str, Any]:
    """Tell where a run is. Raise ValueError for what is no run directory.

    state: running; silent, when its machine has not said so for a minute; ended, stopped (--resume goes on), failed or
    refused (message says why), killed (it ended without a word), or unknown, of a version without such files. step: the
    one that is under way, from 0 as in metrics.jsonl. num_done, num_steps: steps that are done, and of the whole run.
    """
    beat = _heartbeat(directory)
    config = _config(directory)
    if beat is None and config is None:
        raise ValueError(
            f"{directory} has neither {HEARTBEAT} nor {CONFIG}, so no run has begun there; name the run_dir of a "
            "`megatron-rl train` or `sft`"
        )
    beat, config = beat or {}, config or {}
    rows = [row for row in metric_rows(directory / "metrics.jsonl") if isinstance(row.get("step"), int)]
    num_done = rows[-1]["step"] + 1 if rows else 0
    state, configured = state_of(directory, beat), config.get("train", {}).get("steps")
    # A refused start told of steps that the run never had; config.toml is of the last accepted one.
    num_steps = (state == "refused" and configured) or beat.get("num_steps") or configured
    latest = newest(directory / "checkpoints")
    is_running = state == "running"
    return {
        "run": str(directory),
        "kind": "rl" if kind_of(config) is RlConfig else "sft",
        "state": state,
        "message": beat.get("message", ""),
        "phase": beat.get("phase"),
        "phase_seconds": _phase_seconds(beat, is_running),
        "step": beat.get("step"),
        "num_done": num_done,
        "num_steps": num_steps,
        "eta_seconds": _eta_seconds(rows, num_done, num_steps) if is_running else None,
        "host": beat.get("host"),
        "pid": beat.get("pid"),
        "seen_at": beat.get("time"),
        "checkpoint": str(latest) if latest is not None else None,
        "model": str(directory / "hf") if (directory / "hf").exists() else None,
        "metrics": rows[-1] if rows else None,
        "alarms": alarms(rows, config),
    }


def state_of(directory: Path, beat: Mapping[str, Any] | None = None) -> str:
    """Return the state of a run, as `status` names it. beat: its heartbeat, read before."""
    beat = _heartbeat(directory) or {} if beat is None else beat
    if not beat or "state" not in beat:
        return "ended" if (directory / "hf").exists() else "unknown" if not beat else _alive(beat)
    return str(beat["state"]) if beat["state"] != "running" else _alive(beat)


def alarms(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Find again in a run's metrics what it warned of: they say the same whenever they are looked at."""
    names = {"grad_norm_alarm", "reward_alarm"}
    own = {name: value for name, value in config.get("train", {}).items() if name in names}
    watch = Alarms(TrainSection(micro_batch_tokens=1, **own))
    return [
        {"step": row["step"], "message": message} for row in rows if "grad_norm" in row for message in watch.check(row)
    ]


def as_text(found: Mapping[str, Any]) -> str:
    """Return a few lines for people."""
    total = f" of {found['num_steps']:,}" if found["num_steps"] else ""
    lines = [f"{found['run']}: {_state_in_words(found)}", f"  {found['num_done']:,}{total} steps done{_eta(found)}"]
    metrics = found["metrics"]
    if metrics:
        told = [form.format(metrics[name]) for name, form in _SHOWN.items() if _is_number(metrics.get(name))]
        lines.append(f"  step {metrics['step']}: {', '.join(told)}")
    if found["checkpoint"]:
        lines.append(f"  newest checkpoint {found['checkpoint']}")
    if found["model"]:
        lines.append(f"  model {found['model']}")
    for alarm in found["alarms"][-_ALARMS_TOLD:]:
        lines.append(f"  alarm, step {alarm['step']}: {alarm['message']}")
    if len(found["alarms"]) > _ALARMS_TOLD:
        before = len(found["alarms"]) - _ALARMS_TOLD
        lines.append(f"  and {before} alarm{'' if before == 1 else 's'} before (--json has all)")
    return "\n".join(lines) + "\n"


def _state_in_words(found: Mapping[str, Any]) -> str:
    state, phase = found["state"], found["phase"]
    where = f"on {found['host']} (process {found['pid']})" if found["host"] else ""
    if state in ("running", "silent"):
        seconds = found["phase_seconds"]
        doing = f"{phase} of step {found['step']}" if found["num_done"] or phase != "start" else "starting"
        silent = f", silent for {duration(time.time() - found['seen_at'])}" if state == "silent" else ""
        return f"{state}, {doing} for {duration(seconds)}, {where}{silent}"
    at = f" {datetime.fromtimestamp(found['seen_at']):%Y-%m-%d %H:%M}" if found["seen_at"] else ""
    if state == "killed":
        return f"killed in {phase} of step {found['step']}, last seen{at} {where}; start it again with --resume"
    again = "; --resume goes on" if state in ("stopped", "failed") and found["checkpoint"] else ""
    why = f": {found['message']}" if found["message"] else ""
    return f"{state}{at}{why}{again}"


def _eta(found: Mapping[str, Any]) -> str:
    seconds = found["eta_seconds"]
    if seconds is None:
        return ""
    return f", the rest takes about {duration(seconds)}, until {datetime.fromtimestamp(time.time() + seconds):%a %H:%M}"


def _eta_seconds(rows: Sequence[Mapping[str, Any]], num_done: int, num_steps: int | None) -> float | None:
    """Estimate the seconds that are left by the mean of the last steps."""
    recent = [row["step_seconds"] for row in rows[-_STEPS_FOR_ETA:] if _is_number(row.get("step_seconds"))]
    return fmean(recent) * max(0, num_steps - num_done) if recent and num_steps else None


def _phase_seconds(beat: Mapping[str, Any], is_running: bool) -> float | None:
    """Count the seconds in the present phase, up to now or to the last heartbeat."""
    if "phase_seconds" not in beat:
        return None
    since = time.time() - beat["time"] if is_running else 0.0
    return round(float(beat["phase_seconds"]) + max(0.0, since), 1)


def _alive(beat: Mapping[str, Any]) -> str:
    """Return "running", "killed" or "silent" by whether the process of a heartbeat is still there. On this machine its
    id says so; elsewhere only its beats do."""
    if beat["host"] == socket.gethostname():
        try:
            # A process that is younger than the heartbeat only has the same id.
            if psutil.Process(beat["pid"]).create_time() > beat["time"] + 1:
                return "killed"
        except psutil.NoSuchProcess:
            return "killed"
        return "running"
    return "running" if time.time() - beat["time"] < _SILENT_SECONDS else "silent"


def _heartbeat(directory: Path) -> dict[str, Any] | None:
    try:
        beat = read_json(directory / HEARTBEAT)
        return beat if all(name in beat for name in ("time", "host", "pid", "step", "phase")) else None
    except (OSError, ValueError, TypeError):
        return None


def _config(directory: Path) -> dict[str, Any] | None:
    """Read the configuration without validating it: an older version may have written it."""
    try:
        return parse_toml(read_text(directory / CONFIG))
    except (OSError, ValueError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
