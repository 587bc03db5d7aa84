"""Defines the interface of reward functions: what they are called with, and what they may return.

A function is called with the parameters that it names, among `OF_RESPONSE`. One that names `responses` is called once
for all responses to a prompt, with parameters of `OF_GROUP`, and returns a list. `functions.py` has the built-in kinds
as such functions.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_rl.reward.verdict import DETAIL_CHARACTERS, REASONS, Reason, Verdict, printable

_OF_PROMPT = {
    "prompt": "str, the prompt of the row with data.suffix, or the last message of the user",
    "messages": "list of {role, content}, all that the model was given",
    "answer": "str, the row's reference answer",
    "meta": "dict, the row's other columns",
    "domain": "str, the row's domain",
    "id": "str, the row's id",
}
OF_RESPONSE = {
    "response": "str, the text to judge, without the token that ends it",
    **_OF_PROMPT,
    "finish_reason": 'str, "stop", or "length" of a response that was cut off',
    "response_tokens": "int, how many tokens the response has, the one that ends it included",
}
OF_GROUP = {
    "responses": "list of str, all responses to one prompt",
    **_OF_PROMPT,
    "finish_reasons": 'list of str, "stop" or "length" for each response',
    "response_tokens": "list of int, how many tokens each response has",
}
_MAX_PARTS = 32
_PART_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Score:
    """Holds what a reward function may return where a number alone does not say enough.

    value: the reward, any finite number. reason: "correct", "wrong" or "no_answer", which results and metrics count;
        "error" where the response cannot be judged; empty: "correct" from reward.passing_score on, else "wrong".
    details: why, for whoever reads the responses. parts: what the value was made from, by name; each becomes a metric.
    """

    value: float
    reason: str = ""
    details: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """Holds what a response answers: a row of the data."""

    @property
    def id(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def meta(self) -> Mapping[str, Any]: ...
    @property
    def messages(self) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Holds a response that is to be judged. num_tokens: the one that ends it included; 0 where nobody knows."""

    text: str
    finish_reason: str = "stop"
    num_tokens: int = 0


_OF_TASK: dict[str, Callable[[Task], Any]] = {
    "prompt": lambda task: task.prompt,
    "messages": lambda task: [dict(message) for message in task.messages],
    "answer": lambda task: task.answer,
    "meta": lambda task: dict(task.meta),
    "domain": lambda task: task.domain,
    "id": lambda task: task.id,
}
_OF_ATTEMPT: dict[str, Callable[[Attempt], Any]] = {
    "response": lambda attempt: attempt.text,
    "finish_reason": lambda attempt: attempt.finish_reason,
    "response_tokens": lambda attempt: attempt.num_tokens,
}


def of_task(task: Task, names: Collection[str] = _OF_PROMPT.keys()) -> dict[str, Any]:
    """Return the values of those of the parameters that are about the prompt."""
    return {name: _OF_TASK[name](task) for name in names if name in _OF_TASK}


def columns_of(attempts: Sequence[Attempt], names: Collection[str]) -> dict[str, list[Any]]:
    """Return the values of those of the parameters of `OF_RESPONSE` that are about the response: a list for each."""
    return {name: list(map(_OF_ATTEMPT[name], attempts)) for name in names if name in _OF_ATTEMPT}


def of_group(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Return the values of `OF_GROUP` that are about the responses."""
    return {
        "responses": [attempt.text for attempt in attempts],
        "finish_reasons": [attempt.finish_reason for attempt in attempts],
        "response_tokens": [attempt.num_tokens for attempt in attempts],
    }


def verdict_of(returned: object, passing_score: float, seconds: float = 0.0) -> Verdict:
    """Return the verdict that a function's result says; raise ValueError for what is no result."""
    if type(returned) is float and math.isfinite(returned):  # what most of them return
        return Verdict(score=returned, reason="correct" if returned >= passing_score else "wrong", seconds=seconds)
    score = returned if isinstance(returned, Score) else Score(_number(returned, "it returned"))
    value = _number(score.value, "the value of its Score is")
    reason = score.reason or ("correct" if value >= passing_score else "wrong")
    if reason not in REASONS:
        raise ValueError(
            f"the reason of its Score is {reason!r:.80}; it must be one of {', '.join(REASONS)} or empty, and what "
            "else there is to say goes into details"
        )
    if not isinstance(score.parts, Mapping) or len(score.parts) > _MAX_PARTS:
        raise ValueError(
            f"the parts of its Score must be a dict of at most {_MAX_PARTS} numbers, got {score.parts!r:.80}"
        )
    for name in score.parts:
        if not (isinstance(name, str) and _PART_NAME.fullmatch(name)):
            raise ValueError(f"a part of its Score is called {name!r:.80}; take letters, digits, '_', '-' and '.'")
    parts = {name: _number(part, f"the part {name!r} of its Score is") for name, part in score.parts.items()}
    known: Reason = next(one for one in REASONS if one == reason)
    details = printable(str(score.details)[:DETAIL_CHARACTERS])
    return Verdict(score=value, reason=known, seconds=seconds, details=details, parts=parts)


def _number(value: object, what: str) -> float:
    """Return a finite number; of numpy and torch a single one counts, too."""
    if not isinstance(value, str | bytes) and hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)):
        value = value.item()
    if value is None:
        raise ValueError(f"{what} None; every way through it must end in `return` and a number, a bool or a Score")
    if not isinstance(value, int | float):
        kind = type(value).__name__
        hint = "; write `await` before the call" if kind == "coroutine" else ""
        raise ValueError(f"{what} {value!r:.80}, a {kind}, and must be a number, a bool or a Score{hint}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} {number}, and must be a finite number")
    return number
