"""Judges by running the program of a response against its tests, in a sandbox or on a SandboxFusion server.

`answer` is JSON that says what the tests are (code_tests.py); which block of the response is the program, and what
counts as the same output, stands in docs/code_rewards.md. Score 1 only if every test passes.

Whatever comes from the program's side is a value and never a verdict: expected outputs and results are compared here,
outside of any sandbox, and tests that are programs run in a sandbox that the program cannot reach (docs/sandbox.md).
"""

import contextlib
import functools
import math
import re
import time
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.reward.code_answer import Block, closed_blocks, solution_of
from megatron_rl.reward.code_compare import same_output, same_result, short
from megatron_rl.reward.code_runners import MAX_JOB_BYTES, InSandbox, ProgramEnded, Runner, TestsRun
from megatron_rl.reward.code_tests import SOLUTION, AnyTests, CallTests, SourceTests, StdinTests, read_tests
from megatron_rl.reward.plain_data import MAX_BYTES, NotPlain, pack, unpack
from megatron_rl.reward.sandbox import Sandbox
from megatron_rl.reward.sandbox_run import Limits, RunRecord, SandboxFailure
from megatron_rl.reward.verdict import Reason, Verdict, make_verdict, printable

_FUTURE = re.compile(r"^from __future__ import [^\n]*", re.MULTILINE)
_NO_BLOCK = "no closed fenced block"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeSettings:
    """Says where and how programs run.

    seconds: of one item, all of its tests together. cpu_seconds: of the program; on stdin, of each test.
    cpp_compiler: the command in front of `-o program program.cpp`, for blocks that are marked as C++ and tests on
        stdin; empty: such blocks are run as Python, and fail.
    endpoint: URL of a SandboxFusion server; empty: this machine.
    allow_without_seccomp: judge on a machine where the sandbox has no seccomp filter.
    """

    seconds: float = 10.0
    cpu_seconds: int = 6
    memory_bytes: int = 1024**3
    processes: int = 32
    python: str | None = None
    cpp_compiler: tuple[str, ...] = ()
    endpoint: str = ""
    allow_without_seccomp: bool = False

    def limits(self) -> Limits:
        return Limits(
            wall_seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            memory_bytes=self.memory_bytes,
            processes=self.processes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Holds the outcome for a program. details: which test failed and how, or why nothing was judged; empty for
    "correct". num_tests: 0 if unknown."""

    reason: Reason
    details: str
    num_passed: int
    num_tests: int
    seconds: float

    def verdict(self) -> Verdict:
        return make_verdict(self.reason, self.seconds, self.details)


def settle_code(response_text: str, answer: str) -> Verdict | str:
    """Give the pool "no_answer" at once, otherwise what `judge_code` needs, the response."""
    return response_text if closed_blocks(response_text) else make_verdict("no_answer", details=_NO_BLOCK)


def judge_code(response_text: str, answer: str, settings: CodeSettings | None = None) -> Verdict:
    """Judge one response; see `judge_response`. In the pool's workers, one that is killed takes its sandbox with it."""
    return judge_response(response_text, answer, settings).verdict()


def judge_response(response_text: str, answer: str, settings: CodeSettings | None = None) -> Judgement:
    """Run the program of the response against the tests in `answer`.

    Blocks for up to settings.seconds, a little more where the sandbox has to be made. "error" is for tests that cannot
    be read or check nothing, and for failures of the sandbox or the endpoint. Raises SandboxUnavailable where nothing
    can be run.
    """
    settings = settings or CodeSettings()
    blocks = closed_blocks(response_text)
    if not blocks:
        return _without_run("no_answer", _NO_BLOCK)
    try:
        tests = read_tests(answer)
        task = _task(solution_of(blocks, tests, bool(settings.cpp_compiler)), tests, settings)
    except ValueError as error:
        return _without_run("error", f"the tests cannot be used: {error}")
    return _judge(task, settings)


def _judge(task: "Tests | Calls", settings: CodeSettings) -> Judgement:
    started = time.monotonic()
    try:
        if isinstance(task, Calls):
            reason, details, passed = _judge_calls(task, settings)
        else:
            reason, details, passed = _judge_tests(task, settings)
    except SandboxFailure as failure:
        return _without_run("error", str(failure))
    return Judgement(
        reason=reason,
        details=printable(details),
        num_passed=passed,
        num_tests=passed if reason == "correct" else 0,
        seconds=time.monotonic() - started,
    )


def warm_up(settings: CodeSettings | None = None) -> None:
    """Prove the sandbox; raises SandboxUnavailable. Run it once at the start, in each worker."""
    runner(settings or CodeSettings())


@functools.cache
def runner(settings: CodeSettings) -> Runner:
    """Return the runner, one per process and settings."""
    if settings.endpoint:
        from megatron_rl.reward.sandbox_http import SandboxFusion

        return SandboxFusion(settings.endpoint)
    return InSandbox(Sandbox(settings.python, settings.allow_without_seccomp))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests:
    """Holds tests that are programs themselves. job: for code_tester.py. num_tests: None where only that counts
    them."""

    job: dict[str, Any]
    num_tests: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Holds tests that are inputs and expected results.

    start: requests before the first test, each answered by a complaint or nothing. requests: one for each test.
    printed: the results are what programs that read stdin print, of up to so many bytes; None: values.
    """

    start: tuple[bytes, ...]
    requests: tuple[bytes, ...]
    expected: tuple[Any, ...]
    printed: int | None = None
    limits: Limits


Outcome = tuple[Reason, str, int]  # details, tests passed


def _task(block: Block, tests: AnyTests, settings: CodeSettings) -> Tests | Calls:
    """Make the task of a judge. Raise ValueError for tests that cannot be sent to a sandbox."""
    if isinstance(tests, CallTests):
        return _function_calls(block.source, tests, settings)
    if isinstance(tests, StdinTests):
        return _stdin_calls(block, tests, settings)
    job = {
        "kind": tests.kind,
        "source": _program(block.source, tests),
        "prefix": tests.prefix,
        "setup": tests.setup,
        "tests": list(tests.tests),
        "entry_point": tests.entry_point,
    }
    counts = {"asserts": len(tests.tests), "humaneval": 1}
    return Tests(job=job, num_tests=counts.get(tests.kind))


def _request(operation: str, *arguments: Any) -> bytes:
    return pack([operation, list(arguments), {}], max_bytes=MAX_JOB_BYTES)


def _function_calls(source: str, tests: CallTests, settings: CodeSettings) -> Calls:
    return Calls(
        start=(_request("load", source), _request("defines", tests.name)),
        requests=tuple(_request("solve", tests.name, arguments) for arguments in tests.inputs),
        expected=tests.outputs,
        limits=settings.limits(),
    )


def _stdin_calls(block: Block, tests: StdinTests, settings: CodeSettings) -> Calls:
    largest = max(len(text.encode()) for case in tests.cases for text in case)
    limits = settings.limits()
    limits = replace(  # with room for the task's own input and output
        limits,
        output_bytes=max(limits.output_bytes, 2 * largest),
        file_bytes=max(limits.file_bytes, 2 * largest),
        disk_bytes=max(limits.disk_bytes, 8 * largest),
    )
    source: str | None = block.source
    start: tuple[bytes, ...] = ()
    if settings.cpp_compiler and block.is_cpp:
        command = [*settings.cpp_compiler, "-o", "program", "program.cpp"]
        source, start = None, (_request("compile", source, ".cpp", command),)
    return Calls(
        start=start,
        requests=tuple(_request("run", source, text, limits.output_bytes) for text, _ in tests.cases),
        expected=tuple(output for _, output in tests.cases),
        printed=limits.output_bytes,
        limits=limits,
    )


def _program(source: str, tests: SourceTests) -> str:
    """Return the program with what the prompt gave in front of it."""
    if not tests.prefix:
        return source
    head = re.compile(rf"^\s*(async\s+)?def\s+{re.escape(tests.entry_point.removeprefix(SOLUTION))}\b", re.MULTILINE)
    if tests.entry_point and head.search(tests.prefix) and not head.search(source):
        return tests.prefix + source  # the body only, which goes on where the prompt ends
    future = "".join(f"{line}\n" for line in _FUTURE.findall(source))  # Python wants these first
    return f"{future}{tests.prefix}\n{_FUTURE.sub('', source)}"


def _judge_calls(task: Calls, settings: CodeSettings) -> Outcome:
    deadline = time.monotonic() + settings.seconds
    # A character of what a program printed takes up to six in a line of plain data.
    requests = (*task.start, *task.requests)
    largest = max(map(len, requests))
    max_bytes = max(MAX_BYTES, 6 * (task.printed or 0) + 4096, largest + 1)
    passed = 0
    with contextlib.closing(runner(settings).answers(requests, task.limits, max_bytes)) as answers:
        try:
            for _ in task.start:
                complaint = _result(next(answers))
                if complaint not in (None, ""):
                    return "wrong", complaint if type(complaint) is str else "its answer cannot be read", 0
        except _Failed as failed:
            return "wrong", str(failed), 0
        except ProgramEnded as ended:
            return *_of_end(ended.record, settings, "at the start"), 0
        for expected in task.expected:
            try:
                _check(next(answers), expected, task)
            except _Failed as failed:
                return failed.reason, f"test {passed + 1}: {failed}", passed
            except ProgramEnded as ended:
                return *_of_end(ended.record, settings, f"in test {passed + 1}"), passed
            passed += 1
            if time.monotonic() > deadline and passed < len(task.expected):
                return "too_slow", f"in test {passed + 1}: over {settings.seconds:g} s for the item", passed
    return "correct", "", passed


class _Failed(Exception):
    """Says that a test fails; the message says how."""

    def __init__(self, message: str, reason: Reason = "wrong") -> None:
        super().__init__(message)
        self.reason: Reason = reason


def _check(line: bytes, expected: Any, task: Calls) -> None:
    """Raise _Failed unless the answer in the line is what is expected."""
    try:
        result = _result(line)
        if task.printed is not None:
            _check_output(result, expected, task.printed)
        elif not same_result(result, expected):
            raise _Failed(f"expected {short(expected)}, got {short(result)}")
    except _Failed:
        raise
    # The fault boundary: a result that raises when it is looked at is not what was expected.
    except Exception as error:
        raise _Failed(f"the result cannot be compared: {type(error).__name__}") from None


@dataclass(frozen=True, slots=True)
class _Object:
    """Stands for an object of the program's own class, which is no result. It equals nothing but itself."""

    name: str

    def __repr__(self) -> str:
        return f"an object of the program's class {self.name}"

    def __eq__(self, other: object) -> bool:
        return self is other


def _result(line: bytes) -> Any:
    """Return the value in an answer; raise _Failed if there is none."""
    try:
        answer = unpack(line, lambda described: _Object(str(described[2])[:50]), arrays=False)
    except NotPlain as error:
        raise _Failed(f"the program's answer cannot be read: {error}") from None
    if type(answer) is list and len(answer) == 3 and answer[0] == "value":
        return answer[1]
    if type(answer) is list and len(answer) == 7 and answer[0] == "raised":
        name, arguments = answer[4:6]
        if type(name) is str and type(arguments) is list:
            text = ", ".join(argument for argument in arguments if type(argument) is str)
            raise _Failed(f"{name}: {text}".rstrip(": ") if name != "NotPlain" else text)
    raise _Failed("the program's answer cannot be read")


def _check_output(result: Any, expected: str, most: int) -> None:
    if type(result) is not list or list(map(type, result)) != [int, str, str]:
        raise _Failed("the program's answer cannot be read")
    code, output, errors = result
    if code in (-24, -9):
        raise _Failed("CPU time", "too_slow")
    if len(output.encode("utf-8", "surrogatepass")) > most:
        raise _Failed(f"more than {most} bytes of output")
    if code != 0:
        raise _Failed(f"ended with {_how(code)}: {errors.strip()}")
    if not same_output(output, expected):
        raise _Failed(f"expected {expected[:100]!r}, got {output[:100]!r}")


def _judge_tests(task: Tests, settings: CodeSettings) -> Outcome:
    # The program does not pay for what the tests compute: only the clock limits them.
    limits = settings.limits()
    tester_limits = replace(limits, cpu_seconds=math.ceil(settings.seconds) + 1)
    return _read_report(runner(settings).run_tests(task.job, limits, tester_limits), task.num_tests, settings)


def _read_report(run: TestsRun, num_tests: int | None, settings: CodeSettings) -> Outcome:
    """Return the verdict from the tester's lines, or from its end where it did not come to one."""
    begun, loaded, passed = False, False, 0
    for line in run.tester.stdout.splitlines():
        try:
            word, *rest = unpack(line)
        except NotPlain:
            break  # cut off by the end
        begun, loaded = begun or word == "begin", loaded or word == "loaded"
        where = f"in test {passed + 1}" if loaded else "at the start"
        if word == "passed":
            passed += 1
        elif word == "end" and rest == [passed] and num_tests in (passed, None):
            return "correct", "", passed
        elif word == "failed" and rest[0] == "gone" and run.program is not None:
            return *_of_end(run.program, settings, where), passed
        elif word == "failed":
            return "wrong", f"test {passed + 1}: {rest[1]}" if loaded else str(rest[1]), passed
        elif word == "broken":
            return "error", str(rest[0]), passed
    if begun or run.tester.limit == "wall":
        return *_of_end(run.tester, settings, f"in test {passed + 1}"), passed
    limit = f", over the limit of {run.tester.limit}" if run.tester.limit else ""
    return "error", f"the tests ended before they began, with {_how_ended(run.tester)}{limit}", passed


def _of_end(record: RunRecord, settings: CodeSettings, where: str) -> tuple[Reason, str]:
    """Say what it means that a process ended where it should have answered: it is the program's doing."""
    if record.limit == "wall":
        return "too_slow", f"{where}: over {settings.seconds:g} s for the item"
    if record.limit == "cpu":
        return "too_slow", f"{where}: over {settings.cpu_seconds} s of CPU"
    if record.limit is not None:
        return "wrong", f"{where}: over the limit of {record.limit}"
    return "wrong", f"{where}: the program ended the process with {_how_ended(record)}"


def _how_ended(record: RunRecord) -> str:
    said = record.stderr.decode(errors="replace").strip()[-200:]
    code = -record.signal if record.signal else record.exit_code or 0
    return f"{_how(code)}: {said}".rstrip(": ")


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _without_run(reason: Reason, details: str) -> Judgement:
    return Judgement(reason=reason, details=printable(details), num_passed=0, num_tests=0, seconds=0.0)
