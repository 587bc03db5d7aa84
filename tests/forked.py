"""Run programs of this project as forks of one process that has imported what they import.

Importing torch, megatron-core and transformers takes some eight seconds of processor, more than the work of most tests.
How a program starts by itself (launchers, signals at any time, the environment that it is born with) is seen by
test_launch.py and the other targets of the Makefile.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

_PRELOADED = [
    "torch._dynamo",  # which torch.optim imports at its first step
    "megatron_rl.train.driver",
    "megatron_rl.train.sft.run",
    "transformers",
    "psutil",
    "httpx",
]
# Not multiprocessing's own, which workers of rewards may have started already with what they import.
_server = forkserver.ForkServer()
# torch, megatron_rl and transformers read these variables at import, so they must be set before the fork server
# imports. The last has the value that megatron-rl sets before it imports transformers.
_AT_IMPORT = {
    "OMP_NUM_THREADS": "1",
    "MEGATRON_RL_DEVICE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TRANSFORMERS_VERBOSITY": "error",
}


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that calls a function with these arguments, in a fork of the one with the imports."""
    _server.set_forkserver_preload(_PRELOADED)
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "connect_to_new_process", _server.connect_to_new_process)
        for name, value in _AT_IMPORT.items():
            patch.setenv(name, value)
        process.start()
    return process


def run(
    command: Sequence[object], *, env: Mapping[str, str] | None = None, timeout: float = 800.0
) -> "subprocess.CompletedProcess[str]":
    """Run `[python, FILE or -m MODULE or -c CODE, ...]` as `subprocess.run(capture_output=True, text=True)` would."""
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(program, words[1:], dict(os.environ if env is None else env), out, err, Path.cwd())
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(words, timeout, _text(out), _text(err))
        finally:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(words, process.exitcode, _text(out), _text(err))


class Program:
    """Runs a program in a fork, with the methods of `subprocess.Popen`. Its output is appended to the log."""

    def __init__(self, command: Sequence[object], log: Path, env: Mapping[str, str]) -> None:
        self._process = start(program, [str(word) for word in command][1:], dict(env), log, log, Path.cwd())
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.kill = self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("program", timeout or 0.0)
        return self._process.exitcode


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def program(words: list[str], environment: Mapping[str, str], out: Path, err: Path, folder: Path) -> None:
    """Become the program that python would run with these words in this folder. Its stdout and stderr go to files."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, out), (2, err)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
