"""This module writes what a person at the terminal reads: lines of at most 80 columns on stdout, warnings on stderr.

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
LOG_LEVELS = ("debug", "info", "warning", "error")
_STEPS_FOR_ETA = 20


def say(text: str) -> None:
    """Write a line to stdout at once, even where that is a pipe or a file."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def configure_logging(stream: TextIO) -> None:
    """Send log lines of what goes well to a stream as they are, and warnings and errors to stderr with a word before
    them. This package logs from the level of MEGATRON_RL_LOG on, others log warnings alone."""
    normal, wrong = _Lines(stream), _Lines(sys.stderr)
    normal.addFilter(lambda record: record.levelno < logging.WARNING)
    wrong.setLevel(logging.WARNING)
    wrong.setFormatter(_Warning())
    logging.basicConfig(level=logging.WARNING, handlers=[normal, wrong], format="%(message)s")
    level = os.environ.get("MEGATRON_RL_LOG", "").lower()
    logging.getLogger("megatron_rl").setLevel(level.upper() if level in LOG_LEVELS else logging.INFO)


class _Lines(logging.StreamHandler[TextIO]):
    """Drops lines that nobody reads any more; logging itself prints a stack trace for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


class _Warning(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        ours = record.name.partition(".")[0] == "megatron_rl"
        return f"{record.levelname.lower()}{'' if ours else f' of {record.name}'}: {super().format(record)}"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Lay out rows of a name and a text. A long text goes on below itself."""
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
    """Join the parts of a line that has to fit into its columns. Where they do not fit, drop the last but one, and so
    on. The first and the last part stay."""
    kept = [part for part in parts if part]
    while len(line := "  ".join(kept)) > COLUMNS and len(kept) > 2:
        del kept[-2]
    return line


def duration(seconds: float) -> str:
    """Write a time to wait for people to read."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Eta:
    """Says when a run of `num_steps` steps will end, by the mean of its last steps."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps, self._recent = num_steps, deque[float](maxlen=_STEPS_FOR_ETA)

    def after(self, step: int, seconds: float) -> str:
        """Say when the run will end, after a step that took so long. step: counted from 0. Return "" after the last
        one."""
        self._recent.append(seconds)
        left = self._num_steps - step - 1
        return f"ETA {duration(left * fmean(self._recent))}" if left > 0 else ""
