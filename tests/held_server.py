"""Is the embedded server, whose requests a test can hold.

    python tests/held_server.py HOLD [arguments of megatron_rl.rollout.embedded]

While the file HOLD is there, sequences stand still once all of them have 16 tokens. They run all the same: aborts,
pauses and new weights find them, and a request that comes later draws its own 16. So a request that a test started is
still under way when the test does something to it, however fast the server is, or however late the test.
"""

import sys
import time
from pathlib import Path

from megatron_rl.rollout.embedded import __main__
from megatron_rl.rollout.embedded.engine import Engine

TOKENS = 16


def install(hold: Path) -> None:
    """Let the engine of this process look at the file before each step."""
    step = Engine._decode

    def held_step(engine: Engine) -> None:
        counts = [engine._slots.num_output[sequence.used_slot] for sequence in engine._slots.running()]
        if counts and min(counts) >= TOKENS and hold.exists():
            time.sleep(0.002)  # the engine looks for commands again
        else:
            step(engine)

    Engine._decode = held_step  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    sys.exit(__main__.main(sys.argv[2:]))
