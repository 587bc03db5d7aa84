"""Runs agents, each in a process of its own: `python -m megatron_rl.gateway.host FOLDER`, which has their files.

It imports the user's function once and forks for each trajectory, or starts the user's program. An agent has a process
group, limits of memory and output, and an end: whatever it has started ends with it, also what has left its group,
which this process inherits. When its stdin closes, the run is gone, and everything ends.
"""

import contextlib
import ctypes
import errno
import inspect
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from megatron_rl.gateway.agent_process import be_agent
from megatron_rl.gateway.protocol import (
    API_KEY,
    BASE_URL,
    RESULT_FILE,
    TASK_FILE,
    End,
    Order,
    Outcome,
    Setup,
    line,
)
from megatron_rl.own_functions import load_function, parameters_of
from megatron_rl.parsing import parse_json
from megatron_rl.reward.sandbox_run import resident_bytes
from megatron_rl.reward.score import Score, verdict_of

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_KILL_SECONDS = 5.0
_TAIL_BYTES = 4096  # of what an agent prints, for messages
_MAX_OUTPUT_BYTES = 4 * 2**20
_MAX_RESULT_BYTES = 2**16
_MAX_LOG_BYTES = 16 * 2**20
_MAX_OPEN_FILES = 4096
_SCRIPTS = (".py", ".sh", ".js", ".mjs", ".ts", ".rb", ".pl")  # a word of a command that ends so is a file to run
_SET_PDEATHSIG, _SET_SUBREAPER = 1, 36
PARAMETERS = {
    "task": "the row: id, prompt, messages, answer, domain, meta, and a seed for what is random",
    "model": "the policy: await model.chat(messages, tools=...), model.base_url, model.api_key",
}


@dataclass(slots=True, eq=False)
class _Agent:
    """Holds a running agent. row: the id of the row that it does. output: where what it prints comes. folder: its own,
    for files that come and go. is_needed: until the run ends it for no fault of its own."""

    id: str
    row: str
    pid: int
    pidfd: int
    output: int
    folder: Path
    tail: bytearray = field(default_factory=bytearray)
    num_output_bytes: int = 0
    error: str = ""
    is_needed: bool = True


