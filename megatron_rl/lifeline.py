"""This module ends processes when the one that started them ends, however it ends. It has three ways, each where the
others fail.

A rank watches its launcher, with which it agreed on nothing. A server watches its stdin, which its starter holds. A
worker of a pool has the kernel's word, since it may be in C code for minutes.
"""

import fcntl
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

PARENT_VARIABLE = "MEGATRON_RL_PARENT"


def has_launcher() -> bool:
    """Tell whether the process that started this one is the launcher of its rank, and lives."""
    return "TORCHELASTIC_RUN_ID" in os.environ or is_own_rank()


def is_own_rank() -> bool:
    """Tell whether `megatron-rl` itself started this process as a rank."""
    return os.environ.get(PARENT_VARIABLE) == str(os.getppid())


def watch_parent(interval_seconds: float = 0.5) -> None:
    """End this process when its launcher is gone.

    Under torchrun the launcher is the parent process. `MEGATRON_RL_PARENT` names another process to follow (the demo
    sets it to itself, the Makefile to make). Started by hand from a shell nothing is watched, so nohup works.
    """
    parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    named = int(os.environ.get(PARENT_VARIABLE, "0"))
    if parent is None and not named:
        return

    def watch() -> None:
        while (parent is None or os.getppid() == parent) and (not named or _exists(named)):
            time.sleep(interval_seconds)
        log.error("the launcher of this process (pid %s) is gone; ending", parent or named)
        # Not sys.exit: the main thread may sit in a collective for the rest of its deadline.
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def watch_stdin(when_closed: Callable[[], object]) -> None:
    """Call a function when the other end of stdin closes. The kernel closes it even for a parent that was killed."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        when_closed()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def end_with_owner() -> None:
    """End this worker of a multiprocessing pool when its owner dies, also inside a long call of C code.

    The kernel then sends SIGIO: the owner holds the other end of the sentinel's pipe. The signal's default action ends
    a process where a Python handler would not run.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    owner = multiprocessing.parent_process()
    assert owner is not None, "runs in pool workers only"
    fcntl.fcntl(owner.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(owner.sentinel, fcntl.F_SETFL, fcntl.fcntl(owner.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if not owner.is_alive():
        os._exit(1)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
