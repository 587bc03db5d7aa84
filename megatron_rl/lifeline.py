"""A process that ends with the one that started it, however that one ends."""

import logging
import os
import threading
import time

log = logging.getLogger(__name__)

PARENT_VARIABLE = "MEGATRON_RL_PARENT"


def has_launcher() -> bool:
    """True when the process that started this one is the launcher of its rank, and lives."""
    return "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(PARENT_VARIABLE) == str(os.getppid())


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


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
