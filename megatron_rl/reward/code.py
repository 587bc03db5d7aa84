"""Reward by running the last fenced block of a response against its tests, in a sandbox or on a SandboxFusion server.

`answer` is JSON, one object with "type":

    asserts       {"asserts": [source, ...], "setup": source}
    humaneval     {"test": source that defines check(candidate), "entry_point": name}
    function_io   {"fn_name": name, "inputs": [arguments, ...], "outputs": [result, ...]}
    stdin_stdout  {"cases": [{"input": text, "output": text}, ...]}

asserts and humaneval may have "prefix": source that the prompt gave (imports, helpers, the function's head); it is put
in front of the program. Score 1 only if every test passes. `code_harness.py` says how tests are kept from the program.
"""

import functools
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_rl.reward.sandbox import Limits, Runner, RunRecord, Sandbox, SandboxFailure
from megatron_rl.reward.verdict import Reason, Verdict, make_verdict

HARNESS = Path(__file__).with_name("code_harness.py")
TEST_TYPES = ("asserts", "humaneval", "function_io", "stdin_stdout")
DETAIL_CHARACTERS = 400
_CPP_TAGS = ("cpp", "c++", "cc", "cxx")
_FENCE = re.compile(r"^ {0,3}(`{3,})([^`\n]*)$", re.MULTILINE)


