"""Defines what the run and the process of its agents say to each other: JSON, a line each.

Orders: {"start": Order}, {"end": End}. News: {"ready": true} or {"problem": text}, then {"started": {"id", "pid"}} and
{"ended": Outcome}.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# An agent finds these variables in its environment.
BASE_URL, API_KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
TASK_FILE, RESULT_FILE = "MEGATRON_RL_TASK", "MEGATRON_RL_RESULT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Holds the settings with which the process of the agents is started. agent: a function. command: a program
    instead. folder: where it runs. output: takes what agents print that fail. memory_bytes: of one. passing_score: as
    reward.passing_score."""

    agent: str
    command: tuple[str, ...]
    folder: str
    output: str
    memory_bytes: int
    passing_score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Describes one agent to run. task: what it is to do, as plain data."""

    id: str
    base_url: str
    api_key: str
    task: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Describes an agent to end now. why: what it did wrong; "" where it is only needed no more."""

    id: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Says how an agent ended. score: None where it gave none. reason, details, parts: as of a reward's verdict. error:
    what went wrong; "" where nothing did."""

    id: str
    score: float | None = None
    reason: str = ""
    details: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


def line(kind: str, content: Any) -> bytes:
    """Return one order, or one piece of news, as a line."""
    return json.dumps({kind: content if isinstance(content, str | bool | dict) else asdict(content)}).encode() + b"\n"