class Host:
    """Runs agents until stdin ends."""

    def __init__(self, setup: Setup, news: int, function: Callable[..., Any] | None, folder: Path) -> None:
        """Begin without agents. news: descriptor that takes it. folder: takes the folders of agents."""
        self._setup, self._news, self._function, self._folder = setup, news, function, folder
        self._agents: dict[str, _Agent] = {}
        self._poll = select.poll()
        self._by_descriptor: dict[int, _Agent] = {}
        self._unread = b""
        self._looked = 0.0

    def run(self) -> None:
        self._poll.register(0, select.POLLIN)
        try:
            while True:
                for descriptor, _ in self._poll.poll(1000 * _LOOK_SECONDS):
                    if descriptor == 0:
                        if not self._take_orders():
                            return
                    elif agent := self._by_descriptor.get(descriptor):
                        if descriptor == agent.output:
                            self._read(agent)
                        elif _has_ended(agent.pidfd, 0.0):  # the number may be another one's since it was looked at
                            self._ended(agent)
                if time.monotonic() - self._looked > _LOOK_SECONDS:
                    self._looked = time.monotonic()
                    self._look()
        finally:
            for agent in list(self._agents.values()):
                agent.is_needed = False
                self._end(agent)
            self._end_orphans()

    def _take_orders(self) -> bool:
        """Read orders and carry them out. Return False when there will be no more."""
        data = os.read(0, 2**20)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for one in lines:
            order = json.loads(one)
            if "start" in order:
                self._start(Order(**order["start"]))
                continue
            end = End(**order["end"])
            if agent := self._agents.get(end.id):
                agent.error, agent.is_needed = agent.error or end.why, bool(end.why)
                self._end(agent)
        return bool(data)

    def _start(self, order: Order) -> None:
        folder = Path(tempfile.mkdtemp(prefix="agent_", dir=self._folder))
        read, write = os.pipe()
        try:
            pid = self._fork(order, folder, write) if self._function else self._spawn(order, folder, write)
        except OSError as error:
            os.close(read)
            shutil.rmtree(folder, ignore_errors=True)
            self._tell(Outcome(id=order.id, error=f"it cannot be started: {error}"))
            return
        finally:
            os.close(write)
        agent = _Agent(order.id, str(order.task["id"]), pid, os.pidfd_open(pid), read, folder)
        _write(self._news, line("started", {"id": order.id, "pid": pid}))
        os.set_blocking(read, False)
        self._agents[order.id] = agent
        for descriptor in (agent.pidfd, agent.output):
            self._by_descriptor[descriptor] = agent
            self._poll.register(descriptor, select.POLLIN)

    def _environment(self, order: Order, folder: Path) -> dict[str, str]:
        return {
            BASE_URL: order.base_url,
            API_KEY: order.api_key,
            TASK_FILE: str(folder / "task.json"),
            RESULT_FILE: str(folder / "result.json"),
            "TMPDIR": str(folder),
        }

    def _fork(self, order: Order, folder: Path, output: int) -> int:
        assert self._function is not None
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            _leave_host()
            nothing = os.open(os.devnull, os.O_RDONLY)
            for target, source in ((0, nothing), (1, output), (2, output)):
                os.dup2(source, target)
            os.closerange(3, 2**20)
            os.environ.update(self._environment(order, folder))
            code = be_agent(self._function, order, folder / "result.json", self._setup.passing_score)
        finally:
            os._exit(code)

    def _spawn(self, order: Order, folder: Path, output: int) -> int:
        (folder / "task.json").write_text(json.dumps(order.task), encoding="utf-8")
        with (folder / "task.json").open("rb") as task:
            process = subprocess.Popen(
                self._setup.command,
                stdin=task,
                stdout=output,
                stderr=output,
                env=os.environ | self._environment(order, folder),
                cwd=self._setup.folder,
                preexec_fn=_leave_host,
            )
        process.returncode = 0  # it is waited for here, and not by subprocess
        return process.pid

    def _read(self, agent: _Agent) -> None:
        try:
            data = os.read(agent.output, 2**16)
        except BlockingIOError:
            return
        if not data:
            self._forget_output(agent)
            return
        agent.num_output_bytes += len(data)
        agent.tail = (agent.tail + data)[-_TAIL_BYTES:]
        if agent.num_output_bytes > _MAX_OUTPUT_BYTES and not agent.error:
            agent.error = f"it has printed more than {_MAX_OUTPUT_BYTES // 2**20} MiB"
            self._end(agent)

    def _forget_output(self, agent: _Agent) -> None:
        if agent.output >= 0:
            self._poll.unregister(agent.output)
            del self._by_descriptor[agent.output]
            os.close(agent.output)
            agent.output = -1

    def _look(self) -> None:
        for agent in list(self._agents.values()):
            if resident_bytes(agent.pid) > self._setup.memory_bytes:
                agent.error = f"it and what it started took more than {self._setup.memory_bytes} bytes of memory"
                agent.error += " (rollout.agent_memory_bytes)"
                self._end(agent)
        self._end_orphans()

    def _end(self, agent: _Agent) -> None:
        """End an agent's processes now, and tell of it."""
        _kill_group(agent.pid)
        _has_ended(agent.pidfd, _KILL_SECONDS)
        self._ended(agent)

    def _ended(self, agent: _Agent) -> None:
        """End the rest of an agent whose first process has ended, and tell of it."""
        _kill_group(agent.pid)  # before its id is free for others
        _, status = os.waitpid(agent.pid, 0)
        if agent.output >= 0:
            self._read(agent)
        self._forget_output(agent)
        self._poll.unregister(agent.pidfd)
        del self._by_descriptor[agent.pidfd], self._agents[agent.id]
        os.close(agent.pidfd)
        self._end_orphans()
        outcome = self._outcome(agent, os.waitstatus_to_exitcode(status))
        shutil.rmtree(agent.folder, ignore_errors=True)
        if outcome.error and agent.is_needed:
            self._keep_output(agent, outcome.error)
        self._tell(outcome)

    def _outcome(self, agent: _Agent, code: int) -> Outcome:
        error = agent.error
        said = agent.tail.decode(errors="replace").strip().rpartition("\n")[2][-200:]
        if not error and code:
            how = f"signal {-code}" if code < 0 else f"code {code}"
            error = f"it ended with {how}" + (f"; the last it printed: {said}" if said else "")
        try:
            with (agent.folder / "result.json").open("rb") as file:
                content = file.read(_MAX_RESULT_BYTES + 1)
            if len(content) > _MAX_RESULT_BYTES:
                raise ValueError(f"more than {_MAX_RESULT_BYTES} bytes")
            result = parse_json(content)
            told = result if isinstance(result, dict) else {"score": result}
            if unknown := told.keys() - {"score", "reason", "details", "parts", "error"}:
                raise ValueError(f"the key {min(unknown)!r}")
            if isinstance(told.get("score"), bool):
                told["score"] = float(told["score"])
            outcome = msgspec.convert({**told, "id": agent.id, "error": told.get("error") or error}, Outcome)
        except FileNotFoundError:
            return Outcome(id=agent.id, error=error)
        except (OSError, ValueError, msgspec.ValidationError) as problem:
            remedy = "it must be JSON of a score, or of score, reason, details and parts"
            return Outcome(id=agent.id, error=error or f"its result has {problem}; {remedy}")
        why = _why_no_verdict(outcome, self._setup.passing_score)
        return Outcome(id=agent.id, error=why) if why else outcome

    def _end_orphans(self) -> None:
        """End processes that this one has inherited: what agents that have ended had started outside of their group."""
        for pid in set(_children()) - {agent.pid for agent in self._agents.values()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _keep_output(self, agent: _Agent, error: str) -> None:
        with contextlib.suppress(OSError), open(self._setup.output, "ab") as file:
            if file.tell() > _MAX_LOG_BYTES:
                file.truncate(0)
            said = f"--- {agent.id} of the row {agent.row}: {error}\n".encode(errors="replace")
            file.write(said + bytes(agent.tail).rstrip() + b"\n")

    def _tell(self, outcome: Outcome) -> None:
        _write(self._news, line("ended", outcome))


def _why_no_verdict(outcome: Outcome, passing_score: float) -> str:
    """Say what is wrong with the score of an agent that has not failed; "" for nothing."""
    if outcome.score is None or outcome.error:
        return ""
    try:
        verdict_of(Score(outcome.score, outcome.reason, outcome.details, outcome.parts), passing_score)
    except ValueError as problem:
        return str(problem)
    return ""


def _leave_host() -> None:
    """Give a new child a session and group of its own, an end with this process, and limits. It inherits what its
    children leave behind: all that it has started is below it while it runs, and comes to the host afterwards."""
    os.setsid()
    prctl = ctypes.CDLL(None).prctl
    prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    prctl(_SET_SUBREAPER, 1, 0, 0, 0)
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _has_ended(pidfd: int, seconds: float) -> bool:
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _children() -> list[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    return [int(pid) for pid in text.split()]


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except OSError as error:
            if error.errno == errno.EPIPE:
                return  # the run is gone, which stdin says too
            raise


def load_agent(setup: Setup) -> Callable[..., Any] | None:
    """Return the agent's function, or None for a program. Raise ValueError for what is wrong with either."""
    if not setup.agent:
        if shutil.which(setup.command[0], path=os.environ.get("PATH")) is None:
            raise ValueError(
                f"rollout.agent_command names the program {setup.command[0]!r}, which is not found; give its path"
            )
        script = next((word for word in setup.command[1:] if word.endswith(_SCRIPTS)), None)
        if script is not None and not Path(setup.folder, script).is_file():
            raise ValueError(
                f"rollout.agent_command names the file {script!r}, which is neither beside the configuration nor in "
                f"{setup.folder}; give its path"
            )
        return None
    function = load_function(setup.agent, "rollout.agent")
    wanted = parameters_of(function, PARAMETERS, "rollout.agent")
    if set(wanted) != set(PARAMETERS) or not inspect.iscoroutinefunction(function):
        raise ValueError(
            f"rollout.agent: {setup.agent.rpartition(':')[2]} must be `async def run(task, model)`, got "
            f"{'async ' if inspect.iscoroutinefunction(function) else ''}def with {', '.join(wanted) or 'neither'}; "
            "write it so"
        )
    return function


def main() -> None:
    """Run the host. The first line of stdin is the setup; orders follow."""
    news = os.dup(1)
    os.set_inheritable(news, False)
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        setup = Setup(**json.loads(stdin.readline()))
    output = os.open(setup.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    ctypes.CDLL(None).prctl(_SET_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides when this ends
    try:
        function = load_agent(setup)
    except ValueError as error:
        _write(news, line("problem", str(error)))
        return
    _write(news, line("ready", True))
    try:
        Host(setup, news, function, Path(sys.argv[1])).run()
    finally:
        shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads that the user's module has started need not end
