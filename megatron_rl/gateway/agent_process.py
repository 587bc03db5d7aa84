"""Runs an agent's function once, in a process of its own."""

import asyncio
import json
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.gateway.model import Model, TrajectoryOver
from megatron_rl.gateway.protocol import Order
from megatron_rl.own_functions import last_lines
from megatron_rl.reward import score
from megatron_rl.reward.score import verdict_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Holds the row that an agent is to do. prompt: the last message. seed: for what is random in it, so that a run
    that was killed comes to the same again."""

    id: str
    prompt: str
    messages: list[dict[str, Any]]
    answer: str
    domain: str
    meta: dict[str, Any]
    seed: int


def be_agent(function: Callable[..., Any], order: Order, result: Path, passing_score: float) -> int:
    """Run the function, and write its result. Return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    told: dict[str, Any]
    try:
        returned = asyncio.run(function(task=Task(**order.task), model=Model(order.base_url, order.api_key)))
        told = {}
        if returned is not None:
            verdict = asdict(verdict_of(returned, passing_score))
            told = {key: verdict[key] for key in ("score", "reason", "details", "parts")}
    except TrajectoryOver:
        told = {}  # the run knows of it
    except BaseException as error:
        traceback.print_exception(error)
        told = {"error": last_lines(error, (__file__, score.__file__))}
    result.write_text(json.dumps(told), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    return 0
