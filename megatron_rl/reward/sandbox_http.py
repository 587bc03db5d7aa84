"""Speaks to a SandboxFusion-compatible server: programs run there and not on this machine.

One call: POST /run_code {code, language, stdin, run_timeout, memory_limit_MB, ...} -> {status, message, run_result:
{status, return_code, stdout, stderr, execution_time}} (bytedance/SandboxFusion, sandbox/server/sandbox_api.py). How
well programs are held, and whether processes and output are limited, is that server's affair. So is the wall between a
program and tests that are programs: both run in one container there (code_tester.main_of_both).
"""

import time
from collections.abc import Generator, Iterable
from typing import Any

import httpx

from megatron_rl.parsing import parse_json
from megatron_rl.proxies import proxy_for, told_of_proxy
from megatron_rl.reward.code_runners import (
    MAX_JOB_BYTES,
    PROGRAM_MODULES,
    TESTER_MODULES,
    ProgramEnded,
    TestsRun,
    sources,
)
from megatron_rl.reward.plain_data import pack
from megatron_rl.reward.sandbox import SandboxUnavailable
from megatron_rl.reward.sandbox_run import Limits, RunRecord, SandboxFailure

_ANSWER_SECONDS = 20.0


class SandboxFusion:
    """Runs Python on a server; `url` without /run_code. Raises SandboxUnavailable if the server cannot be reached, and
    ValueError if the environment names a proxy for it that cannot be used."""

    def __init__(self, url: str) -> None:
        self._proxy = proxy_for(url, "reward.code.endpoint")
        self._client = httpx.Client(
            base_url=url.rstrip("/") + "/", timeout=_ANSWER_SECONDS, trust_env=False, proxy=self._proxy
        )
        self._url = url
        try:
            record = self.run_python("print(6*7)", b"", Limits())
        except SandboxFailure as failure:
            raise SandboxUnavailable(
                f"{failure}; start a SandboxFusion server there or set another endpoint"
            ) from failure
        if record.stdout.strip() != b"42":
            raise SandboxUnavailable(f"the code endpoint {url} does not run Python: {record.stderr[-200:]!r}")

    @property
    def description(self) -> str:
        return (
            f"the SandboxFusion server {self._url}: that server holds programs, and a program may reach tests that are "
            "programs (asserts, humaneval) unless the server's user is root"
        )

    def answers(self, requests: Iterable[bytes], limits: Limits, max_bytes: int) -> Generator[bytes]:
        """Send all requests at once; yield the answers after the last of them."""
        source = _script(PROGRAM_MODULES, "answer_all()")
        record = self.run_python(source, b"\n".join(requests) + b"\n", limits)
        yield from record.stdout.splitlines()
        raise ProgramEnded(record, "no answer")

    def run_tests(self, job: dict[str, Any], program_limits: Limits, tester_limits: Limits) -> TestsRun:
        script = _script(TESTER_MODULES, "main_of_both()")
        record = self.run_python(script, pack(job, max_bytes=MAX_JOB_BYTES), program_limits)
        return TestsRun(tester=record, program=None)

    def run_python(self, source: str, stdin: bytes, limits: Limits) -> RunRecord:
        body = {
            "code": source,
            "language": "python",
            "stdin": stdin.decode(),
            "compile_timeout": limits.wall_seconds,
            "run_timeout": limits.wall_seconds,
            "memory_limit_MB": limits.memory_bytes // 1024**2,
        }
        started = time.monotonic()
        try:
            response = self._client.post("run_code", json=body, timeout=limits.wall_seconds + _ANSWER_SECONDS)
            response.raise_for_status()
            return _record(parse_json(response.content), time.monotonic() - started)
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise SandboxFailure(
                f"the code endpoint {self._url} failed{told_of_proxy(self._proxy)}: {type(error).__name__}: {error}"
            ) from error


def _script(modules: Iterable[str], call: str) -> str:
    """Return a program that has these modules and calls a function of the last."""
    return (
        "import sys\n"
        f"for name, text in {sources(modules)!r}:\n"
        "    module = sys.modules[name] = type(sys)(name)\n"
        "    exec(compile(text, name, 'exec'), module.__dict__)\n"
        f"module.{call}\n"
    )


def _record(answer: dict[str, Any], seconds: float) -> RunRecord:
    if answer["status"] == "SandboxError":
        raise ValueError(f"SandboxError: {answer.get('message')}")
    run = answer["run_result"]
    code = run["return_code"]
    late = run["status"] == "TimeLimitExceeded"
    return RunRecord(
        exit_code=code if code is not None and code >= 0 else None,
        signal=-code if code is not None and code < 0 else None,
        stdout=(run["stdout"] or "").encode(),
        stderr=(run["stderr"] or "").encode(),
        limit="wall" if late else None,
        seconds=run["execution_time"] if run["execution_time"] is not None else seconds,
    )
