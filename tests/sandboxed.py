"""Whether this machine can hold hostile code, for tests that need it to."""

import os
from collections.abc import Callable

from megatron_rl.reward.sandbox import SandboxUnavailable


def why_not(start: Callable[[], object]) -> str:
    """Why `start` finds no sandbox, empty when it does; RuntimeError where MEGATRON_RL_NEED_SANDBOX says it must."""
    try:
        start()
    except SandboxUnavailable as missing:
        if os.environ.get("MEGATRON_RL_NEED_SANDBOX"):
            raise RuntimeError(f"MEGATRON_RL_NEED_SANDBOX is set and there is no sandbox: {missing}") from None
        return str(missing)
    return ""