_NO_BLOCK = "no closed fenced block"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeSettings:
    """Where and how programs run.

    seconds: of one item, all of its tests together. cpu_seconds: of the program; on stdin, of each test.
    cpp_compiler: the command in front of `-o program program.cpp`, for blocks that are marked as C++ and tests on
        stdin; empty: such blocks are run as Python, and fail.
    endpoint: URL of a SandboxFusion server; empty: this machine.
    """

    seconds: float = 10.0
    cpu_seconds: int = 6
    memory_bytes: int = 1024**3
    processes: int = 32
    python: str | None = None
    cpp_compiler: tuple[str, ...] = ()
    endpoint: str = ""

    def limits(self) -> Limits:
        return Limits(
            wall_seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            memory_bytes=self.memory_bytes,
            processes=self.processes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block; tag is what stands behind the opening fence, in lower case."""

    tag: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """details: which test failed and how, or why nothing was judged; empty for "correct". num_tests: 0 if unknown."""

    reason: Reason
    details: str
    num_passed: int
    num_tests: int
    seconds: float

    def verdict(self) -> Verdict:
        return make_verdict(self.reason, self.seconds, self.details)


def last_block(text: str) -> Block | None:
    """The last fenced block, or None without one or when it is never closed: a response that was cut off.

    A block ends at a line with at least as many backticks and nothing else, as in CommonMark. Linear in the text.
    """
    opening, last = None, None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening, last = fence, None
        elif len(fence[1]) >= len(opening[1]) and not fence[2].strip():
            last = Block(tag=opening[2].strip().lower(), source=text[opening.end() + 1 : fence.start()])
            opening = None
    return last


def settle_code(response_text: str, answer: str) -> Verdict | str:
    """For the pool: "no_answer" at once, otherwise what `judge_code` needs, the block's tag and source."""
    block = last_block(response_text)
    return make_verdict("no_answer", details=_NO_BLOCK) if block is None else f"{block.tag}\n{block.source}"


def judge_code(tagged_source: str, answer: str, settings: CodeSettings | None = None) -> Verdict:
    """For the pool's workers. A worker that is killed takes its sandbox with it."""
    tag, _, source = tagged_source.partition("\n")
    return judge_block(Block(tag=tag, source=source), answer, settings or CodeSettings()).verdict()


def score_code(response_text: str, answer: str, settings: CodeSettings | None = None) -> Verdict:
    """Judge one response; see `judge_response`."""
    return judge_response(response_text, answer, settings).verdict()


def judge_response(response_text: str, answer: str, settings: CodeSettings | None = None) -> Judgement:
    """Run the last block of the response against the tests in `answer`.

    Blocks for up to settings.seconds, a little more where the sandbox has to be made. "error" is for tests that cannot
    be read and for failures of the sandbox or the endpoint. Raises SandboxUnavailable where nothing can be run.
    """
    block = last_block(response_text)
    if block is None:
        return _without_run("no_answer", _NO_BLOCK)
    return judge_block(block, answer, settings or CodeSettings())


def judge_block(block: Block, answer: str, settings: CodeSettings) -> Judgement:
    try:
        job = _job(block, json.loads(answer), settings)
        limits = _limits(job, settings)
    except (KeyError, TypeError, ValueError) as error:
        return _without_run("error", f"the tests cannot be read: {type(error).__name__}: {error}"[:DETAIL_CHARACTERS])
    job["output_bytes"] = limits.output_bytes
    started = time.monotonic()
    try:
        record = runner(settings).run_python(_harness(), ascii(job).encode(), limits)
    except SandboxFailure as failure:
        return _without_run("error", str(failure)[:DETAIL_CHARACTERS])
    seconds = time.monotonic() - started
    try:
        return _read(record, seconds, settings)
    except ValueError as error:
        return _without_run("error", f"the tester's report cannot be read: {error}"[:DETAIL_CHARACTERS])


def warm_up(settings: CodeSettings | None = None) -> None:
    """Prove the sandbox; raises SandboxUnavailable. Run it once at the start, in each worker."""
    runner(settings or CodeSettings())


@functools.cache
def runner(settings: CodeSettings) -> Runner:
    """One per process and settings."""
    if settings.endpoint:
        from megatron_rl.reward.sandbox_http import SandboxFusion

        return SandboxFusion(settings.endpoint)
    return Sandbox(settings.python)


@functools.cache
def _harness() -> str:
    return HARNESS.read_text()


def _job(block: Block, tests: Mapping[str, Any], settings: CodeSettings) -> dict[str, Any]:
    """What the harness reads; KeyError, TypeError or ValueError for tests that are not as they must be."""
    kind = tests["type"]
    if kind not in TEST_TYPES:
        raise ValueError(f"type must be one of {', '.join(TEST_TYPES)}, got {kind!r}")
    prefix = str(tests.get("prefix", ""))
    source = _program(block.source, prefix, str(tests.get("entry_point", "")))
    job: dict[str, Any] = {"kind": kind, "source": source, "prefix": prefix, "compiler": [], "suffix": ""}
    if kind == "asserts":
        job |= {"setup": str(tests.get("setup", "")), "asserts": [str(text) for text in tests["asserts"]]}
        num_tests = len(job["asserts"])
    elif kind == "humaneval":
        job |= {"test": str(tests["test"]), "entry_point": str(tests["entry_point"])}
        num_tests = 1
    elif kind == "function_io":
        job |= {"fn_name": str(tests["fn_name"]), "cases": list(zip(tests["inputs"], tests["outputs"], strict=True))}
        num_tests = len(job["cases"])
    else:
        job["cases"] = [(str(case["input"]), str(case["output"])) for case in tests["cases"]]
        num_tests = len(job["cases"])
        if settings.cpp_compiler and block.tag in _CPP_TAGS:
            job |= {"suffix": ".cpp", "compiler": [*settings.cpp_compiler, "-o", "program", "program.cpp"]}
    if num_tests == 0:
        raise ValueError("there is no test in it")
    return job


def _limits(job: Mapping[str, Any], settings: CodeSettings) -> Limits:
    """The settings' limits, with room for the task's own input and output."""
    limits = settings.limits()
    texts = [text for case in job.get("cases", ()) for text in case if isinstance(text, str)]
    largest = max((len(text.encode()) for text in texts), default=0)
    return replace(
        limits,
        output_bytes=max(limits.output_bytes, 2 * largest),
        file_bytes=max(limits.file_bytes, 2 * largest),
        disk_bytes=max(limits.disk_bytes, 8 * largest),
    )


def _program(source: str, prefix: str, entry_point: str) -> str:
    if not prefix:
        return source
    if entry_point and not re.search(rf"^\s*(async\s+)?def\s+{re.escape(entry_point)}\b", source, re.MULTILINE):
        return prefix + source  # the body only, which goes on where the prompt ends
    return f"{prefix}\n{source}"


def _read(record: RunRecord, seconds: float, settings: CodeSettings) -> Judgement:
    """The verdict from the tester's lines: pass N, fail N kind detail, load kind detail, end N."""
    reason: Reason | None = None
    details = ""
    passed, total = 0, 0
    for line in record.stdout.decode("ascii", "replace").splitlines():
        word, _, rest = line.encode().decode("unicode_escape").partition(" ")
        if word == "pass":
            passed += 1
        elif word == "end":
            reason, total = "correct", int(rest)
        elif word == "fail":
            number, kind, text = (*rest.split(" ", 2), "")[:3]
            reason, details = _reason(kind), f"test {int(number) + 1}: {text}"
        elif word == "load":
            kind, text = (*rest.split(" ", 1), "")[:2]
            reason, details = _reason(kind), text
    if reason is None:
        # Cut short from outside, or the tester died: a limit is the program's doing.
        where = f"in test {passed + 1}"
        if record.limit in ("wall", "cpu"):
            limit = (
                f"{settings.seconds:g} s for the item" if record.limit == "wall" else f"{settings.cpu_seconds} s of CPU"
            )
            reason, details = "too_slow", f"{where}: over {limit}"
        elif record.limit is not None:
            reason, details = "wrong", f"{where}: over the limit of {record.limit}"
        else:
            said = record.stderr.decode(errors="replace").strip()[-200:]
            ended = f"signal {record.signal}" if record.signal else f"exit code {record.exit_code}"
            # The program may kill its tester, which is of the same user; that must not look like our failure.
            reason, details = ("wrong" if record.signal else "error"), f"{where}: the tester ended with {ended}: {said}"
    return Judgement(
        reason=reason, details=details[:DETAIL_CHARACTERS], num_passed=passed, num_tests=total, seconds=seconds
    )


def _reason(kind: str) -> Literal["too_slow", "error", "wrong"]:
    return "too_slow" if kind == "timeout" else "error" if kind == "error" else "wrong"


def _without_run(reason: Reason, details: str) -> Judgement:
    return Judgement(reason=reason, details=details, num_passed=0, num_tests=0, seconds=0.0)
