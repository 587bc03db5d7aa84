"""Runs the judge's two helpers: the one beside the program (code_program.py), and the one of tests that are
programs (code_tester.py). On this machine each has a sandbox of its own."""

import fcntl
import os
import socket
import weakref
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_rl.reward.code_tester import GONE
from megatron_rl.reward.plain_data import pack
from megatron_rl.reward.sandbox import Sandbox, SandboxUnavailable
from megatron_rl.reward.sandbox_run import Ended, Limits, Program, Running, RunRecord

_HERE = Path(__file__).parent
PROGRAM_MODULES = ("plain_data", "code_program")
TESTER_MODULES = ("plain_data", "code_program", "code_remote", "code_pytest", "code_tester")
MAX_JOB_BYTES = 1 << 30


class ProgramEnded(Exception):
    """Says that the program's process ended, or its time was over, before it answered."""

    def __init__(self, record: RunRecord, reason: str) -> None:
        super().__init__(reason)
        self.record = record


@dataclass(frozen=True, slots=True, kw_only=True)
class TestsRun:
    """Holds how a run of tests went. tester: what became of the tests; its stdout is the report. program: of the
    program's process, where that is known."""

    tester: RunRecord
    program: RunRecord | None


class Runner(Protocol):
    """Runs programs somewhere: in this machine's sandbox or on an endpoint."""

    @property
    def description(self) -> str:
        """Say where programs run and what holds them there, for the log."""
        ...

    def answers(self, requests: Iterable[bytes], limits: Limits, max_bytes: int) -> Generator[bytes]:
        """Yield the answers of `code_program.py` to requests, one by one; closing it ends the program. Raises
        ProgramEnded.

        max_bytes: of one request and of one answer."""
        ...

    def run_tests(self, job: dict[str, Any], program_limits: Limits, tester_limits: Limits) -> TestsRun:
        """Return the report of `code_tester.py` about a job."""
        ...


class InSandbox:
    """Runs programs on this machine. The program's sandbox and the tests' share a socket, and neither sees the other's
    processes."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._compiled = self._compile()

    @property
    def description(self) -> str:
        return self._sandbox.description

    def answers(self, requests: Iterable[bytes], limits: Limits, max_bytes: int) -> Generator[bytes]:
        requests = tuple(requests)
        program = self._helper("code_program", f"main({max_bytes})")
        program = replace(program, talks=True, numpy=any(map(_mentions_numpy, requests)))
        with self._sandbox.start(program, limits) as run:
            for request in requests:
                try:
                    yield run.ask(request, max_bytes)
                except Ended as ended:
                    raise ProgramEnded(run.finish(), str(ended)) from None

    def run_tests(self, job: dict[str, Any], program_limits: Limits, tester_limits: Limits) -> TestsRun:
        for_program, for_tester = socket.socketpair()
        with for_program, for_tester:
            packed = pack(job, max_bytes=MAX_JOB_BYTES)
            numpy = _mentions_numpy(packed)
            program = self._helper("code_program", f"main({MAX_JOB_BYTES})")
            program = replace(program, channel=for_program, numpy=numpy)
            channel = for_tester.fileno()
            tester = self._helper("code_tester", f"main(module.Lines({channel}, {channel}))")
            tester = replace(
                tester,
                stdin=packed,
                private_stdout=True,
                numpy=numpy,
                descriptors=(*tester.descriptors, channel),
            )
            with (
                self._sandbox.start(program, program_limits) as program_run,
                self._sandbox.start(tester, tester_limits) as tester_run,
            ):
                for_tester.close()
                return _watch(tester_run, program_run)

    def _helper(self, module: str, call: str) -> Program:
        """Return a program that runs one of our modules, which the sandbox's interpreter has compiled before: compiling
        them takes longer than everything else that happens before the first test."""
        code = self._compiled[module]
        start = (
            "import sys, os, marshal\n"
            f"sys.path += {list(self._sandbox.packages)!r}\n"
            "os.environ['OPENBLAS_NUM_THREADS'] = '1'\n"  # numpy would start a thread for each core
            f"for name, code in marshal.loads(os.pread({code.descriptor}, {code.size}, 0)):\n"
            "    module = sys.modules[name] = type(sys)(name)\n"
            "    exec(code, module.__dict__)\n"
            f"os.close({code.descriptor})\n"
            f"module.{call}\n"
        )
        return Program(command=self._sandbox.python_command(start), descriptors=(code.descriptor,))

    def _compile(self) -> dict[str, "SealedFile"]:
        source = "import sys, marshal\n" + "".join(
            f"modules = [(name, compile(text, name, 'exec')) for name, text in {sources(names)!r}]\n"
            "print(marshal.dumps(modules).hex())\n"
            for names in (PROGRAM_MODULES, TESTER_MODULES)
        )
        # As its input: a command line takes 128 KiB.
        record = self._sandbox.run_python(
            "import sys; exec(sys.stdin.read())", source.encode(), Limits(wall_seconds=60)
        )
        lines = record.stdout.decode().split()
        if record.exit_code != 0 or len(lines) != 2:
            said = record.stderr.decode(errors="replace").strip()[-300:]
            raise SandboxUnavailable(
                f"{self._sandbox.python} cannot compile the judge's helpers: {said}. Python 3.10 or newer is needed; "
                "name another with reward.code.python"
            )
        return {
            names[-1]: SealedFile(bytes.fromhex(line))
            for names, line in zip((PROGRAM_MODULES, TESTER_MODULES), lines, strict=True)
        }


def _mentions_numpy(text: bytes) -> bool:
    return b"numpy" in text or b"np." in text


def _watch(tester: Running, program: Running) -> TestsRun:
    record = tester.finish(beside=program)
    # The program's end is of interest only where it explains why the tester lost it.
    lost = record.stdout.rstrip().endswith(pack(["failed", "gone", GONE]))
    return TestsRun(tester=record, program=program.finish() if lost else None)


def sources(modules: Iterable[str]) -> list[tuple[str, str]]:
    """Return (full name, source) of modules of this package, in the order in which they import each other."""
    return [(f"megatron_rl.reward.{name}", (_HERE / f"{name}.py").read_text(encoding="utf-8")) for name in modules]


class SealedFile:
    """Holds a file in memory that nobody can change, so that every program may have it."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self.descriptor = os.memfd_create("helper", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.descriptor)
        os.write(self.descriptor, data)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
