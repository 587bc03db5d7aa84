"""Client of a SandboxFusion-compatible server: programs run there and not on this machine.

One call: POST /run_code {code, language, stdin, run_timeout, memory_limit_MB, ...} -> {status, message, run_result:
{status, return_code, stdout, stderr, execution_time}} (bytedance/SandboxFusion, sandbox/server/sandbox_api.py). How
well programs are held, and whether processes and output are limited, is that server's affair.
"""

import time
from typing import Any

import httpx

from megatron_rl.reward.sandbox import Limits, RunRecord, SandboxFailure, SandboxUnavailable

_ANSWER_SECONDS = 20.0


class SandboxFusion:
    """Runs Python on a server; `url` without /run_code. Raises SandboxUnavailable if the server cannot be reached."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url.rstrip("/") + "/", timeout=_ANSWER_SECONDS)
        self._url = url
        try:
            record = self.run_python("print(6*7)", b"", Limits())
        except SandboxFailure as failure:
            raise SandboxUnavailable(
                f"{failure}; start a SandboxFusion server there or set another endpoint"
            ) from failure
        if record.stdout.strip() != b"42":
            raise SandboxUnavailable(f"the code endpoint {url} does not run Python: {record.stderr[-200:]!r}")

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
            return _record(response.json(), time.monotonic() - started)
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise SandboxFailure(f"the code endpoint {self._url} failed: {type(error).__name__}: {error}") from error


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
