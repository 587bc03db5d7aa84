"""Runs a command of this project with code of a test inside, which acts at an exact place of the run.

A test that looks from outside at how far a run is may look too late: the run is another one's, on a machine of any
speed. Code inside acts in the very call that it waits for.
"""

import signal
from collections.abc import Sequence

import forked

_END = """
import sys
from megatron_rl.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""
_KILLED = """
import os, signal
def end_now():
    os.kill(os.getpid(), signal.SIGKILL)
"""
# Code for `killed`: the end comes in the phase of `step`, when a group of it is in the journal.
BEHIND_A_GROUP = """
from megatron_rl.rollout.journal import Journal
append = Journal.append
async def append_and_end(journal, group):
    await append(journal, group)
    if journal._step == {step}:
        end_now()
Journal.append = append_and_end
"""


def with_code(command: Sequence[str], code: str) -> list[str]:
    """Return the command `[python, -m, megatron_rl.cli, ...]` so that it runs this code first."""
    assert list(command[1:3]) == ["-m", "megatron_rl.cli"]
    return [command[0], "-c", code + _END, *command[3:]]


def killed(command: Sequence[str], code: str, seconds: float = 600) -> None:
    """Run a command until its code kills it by `end_now()`, which it has to do."""
    done = forked.run(with_code(command, _KILLED + code), timeout=seconds)
    assert done.returncode == -signal.SIGKILL, f"not killed, but ended with {done.returncode}: {done.stderr[-4000:]}"
