"""This module runs a trial: parts that run one after the other within a time, each with its result, seconds or what
went wrong.

A part that fails does not keep the following ones from running. After each part the JSON is written anew, to
$OUT/QUESTION.json where OUT is set: a trial that is cut off leaves what it has.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The machine kills a command after ten minutes, with what it has not written yet.
SECONDS = 560.0
# The time that a process gets to end: bench_gpu.py then prints what it has.
GRACE_SECONDS = 15.0
# A dry trial and its parts get so many times the seconds: a busy CPU takes longer, and nobody pays for its time.
DRY_PATIENCE = 4


class PartFailed(Exception):
    """Says that a part's check did not hold. found: what it found nevertheless."""

    def __init__(self, reason: str, found: Any = None) -> None:
        super().__init__(reason)
        self.found = found


class Trial:
    """Runs the parts of one question. `is_dry`: on a CPU, with gloo, a tiny model and the embedded server."""

    def __init__(self, question: str, arguments: argparse.Namespace) -> None:
        self.is_dry: bool = arguments.dry
        self.commit: str = arguments.commit or _commit()
        self._patience = DRY_PATIENCE if self.is_dry else 1
        self._started, self._seconds = time.monotonic(), arguments.seconds * self._patience
        out = os.environ.get("OUT")
        self.folder = Path(out) if out else None
        self.found: dict[str, Any] = {
            "question": question,
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
            "commit": self.commit,
            "dry": self.is_dry,
            "python": platform.python_version(),
            "parts": {},
        }
        self._question = question
        self._only: set[str] = set(arguments.only)
        self._stopped = ""
        self.tell(f"{question}: at most {self._seconds:g} s{' (dry)' if self.is_dry else ''}")

    @property
    def seconds_left(self) -> float:
        return self._seconds - (time.monotonic() - self._started)

    @property
    def unknown_parts(self) -> list[str]:
        """The names that `--only` asked for and never came."""
        return sorted(self._only - self.found["parts"].keys())

    @property
    def has_failed(self) -> bool:
        return any("failed" in part or "left_out" in part for part in self.found["parts"].values())

    def tell(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def part(self, name: str, at_most: float, work: Callable[[float], Any], *, decides: bool = False) -> Any:
        """Run `work`, which gets the seconds that it may take: `at_most`, or what is left. Return its result, or None
        when it failed.

        decides: when it fails the others are left out, since they could show nothing.
        """
        if self._only and name not in {"machine", *self._only}:
            return None
        row: dict[str, Any] = {}
        self.found["parts"][name] = row
        # A part gets the time that is left. With too little it would only show that the time was over.
        at_most *= self._patience
        seconds = min(at_most, self.seconds_left - GRACE_SECONDS)
        if self._stopped or seconds < min(at_most, 30.0):
            row["left_out"] = self._stopped or f"{self.seconds_left:.0f} s were left"
            self.tell(f"{name}: left out ({row['left_out']})")
            self.write()
            return None
        self.tell(f"{name}: ...")
        started = time.monotonic()
        result = None
        try:
            result = row["found"] = work(seconds)
        except PartFailed as error:
            row |= {"failed": str(error), "found": error.found}
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[-2000:]
            traceback.print_exc()
        row["seconds"] = round(time.monotonic() - started, 1)
        if decides and "failed" in row:
            self._stopped = f"{name} failed"
        outcome = f"FAILED: {row['failed']}" if "failed" in row else json.dumps(result)[:300]
        self.tell(f"{name}: {row['seconds']} s, {outcome}")
        self.write()
        return result

    def write(self) -> None:
        if self.folder is not None:
            (self.folder / f"{self._question}.json").write_text(json.dumps(self.found, indent=1), encoding="utf-8")

    def log(self, name: str, said: str) -> None:
        """Keep a part's own output in $OUT/QUESTION.log: one file, since few files come back from the machine."""
        if self.folder is not None:
            with (self.folder / f"{self._question}.log").open("a", encoding="utf-8") as file:
                file.write(f"--- {name}\n{said}\n")


def run(
    trial: Trial, name: str, command: Sequence[object], seconds: float, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run a command in the checkout, and return its exit code and stdout. Log stdout, and pass on what it says on
    stderr.

    After `seconds` it is interrupted, and after GRACE_SECONDS killed with all that it started; PartFailed when it says
    nothing on stdout then.
    """
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    late = False
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
    trial.log(name, said)
    if late and not said.strip():
        raise PartFailed(f"not done after {seconds:.0f} s")
    return process.returncode, said


def run_json(
    trial: Trial, name: str, command: Sequence[object], seconds: float, environment: dict[str, str] | None = None
) -> Any:
    """Run a command, and return the JSON object that it prints last. PartFailed, with that object, when it ends with
    another code than 0."""
    code, said = run(trial, name, command, seconds, environment)
    start = said.find("\n{") + 1 if not said.startswith("{") else 0  # libraries may have written in front of it
    try:
        found = json.loads(said[start:])
    except json.JSONDecodeError:
        found = None
    if code or found is None:
        raise PartFailed(f"ended with code {code}", found)
    return found


def run_bench(trial: Trial, name: str, lengths: str, seconds: float, *options: object) -> Any:
    """Run tools/bench_gpu.py with sequences of these lengths, or its tiny shape in a dry trial. Return what it
    prints."""
    command: list[object] = [sys.executable, ROOT / "tools/bench_gpu.py", "--rounds", 3, "--commit", trial.commit]
    command += ["--smoke"] if trial.is_dry else ["--lengths", lengths]
    return run_json(trial, name, [*command, *options], seconds)


def run_tests(
    trial: Trial,
    name: str,
    files: Sequence[str],
    seconds: float,
    *,
    only: str = "",
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run those tests of `files` by pytest whose name fits `only`. Return the seconds of each, and how many passed.

    PartFailed when one fails, or none ran.
    """
    results = Path(f"/tmp/gpu_trial-{os.getpid()}-{name}.xml")
    command: list[object] = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    # `run` ends what takes too long, and earlier than pytest would call it a failure.
    command += ["--junitxml", results, "--timeout", int(seconds + 2 * GRACE_SECONDS), *(["-k", only] if only else [])]
    code, said = run(trial, name, command, seconds, environment)
    trial.tell(said[-3000:])
    if not results.exists():
        raise PartFailed(f"pytest ended with code {code}: {said.strip().splitlines()[-1:]}")
    cases = ElementTree.parse(results).getroot().iter("testcase")
    results.unlink()
    found: dict[str, Any] = {"passed": {}, "skipped": {}, "failed": {}}
    for case in cases:
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if (title := case.get("name")) is None:  # of a run that was interrupted
            continue
        if outcome is None:
            found["passed"][title] = round(float(case.get("time", 0)), 2)
        else:
            kind = "skipped" if outcome.tag == "skipped" else "failed"
            found[kind][title] = (outcome.get("message") or "")[:1000]
    if code or found["failed"] or not found["passed"]:
        counts = ", ".join(f"{len(rows)} {kind}" for kind, rows in found.items())
        raise PartFailed(f"pytest ended with code {code}: {counts}", found)
    return found


def trial_of(question: str, what: str) -> Trial:
    """Make the trial that the command line asks for, and look at the machine."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU: gloo, a tiny model, the embedded server")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="PART,...", help="these parts")
    parser.add_argument("--commit", help="where there is no git to ask")
    arguments = parser.parse_args()
    if arguments.dry:
        os.environ |= {"MEGATRON_RL_DEVICE": "cpu", "MEGATRON_RL_GPU_CHECK_ON_CPU": "1"}
    folders = [str(ROOT), *(str(ROOT / name) for name in ("tests", "tests/gpu", "tools"))]
    sys.path[:0] = folders
    # For every process that a part starts: the package need not be installed.
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    trial = Trial(question, arguments)
    trial.part("machine", 60, lambda _: machine(trial.is_dry), decides=True)
    return trial


def machine(is_dry: bool) -> dict[str, Any]:
    """Say what this runs on. PartFailed without a GPU, unless dry."""
    import torch

    from megatron_rl import device

    if not is_dry and not device.on_cuda():
        raise PartFailed("no CUDA device is visible here; --dry runs on a CPU")
    found = {"card": device.device_name(), "memory_gb": round(device.memory_bytes() / 1e9, 1)}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}
    if device.on_cuda():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def end(trial: Trial) -> int:
    """Print the whole result. Return 1 when a part failed or was left out, 2 when `--only` names one that does not
    exist."""
    trial.write()
    print(json.dumps(trial.found, indent=1))
    if unknown := trial.unknown_parts:
        trial.tell(f"--only: there is no part {', '.join(unknown)}")
        return 2
    return int(trial.has_failed)


def _commit() -> str:
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False, encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
