"""This module runs the stages of an example one after the other, each a command of its own that ends when the example
does."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

_started = time.time()


def seconds() -> float:
    """Return the seconds since the example started."""
    return time.time() - _started


def run_python(title: str, *command: object) -> None:
    """Run `python *command`; CalledProcessError when it fails, after it has said what is wrong."""
    print(f"[{seconds():5.0f} s] {title}", flush=True)
    environment = os.environ | {"MEGATRON_RL_PARENT": str(os.getpid())}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait()  # the terminal gave the stage its Ctrl-C too: let it save and stop its server
    if code:
        raise subprocess.CalledProcessError(code, [str(part) for part in command])


def settings(values: Mapping[str, object]) -> list[str]:
    """Return `--set key=value` for a megatron-rl command."""
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def exit_code(run: Callable[[], int]) -> int:
    """Return the exit code of an example: that of the stage that failed, which has explained it."""
    try:
        return run()
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 1  # less: by a signal
    except KeyboardInterrupt:
        return 130
