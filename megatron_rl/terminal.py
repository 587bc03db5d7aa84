"""What a person at the terminal reads: lines of at most 80 columns on stdout, warnings on stderr.

NO_COLOR, TERM=dumb and pipes are obeyed: rich colours nothing and draws no bars there.
"""

import logging
import os
import sys
import textwrap
from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import TextIO

COLUMNS = 80
_STEPS_FOR_ETA = 20


def say(text: str) -> None:
    """Write a line to stdout at once, also where that is a pipe or a file."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def configure_logging(stream: TextIO) -> None:
    """Have what goes well go to a stream as it is, and warnings and errors to stderr with a word before them; of this
    package from the level of MEGATRON_RL_LOG on, of others warnings alone."""
    normal, wrong = logging.StreamHandler(stream), logging.StreamHandler(sys.stderr)
    normal.addFilter(lambda record: record.levelno < logging.WARNING)
    wrong.setLevel(logging.WARNING)
    wrong.setFormatter(_Warning())
    logging.basicConfig(level=logging.WARNING, handlers=[normal, wrong], format="%(message)s")
    level = os.environ.get("MEGATRON_RL_LOG", "INFO").upper()
    logging.getLogger("megatron_rl").setLevel(level if level in logging.getLevelNamesMapping() else logging.INFO)


class _Warning(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        ours = record.name.partition(".")[0] == "megatron_rl"
        return f"{record.levelname.lower()}{'' if ours else f' of {record.name}'}: {super().format(record)}"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of a name and a text, which goes on below itself where it is long."""
    width = 2 + max(len(name) for name, _ in rows)
    return "\n".join(
        line
        for name, text in rows
        for line in textwrap.wrap(
            text,
            COLUMNS,
            initial_indent=f"{name:<{width}}",
            subsequent_indent=" " * width,
            break_on_hyphens=False,
            break_long_words=False,
        )
    )


def fitted(parts: Sequence[str]) -> str:
    """Join the parts of a line that has to fit into its columns; the last but one goes first where they do not. The
    last part stays."""
    kept = [part for part in parts if part]
    while len(line := "  ".join(kept)) > COLUMNS and len(kept) > 2:
        del kept[-2]
    return line


def duration(seconds: float) -> str:
    """A time to wait, for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Eta:
    """Says when a run of `num_steps` steps will have ended, by the mean of its last steps."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps, self._recent = num_steps, deque[float](maxlen=_STEPS_FOR_ETA)

    def after(self, step: int, seconds: float) -> str:
        """step: that has ended, from 0, and took so long. Empty after the last one."""
        self._recent.append(seconds)
        left = self._num_steps - step - 1
        return f"ETA {duration(left * fmean(self._recent))}" if left > 0 else ""
