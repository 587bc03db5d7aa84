"""A program ends with an exit code, and with one message without a stack trace where it failed.

Mistakes of a user are plain ValueErrors.

| exit code | constant | meaning |
|---|---|---|
| 0 | EXIT_DONE | all is done |
| 1 | EXIT_FAULT | something failed: a server or rank died, the disk is full, a bug |
| 2 | EXIT_MISTAKE | a mistake of the user's, named in the message |
| 75 | EXIT_STOPPED | SIGINT, SIGTERM or SIGUSR1 stopped it, and --resume goes on from what is on the disk |
| 130 | EXIT_INTERRUPTED | one of these came before there was anything to go on from, or a second one ended it at once |
| 141 | EXIT_UNREAD | nobody reads the output any more, as behind `| head`; no message says so |
"""

import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_MISTAKE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL
EXIT_INTERRUPTED = 130  # what a shell says of SIGINT
EXIT_UNREAD = 141  # what a shell says of SIGPIPE

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is Slurm's word that the time is nearly up


class Fault(RuntimeError):
    """Says that something outside this process failed (a server died, weights did not arrive). The message says all
    there is."""


class SharedFault(Fault):
    """Is a fault that every rank raises at the same point of the program, so nobody has to be told."""


class StopRequested(Exception):
    """Says that a signal asked this process to stop, raised where it can stop."""


class Stopped(Exception):
    """Says that a signal has stopped this process, and --resume goes on from what is on the disk."""


# These errors come from a disk, not from a mistake in this program.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE}

_rank = 0


def speak_as(rank: int) -> None:
    """Say that this process is one of several that raise the same errors, which rank 0 alone tells."""
    global _rank
    _rank = rank


def exit_code(program: str, run: Callable[[], int]) -> int:
    """Return the exit code of `run`. When it raises, print a message under the program's name and return the code of
    the table above. What was printed is flushed."""
    try:
        code = _exit_code(program, run)
    except BrokenPipeError:
        code = EXIT_UNREAD
    return flushed(code)


def flushed(code: int) -> int:
    """Flush stdout and stderr before this process ends with `code`, and return the code to end with. What cannot be
    written any more is dropped: else the interpreter tries it once more at its exit, and says that it failed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            code = code or (EXIT_UNREAD if isinstance(error, BrokenPipeError) else EXIT_FAULT)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()
    return code


def _is_unread(stream: TextIO) -> bool:
    """Tell whether a stream is a pipe or socket whose reader is gone."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # it is none of the process's own
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _exit_code(program: str, run: Callable[[], int]) -> int:
    """Do as `exit_code`. Raise BrokenPipeError where nobody reads stdout or stderr any more."""
    try:
        code = run()
        sys.stdout.flush()  # on a full disk that fails
        return code
    except (ValueError, Fault) as error:
        # Rank 0 tells an error that all ranks raise; a rank tells its own.
        if _rank == 0 or type(error) is Fault:
            sys.stderr.write(f"{program}: {error}\n")
        return EXIT_MISTAKE if isinstance(error, ValueError) else EXIT_FAULT
    except Stopped:
        return EXIT_STOPPED
    except (KeyboardInterrupt, StopRequested) as error:
        if _rank == 0:
            sys.stderr.write(f"{program}: {str(error) or 'interrupted'}\n")
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (_is_unread(sys.stdout) or _is_unread(sys.stderr)):
            raise
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            sys.stderr.write(f"{program}: {error}\n")
        else:  # a bug
            traceback.print_exc()
        return EXIT_FAULT


def interrupt_on_signals() -> None:
    """Let every signal that stops a run raise KeyboardInterrupt, until another handler is set. A signal that came
    before counts too, where whoever started this process has blocked them (launch.py)."""

    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # asyncio has a handler of its own for this one

    # A shell that starts a command in the background of a script has it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in STOP_SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_rank(code: int) -> None:
    """End this process, one of several ranks, with `code`. No destructor of torch can turn it into another code.

    The process groups that it is still in end with it. So the other ranks notice at once, and nothing waits for ranks
    that may be gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
