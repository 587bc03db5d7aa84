"""Tells whether this machine can run hostile code, for tests that need it, and runs work as another user."""

import os
import pickle
from collections.abc import Callable
from typing import Any

from megatron_rl.reward.sandbox import SandboxUnavailable

ORDINARY_USER = 54321
# The user who runs the tests. If that is root, an ordinary user too.
USERS = [os.geteuid(), *([ORDINARY_USER] if os.geteuid() == 0 else [])]


def why_not(start: Callable[[], object]) -> str:
    """Return why `start` finds no sandbox; "" when it finds one.

    Raise RuntimeError when there is none but MEGATRON_RL_NEED_SANDBOX is set.
    """
    try:
        start()
    except SandboxUnavailable as missing:
        if os.environ.get("MEGATRON_RL_NEED_SANDBOX"):
            raise RuntimeError(f"MEGATRON_RL_NEED_SANDBOX is set and there is no sandbox: {missing}") from None
        return str(missing)
    return ""


def as_user(user: int, work: Callable[[], Any]) -> Any:
    """Run `work()` in a child process that belongs to `user`. Return what it returns, or raise what it raises."""
    if user == os.geteuid():
        return work()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            result = ("ok", work())
        except BaseException as error:
            result = ("raised", f"{type(error).__name__}: {error}")
        with open(write_end, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        kind, value = pickle.load(pipe)
    os.waitpid(pid, 0)
    assert kind == "ok", value
    return value
