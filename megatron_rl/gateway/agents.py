"""Handles the run's side of the process that runs agents: starts it, gives it work, and starts another where it is
lost."""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from megatron_rl.gateway.protocol import End, Order, Outcome, Setup, line
from megatron_rl.proxies import without_proxy
from megatron_rl.rollout.server import inherited_environment

log = logging.getLogger(__name__)

OUTPUT = "agent_output.log"
_START_SECONDS = 300.0  # reading a file with torch in it may take minutes
_END_SECONDS = 10.0
_MAX_LINE_BYTES = 2**24
# Many agents run at a time; libraries would start a thread for each core in each of them.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Lost(Exception):
    """Says that the process that ran the agent has ended, and so has the agent."""


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    process: asyncio.subprocess.Process
    ended: "asyncio.Future[Outcome]"


class Agents:
    """Runs agents. Use it in one event loop; `close()` ends them and what they have started."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None
        self._folder = ""  # of its files; the process removes it, unless it is killed
        self._reader: asyncio.Task[None] | None = None
        self._running: dict[str, _Running] = {}
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Return when agents can be started. Raise ValueError for a function or program that cannot be used."""
        async with self._starting:
            if self._process is not None and self._process.returncode is None:
                return
            environment = inherited_environment()
            Path(self._setup.output).parent.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.mkdtemp(prefix="agents_")
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "megatron_rl.gateway.host", self._folder),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment | without_proxy(environment, "127.0.0.1") | dict.fromkeys(_THREADS, "1"),
                start_new_session=True,
                limit=_MAX_LINE_BYTES,
            )
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(asdict(self._setup)).encode() + b"\n")
            try:
                async with asyncio.timeout(_START_SECONDS):
                    news = await process.stdout.readline()
            except TimeoutError:
                await self._end_process()
                raise ValueError(f"{self._named()} is not imported within {_START_SECONDS:g} s; mend it") from None
            if not news:
                await self._end_process()
                raise ValueError(f"importing {self._named()} ends the process; see {self._setup.output}")
            if problem := json.loads(news).get("problem"):
                await self._end_process()
                raise ValueError(problem)
            self._reader = asyncio.create_task(self._read(process, self._folder))

    async def run(self, order: Order) -> Outcome:
        """Run one agent to its end. Cancelling it ends the agent; the message of `cancel` says what it did wrong. Raise
        Lost where its process was lost meanwhile."""
        await self.start()
        assert self._process is not None and self._process.stdin is not None
        process, stdin = self._process, self._process.stdin
        ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._running[order.id] = _Running(process, ended)
        why = ""
        try:
            with contextlib.suppress(ConnectionError):  # the reader tells of it
                stdin.write(line("start", order))
                await stdin.drain()
            return await ended
        except asyncio.CancelledError as error:
            why = str(error)
            raise
        finally:
            del self._running[order.id]
            if not ended.done() or ended.cancelled():
                self.end(End(id=order.id, why=why))

    def end(self, end: End) -> None:
        """End an agent and what it has started now. `run` returns when it has."""
        if self._process is not None and self._process.stdin is not None and self._process.returncode is None:
            self._process.stdin.write(line("end", end))

    async def close(self) -> None:
        await self._end_process()

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if self._reader is not None:
            self._reader.cancel()
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # it ends its agents, and itself
        try:
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _read(self, process: asyncio.subprocess.Process, folder: str) -> None:
        assert process.stdout is not None
        pids: dict[str, int] = {}
        while news := await process.stdout.readline():
            told = json.loads(news)
            if "started" in told:
                pids[told["started"]["id"]] = told["started"]["pid"]
                continue
            outcome = msgspec.convert(told["ended"], Outcome, strict=False)
            pids.pop(outcome.id, None)
            running = self._running.get(outcome.id)
            if running is not None and not running.ended.done():
                running.ended.set_result(outcome)
        await process.wait()
        log.warning("the process that runs agents has ended with %s; it is started again", process.returncode)
        for pid in pids.values():  # the agents have ended with it, what they have started has not
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        for running in self._running.values():
            if running.process is process and not running.ended.done():
                running.ended.set_exception(Lost())

    def _named(self) -> str:
        return self._setup.agent or " ".join(self._setup.command)
