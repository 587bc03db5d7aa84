"""Errors that are told to the user as one message, without a stack trace. Mistakes are plain ValueErrors."""

import errno
import os
import sys
from collections.abc import Callable

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped cleanly, run again with --resume


class Fault(RuntimeError):
    """Something outside this process failed (a server died, weights did not arrive); the message says all there is."""


class SharedFault(Fault):
    """A fault that every rank raises at the same point of the program, so nobody has to be told."""


# What a disk says, and not a mistake of ours.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE}


def exit_code(program: str, run: Callable[[], int]) -> int:
    """That of `run`, or when it raises, after one message under the program's name: 2 for a mistake to correct, 1 for a
    fault or what a disk says, 130 for Ctrl-C."""
    try:
        return run()
    except (ValueError, Fault) as error:
        # What every rank raises is told once; what befell one rank, by that rank.
        if os.environ.get("RANK", "0") == "0" or type(error) is Fault:
            sys.stderr.write(f"{program}: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        if error.errno not in _DISK:
            raise
        sys.stderr.write(f"{program}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
