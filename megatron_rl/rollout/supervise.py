"""Runs SGLang, and ends it when stdin closes: `python -m megatron_rl.rollout.supervise COMMAND...`.

SGLang does not watch the process that started it, so this process does. Its stdin is a pipe that the starter holds
open, and it closes however the starter ends. This process should lead a process group of its own. Then it first asks
SGLang to end, and kills what is left of the group.

The first line of stdin is the key of the server, or empty. SGLang takes a key as an argument, which `ps` shows to
everybody, or from a file. Here the file is a named pipe for this user alone: the key is on no disk, and the pipe is
gone once it is read. SGLang logs its arguments, so its output passes through here, where the key is left out.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from megatron_rl.lifeline import watch_stdin

GRACE_SECONDS = 5.0
_LOOK_EVERY_SECONDS = 0.1


def main(command: list[str]) -> int:
    """Run the command. Return its exit code, or 1 when it was ended. Nothing of its process group outlives it."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # what follows the line is the lifeline's
        key = stdin.readline().strip()
    config = _config(key) if key else None
    if config is not None:
        command = [*command, "--config", str(config)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printing = threading.Thread(target=_print, args=(process, key), daemon=True)
    printing.start()
    reasons: list[str] = []  # not an Event: a signal handler must not wait for its lock
    signal.signal(signal.SIGTERM, lambda *_: reasons.append("SIGTERM"))
    watch_stdin(lambda: reasons.append("stdin closed"))
    while process.poll() is None and not reasons:
        time.sleep(_LOOK_EVERY_SECONDS)
    if process.poll() is None:
        process.terminate()
        give_up = time.monotonic() + GRACE_SECONDS
        while process.poll() is None and time.monotonic() < give_up:
            time.sleep(_LOOK_EVERY_SECONDS)
    if os.getpgid(0) == os.getpid():
        for pid in members_of(os.getpid()):
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
    printing.join(GRACE_SECONDS)
    if config is not None:
        shutil.rmtree(config.parent, ignore_errors=True)  # it ended before it read its key
    return 1 if reasons or process.returncode is None else process.returncode


def _config(key: bytes) -> Path:
    """Make a file of SGLang's options that can be read once, and is then gone."""
    path = Path(tempfile.mkdtemp(prefix="megatron_rl-key-")) / "config.yaml"
    os.mkfifo(path, 0o600)

    def give() -> None:
        path.write_bytes(b'api-key: "%s"\n' % key)  # once somebody reads
        shutil.rmtree(path.parent, ignore_errors=True)

    threading.Thread(target=give, name="key", daemon=True).start()
    return path


def _print(process: "subprocess.Popen[bytes]", key: bytes) -> None:
    """Print what the command prints, without the key."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(line.replace(key, b"...") if key else line)
        sys.stdout.buffer.flush()


def members_of(group: int) -> list[int]:
    """List the processes of a process group that have not ended. One that only waits to be asked for its exit code has,
    once all of its threads have."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) != group:
                continue
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1:
                found.append(pid)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
