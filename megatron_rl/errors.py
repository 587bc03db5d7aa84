"""Errors that are told to the user as one message, without a stack trace. Mistakes are plain ValueErrors."""

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped cleanly, run again with --resume


class Fault(RuntimeError):
    """Something outside this process failed (a server died, weights did not arrive); the message says all there is."""


class SharedFault(Fault):
    """A fault that every rank raises at the same point of the program, so nobody has to be told."""
