"""Holds the outcome of judging one response."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Reason = Literal["correct", "wrong", "no_answer", "too_slow", "timeout", "error"]
REASONS: tuple[Reason, ...] = get_args(Reason)
DETAIL_CHARACTERS = 400
# The judge gave up: nobody knows whether the answer is right.
GAVE_UP: tuple[Reason, ...] = ("timeout", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Holds what a reward says about one response.

    score: of the built-in kinds 1.0 for "correct", otherwise 0.0; of others any finite number.
    reason: "too_slow" is said of a program that ran out of its time, and is a way to be wrong. GAVE_UP says when there
        is no verdict at all.
    seconds: time spent judging, waiting for a free worker not included; for "timeout" the limit that was hit;
        0.0 for "error", where it is unknown.
    details: why, for people; empty where the reason says it all.
    parts: what the score was made from, by name, where there are several.
    """

    score: float
    reason: Reason
    seconds: float
    details: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


def make_verdict(reason: Reason, seconds: float = 0.0, details: str = "") -> Verdict:
    score = 1.0 if reason == "correct" else 0.0
    return Verdict(score=score, reason=reason, seconds=seconds, details=printable(details))


def printable(details: str) -> str:
    """Return a short text that any terminal, log and file takes: it may quote what a program printed, and that may move
    the cursor, clear the screen, or be half a surrogate pair. Ends of lines stay."""
    cut = details[:DETAIL_CHARACTERS]
    if cut.isprintable():
        return cut
    escaped = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in cut)
    return "".join(escaped)[:DETAIL_CHARACTERS]
