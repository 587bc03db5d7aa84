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

GRACE_SECONDS = 5.0


def main(command: list[str]) -> int:
    """Returns the command's exit code. Ended by the closing of stdin or by SIGTERM it does not return."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: _end(process))

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        _end(process)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    code = process.wait()
    if _leads_its_group():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)  # what a command that crashed left behind
    return code


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command, what it started, and this process."""
    process.terminate()
    give_up = time.monotonic() + GRACE_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    if _leads_its_group():
        os.killpg(0, signal.SIGKILL)  # what the command left behind, and this
    process.kill()
    os._exit(1)


def _leads_its_group() -> bool:
    return os.getpgid(0) == os.getpid()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
