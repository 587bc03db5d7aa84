"""`python -m megatron_rl.rollout.supervise COMMAND...`: runs a command that ends when this process's stdin does.

A server that knows nothing of us cannot watch the process that started it. This one can: stdin is the other end of a
pipe that the starter holds open, and it closes however the starter ends. Meant to be the leader of a process group of
its own; then the whole group is ended, first kindly.
"""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil

GRACE_SECONDS = 5.0
_LOOK_EVERY_SECONDS = 0.1


def main(command: list[str]) -> int:
    """Returns the command's exit code, or 1 when it was ended. Nothing of its process group outlives it."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    reasons: list[str] = []  # not an Event: a signal handler must not wait for its lock
    signal.signal(signal.SIGTERM, lambda *_: reasons.append("SIGTERM"))

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        reasons.append("stdin closed")

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    while process.poll() is None and not reasons:
        time.sleep(_LOOK_EVERY_SECONDS)
    if process.poll() is None:
        process.terminate()
        give_up = time.monotonic() + GRACE_SECONDS
        while process.poll() is None and time.monotonic() < give_up:
            time.sleep(_LOOK_EVERY_SECONDS)
    if os.getpgid(0) == os.getpid():
        _kill_the_rest()
    return 1 if reasons or process.returncode is None else process.returncode


def _kill_the_rest() -> None:
    """Of the process group that this process leads."""
    for pid in psutil.pids():
        try:
            if pid != os.getpid() and os.getpgid(pid) == os.getpid():
                os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
