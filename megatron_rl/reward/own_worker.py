"""Runs a reward function of the user's own in a worker: everything here but `Setup` happens in that process.

The function is code that the user wrote and trusts; what it may do to the run by mistake is limited. A keeper, a
process beside the worker, ends it when it and what it has started take too much memory, ends what is left when the
worker has gone, and keeps the file of its output short.
"""

import asyncio
import contextlib
import inspect
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.lifeline import end_with_owner
from megatron_rl.own_functions import last_lines, load_function, parameters_of
from megatron_rl.reward.score import OF_GROUP, OF_RESPONSE, verdict_of
from megatron_rl.reward.verdict import Reason, Verdict, make_verdict

# The signal by which the keeper ends a worker that takes too much memory. Nothing else sends it.
OVER_MEMORY = signal.SIGUSR2
_BEGUN, _ENDED = b"+", b"-"
OUTPUT_BYTES = 16 * 1024**2
_LOOK_SECONDS = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")
# A worker has one core; libraries would start a thread for each core of the machine.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


# A verdict as it goes from a worker to the run: a record takes ten times as long to send.
Packed = tuple[float, Reason, float, str, dict[str, float] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Says what a worker needs. name: of the function. where: the key that names it. output: the file that takes what
    it prints. starts: the file in which workers note that they begin and end to load it, as long as it is there."""

    name: str
    where: str
    passing_score: float
    memory_bytes: int
    output: Path
    starts: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Describes a function. parameters: what it is called with. takes_group: all responses of a prompt at once."""

    parameters: tuple[str, ...]
    takes_group: bool
    is_async: bool


@dataclass(slots=True)
class _Loaded:
    setup: Setup
    function: Callable[..., Any] | None = None
    signature: Signature | None = None
    problem: str = ""
    loop: asyncio.AbstractEventLoop | None = None
    pid: int = 0


_loaded: _Loaded | None = None


def start_worker(setup: Setup) -> None:
    """Prepare this new worker and load the function. What is wrong with it `described` tells."""
    global _loaded
    # The default action ends a worker also inside a long C call; pebble's Python handler would not run there.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(OVER_MEMORY, signal.SIG_DFL)
    end_with_owner()
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    os.setpgid(0, 0)  # what the function starts is in this group, and ends with it
    _redirect(setup.output)
    _start_keeper(setup)
    _loaded = _Loaded(setup, pid=os.getpid())
    _note(setup.starts, _BEGUN)
    try:
        _loaded.function = load_function(setup.name, setup.where)
        _loaded.signature = _signature(_loaded.function, setup.where)
    except ValueError as error:
        _loaded.problem = str(error)
    _note(setup.starts, _ENDED)


def _note(path: Path, mark: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(file, mark)
        os.close(file)


def num_unfinished(starts: Path) -> int:
    """Count the workers that have begun to load the function and not come to an end."""
    marks = starts.read_bytes()
    return marks.count(_BEGUN) - marks.count(_ENDED)


def described() -> Signature | str:
    """Say how the function is called, or what is wrong with it."""
    assert _loaded is not None
    return _loaded.signature or _loaded.problem


def _signature(function: Callable[..., Any], where: str) -> Signature:
    takes_group = False
    with contextlib.suppress(TypeError, ValueError):  # told by parameters_of
        takes_group = "responses" in inspect.signature(function).parameters
    wanted = parameters_of(function, OF_GROUP if takes_group else OF_RESPONSE, where)
    call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return Signature(parameters=wanted, takes_group=takes_group, is_async=inspect.iscoroutinefunction(call))


@dataclass(frozen=True, slots=True)
class Asked:
    """Holds calls of a function of one response. shared: arguments that are the same for all. columns: the others, with
    a value for each of `count` responses."""

    shared: Mapping[str, Any]
    columns: Mapping[str, Sequence[Any]]
    count: int

    def alone(self, index: int) -> "Asked":
        """Return the one call for a response."""
        return Asked(self.shared, {name: column[index : index + 1] for name, column in self.columns.items()}, 1)

    def calls(self) -> list[dict[str, Any]]:
        """Return the arguments of each call."""
        calls = [dict(self.shared) for _ in range(self.count)]
        for name, column in self.columns.items():
            for call, value in zip(calls, column, strict=True):
                call[name] = value
        return calls


def judge_bunch(bunch: Sequence[Asked], seconds: float) -> list[list[Packed]]:
    """Judge the calls of several prompts."""
    return [judge_each(asked, seconds) for asked in bunch]


def judge_each(asked: Asked, seconds: float) -> list[Packed]:
    """Call a function of one response for each. seconds: for each one, as far as an async function lets others run."""
    assert _loaded is not None and _loaded.signature is not None
    calls = asked.calls()
    if _loaded.signature.is_async:
        return [_packed(verdict) for verdict in _run(_all_of(calls, seconds))]
    return [_judged(arguments) for arguments in calls]


def judge_group(arguments: Mapping[str, Any], count: int) -> list[Packed]:
    """Call a function of all `count` responses to a prompt."""
    started = time.perf_counter()
    try:
        returned = _finished(_called(arguments))
    except BaseException as error:
        return [_packed(_failed(error))] * count
    each = (time.perf_counter() - started) / count
    try:
        scores = None if isinstance(returned, str | Mapping) else list(returned)
    except Exception:
        scores = None
    if scores is None:
        told = f"it returned {returned!r:.80}, and must return a list with a score for each of the responses"
        return [_packed(make_verdict("error", details=told))] * count
    if len(scores) != count:
        told = f"it returned {len(scores)} scores for {count} responses, and must return one for each"
        return [_packed(make_verdict("error", details=told))] * count
    return [_packed(_verdict(score, each)) for score in scores]


def _packed(verdict: Verdict) -> Packed:
    return verdict.score, verdict.reason, verdict.seconds, verdict.details, dict(verdict.parts) or None


def unpacked(packed: Packed) -> Verdict:
    """Return the verdict that a worker has sent."""
    score, reason, seconds, details, parts = packed
    if parts is None:
        return Verdict(score=score, reason=reason, seconds=seconds, details=details)
    return Verdict(score=score, reason=reason, seconds=seconds, details=details, parts=parts)


def _judged(arguments: Mapping[str, Any]) -> Packed:
    assert _loaded is not None
    started = time.perf_counter()
    try:
        returned = _called(arguments)
        if type(returned) is float and returned - returned == 0.0:  # finite, and what most of them return
            is_correct = returned >= _loaded.setup.passing_score
            return returned, "correct" if is_correct else "wrong", time.perf_counter() - started, "", None
        returned = _finished(returned)
    except BaseException as error:
        return _packed(_failed(error))
    return _packed(_verdict(returned, time.perf_counter() - started))


async def _all_of(calls: Sequence[Mapping[str, Any]], seconds: float) -> list[Verdict]:
    return list(await asyncio.gather(*(_judged_async(arguments, seconds) for arguments in calls)))


async def _judged_async(arguments: Mapping[str, Any], seconds: float) -> Verdict:
    started = time.perf_counter()
    try:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                returned = await _called(arguments)
        except TimeoutError:
            if not limit.expired():
                raise
            return make_verdict("timeout", seconds, f"not done after {seconds:g} s")
    except BaseException as error:
        return _failed(error)
    return _verdict(returned, time.perf_counter() - started)


def _called(arguments: Mapping[str, Any]) -> Any:
    assert _loaded is not None and _loaded.function is not None
    try:
        return _loaded.function(**arguments)
    finally:
        if os.getpid() != _loaded.pid:  # it forked and came back twice
            os._exit(0)


def _finished(returned: Any) -> Any:
    """Return the result of a call; a coroutine, of an async function or handed on by another, is run to its end."""
    return _run(returned) if inspect.iscoroutine(returned) else returned


def _run(work: Any) -> Any:
    assert _loaded is not None
    if _loaded.loop is None:
        _loaded.loop = asyncio.new_event_loop()
    return _loaded.loop.run_until_complete(work)


def _verdict(returned: object, seconds: float) -> Verdict:
    assert _loaded is not None
    try:
        return verdict_of(returned, _loaded.setup.passing_score, seconds)
    except Exception as error:
        return make_verdict("error", details=str(error))


def _failed(error: BaseException) -> Verdict:
    """Return an "error" with its last lines; all of it goes to the output."""
    traceback.print_exception(error)
    return make_verdict("error", details=last_lines(error, (__file__,)))


def _redirect(output: Path) -> None:
    """Redirect the standard streams: whatever is printed is appended to the file, and nothing can be read."""
    output.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, file), (2, file)):
        os.dup2(source, target)
    os.close(file)
    os.close(nothing)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def _start_keeper(setup: Setup) -> None:
    """Start the keeper as nobody's child, so that the function never waits for it."""
    worker = os.getpid()
    gone = os.pidfd_open(worker)
    child = os.fork()
    if child == 0:
        try:
            if os.fork() == 0:
                os.setsid()
                _keep(worker, gone, setup)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(gone)


def _keep(worker: int, gone: int, setup: Setup) -> None:
    # Its copies of the pool's pipes must not outlive the worker's.
    os.dup2(gone, 3)
    os.closerange(4, 65536)
    while not select.select([3], [], [], _LOOK_SECONDS)[0]:
        if _resident(worker) > setup.memory_bytes:
            os.kill(worker, OVER_MEMORY)
            break
        if os.fstat(1).st_size > OUTPUT_BYTES:
            os.ftruncate(1, 0)
            os.write(1, b"(what was here before is gone: there were more than 16 MiB)\n")
    select.select([3], [], [], 1.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)


def _resident(process: int) -> int:
    """Count the bytes that a process and those that it has started have in memory."""
    total, left = 0, [process]
    while left:
        one = left.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
            for thread in os.listdir(f"/proc/{one}/task"):
                children = Path(f"/proc/{one}/task/{thread}/children").read_text(encoding="ascii")
                left += map(int, children.split())
        except OSError:  # it has ended
            continue
    return total
