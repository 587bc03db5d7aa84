"""Carries what other threads ask the engine's thread to do, in the order in which they asked."""

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

ARRIVAL_GAP_SECONDS = 0.003


class CommandQueue:
    """Carries functions from any thread to the one that calls `run`, and what they return back to who asked."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def put(self, command: Callable[[], None]) -> None:
        """Leave a command whose result nobody wants."""
        self._commands.put(command)

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """Leave a command; the future gets what it returns or raises."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # the fault boundary of a command: its caller gets it, the engine goes on
                future.set_exception(error)

        self._commands.put(run)
        return future

    def run(self, *, wait: bool) -> None:
        """Run all commands that are there; `wait` for the first one."""
        if wait:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def gather(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Run commands that come one right after the other, until `enough`, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        while not enough() and time.monotonic() < deadline:
            try:
                self._commands.get(timeout=ARRIVAL_GAP_SECONDS)()
            except queue.Empty:
                return
