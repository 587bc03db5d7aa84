"""Runs one program under bubblewrap from start to end: moves its bytes, watches its limits, says what became of it."""

import contextlib
import json
import os
import resource
import select
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from megatron_rl.errors import Fault

Limit = Literal["wall", "cpu", "memory", "processes", "output", "file_size", "files"]

# Seconds between two looks at the memory and the files of all processes of a sandbox.
_WATCH_SECONDS = 0.05
# SIGKILL may take so long to empty a sandbox. It takes longer only when the kernel is stuck.
_END_SECONDS = 20.0
_CHUNK_BYTES = 65536
_PAGE_BYTES = resource.getpagesize()
# A sandbox can make files in these folders only.
_FOLDERS = ("/tmp", "/dev/shm")


class SandboxFailure(Fault):
    """Says that the sandbox itself failed at one run; it says nothing about the program."""


class Ended(Exception):
    """Says that the program has ended where an answer was expected, or wrote what is no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Says what a run may use.

    wall_seconds: of the whole run. cpu_seconds: of each process.
    memory_bytes: of address space for each process, and of resident memory for all of them together (looked at every
        50 ms, so a fast program is a little over before it ends). The tmpfs comes on top.
    processes: and threads.
    output_bytes: of stdout, and the same of stderr.
    file_bytes: of one file. disk_bytes: of /tmp, a quarter of it of /dev/shm; both are memory.
    files: and folders and links in both, looked at every 50 ms as well.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1024**3
    processes: int = 32
    output_bytes: int = 1024**2
    file_bytes: int = 16 * 1024**2
    disk_bytes: int = 64 * 1024**2
    files: int = 10_000
    open_files: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"sandbox limit {name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Describes a command inside of the sandbox.

    stdin: what it reads there. talks: stdin is a socket to `Running.ask` instead.
    private_stdout: stdout is a socket, which no process of the sandbox can open by its /proc entry, as it can a pipe.
    descriptors: open files that it gets under the same numbers; they stay the caller's.
    numpy: it may use that, where the sandbox has it; a tenth of a sandbox's start goes into showing it.
    channel: becomes its stdin and is closed here; a socket whose other end is another program's.
    """

    command: tuple[str, ...]
    stdin: bytes = b""
    talks: bool = False
    private_stdout: bool = False
    descriptors: tuple[int, ...] = ()
    channel: socket.socket | None = None
    numpy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Says what became of a program.

    exit_code: None if a signal ended it. signal: its number, None after an exit; a program that exits with
        128 + N reads the same as one that died of signal N. The program is process 1 of its namespace, so a signal
        that it sends to itself does not end it; a fault does.
    limit: the limit it ran into, or None. "wall", "memory" (of all processes together), "files", "output" and "cpu" are
        observed; otherwise it is what the last line of stderr says, which a program may make up.
    """

    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    limit: Limit | None
    seconds: float


class Running:
    """Holds a program that runs in its sandbox. Leaving the `with` ends every process of it and closes every file."""

    def __init__(
        self,
        arguments: Callable[[Sequence[str]], list[str]],
        program: Program,
        limits: Limits,
        popen_arguments: dict[str, Any],
        bpf: bytes | None,
    ) -> None:
        """Start the program. arguments: options of this run -> the whole command line. bpf: the seccomp filter."""
        self._limits = limits
        self._started = time.monotonic()
        self._next_look = self._started + _WATCH_SECONDS
        self._popen_arguments = popen_arguments
        self._init: int | None = None  # pidfd of the sandbox's process 1
        self._init_pid = 0
        self._over = False
        self._limit: Limit | None = None
        self._status = bytearray()
        self._streams = {"stdout": bytearray(), "stderr": bytearray()}
        self._heard = bytearray()  # on the socket of `ask`
        self._most_heard = 0
        self._open: list[int] = []
        self._selector = selectors.DefaultSelector()
        status_read, status_write = self._pipe()
        stderr_read, stderr_write = self._pipe()
        stdout_read, stdout_write = self._sockets() if program.private_stdout else self._pipe()
        self._outgoing = memoryview(program.stdin)
        self._talk: int | None = None
        stdin_read, stdin_write = self._stdin_of(program)
        # The sandbox waits until we hold its process 1, so that no other process can be taken for it later.
        start_read, self._start = self._pipe()
        passed = [status_write, start_read]
        options = ["--json-status-fd", str(status_write), "--block-fd", str(start_read)]
        if bpf is not None:
            passed.append(self._file_of(bpf))
            options += ["--seccomp", str(passed[-1])]
        try:
            self._process = subprocess.Popen(
                arguments(options),
                stdin=stdin_read,
                stdout=stdout_write,
                stderr=stderr_write,
                env={},
                cwd="/",
                pass_fds=[*passed, *program.descriptors],
                start_new_session=True,
                **popen_arguments,
            )
        except OSError as error:
            self._close_files()
            raise SandboxFailure(f"bubblewrap did not start: {error}") from error
        for descriptor in (*passed, stdin_read, stdout_write, stderr_write):
            self._close(descriptor)
        self._open.append(process := os.pidfd_open(self._process.pid))
        self._listen({"end": process, "status": status_read, "stdout": stdout_read, "stderr": stderr_read}, stdin_write)

    def _stdin_of(self, program: Program) -> tuple[int, int | None]:
        """Open what becomes the program's stdin, and the other end of it where that is a pipe."""
        if program.channel is not None:
            stdin_read = program.channel.detach()
            self._open.append(stdin_read)
            return stdin_read, None
        if program.talks:
            self._talk, stdin_read = self._sockets()
            return stdin_read, None
        return self._pipe()

    def _listen(self, read: Mapping[str, int], stdin_write: int | None) -> None:
        """Register what the program and bubblewrap are read from by name, and what the program is written to."""
        for name, descriptor in read.items():
            self._selector.register(descriptor, selectors.EVENT_READ, name)
        if self._talk is not None:
            os.set_blocking(self._talk, False)
            self._selector.register(self._talk, selectors.EVENT_READ, "heard")
        elif stdin_write is not None:
            os.set_blocking(stdin_write, False)
            self._selector.register(stdin_write, selectors.EVENT_WRITE, "stdin")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        finally:
            self._close_files()

    def ask(self, line: bytes, max_bytes: int) -> bytes:
        """Write a line to the program's socket and wait for the line that it answers. Raises Ended, with the reason,
        when the program or its time is over first, or the answer is longer than max_bytes."""
        assert self._talk is not None, "the program has no socket"
        self._outgoing = memoryview(line + b"\n")
        self._most_heard = max_bytes
        with contextlib.suppress(KeyError):
            self._selector.modify(self._talk, selectors.EVENT_READ | selectors.EVENT_WRITE, "heard")
        self._watch(lambda: b"\n" in self._heard or len(self._heard) > max_bytes)
        answer, found, self._heard = self._heard.partition(b"\n")
        if len(answer) > max_bytes:
            self.stop("output")
            raise Ended(f"an answer of more than {max_bytes} bytes")
        if not found:
            raise Ended("no answer")
        return bytes(answer)

    def finish(self, beside: "Running | None" = None) -> RunRecord:
        """Wait for the program's end or a limit, then end what is left of it.

        beside: another program whose bytes and limits are looked after meanwhile; it may end when it likes.
        """
        self._watch(lambda: False, beside)
        seconds = time.monotonic() - self._started
        self._end()
        self._drain()
        if b"exit-code" not in self._status and self._limit is None:
            said = bytes(self._streams["stderr"]).decode(errors="replace").strip()[-500:]
            raise SandboxFailure(f"bubblewrap could not make a sandbox: {said or 'it said nothing'}")
        code = self._process.returncode
        ended_by = -code if code < 0 else code - 128 if 128 < code <= 128 + signal.SIGRTMAX else None
        stderr = bytes(self._streams["stderr"])
        return RunRecord(
            exit_code=code if ended_by is None else None,
            signal=ended_by,
            stdout=bytes(self._streams["stdout"]),
            stderr=stderr,
            limit=self._limit or self._limit_by_end(ended_by, stderr, seconds),
            seconds=seconds,
        )

    def stop(self, limit: Limit | None = None) -> None:
        """End the program now; `finish` then says what became of it."""
        if not self._over:
            self._over, self._limit = True, limit
            self._kill()

    def _watch(self, done: Callable[[], bool], beside: "Running | None" = None) -> None:
        """Move bytes until `done()`, the end, or a limit."""
        if beside is not None and not beside._over:
            self._selector.register(beside._selector.fileno(), selectors.EVENT_READ, beside)
        while not self._over and not done():
            wait = self._look()
            if beside is not None and not beside._over:
                wait = min(wait, beside._look())
            if self._over:
                return
            for key, events in self._selector.select(wait):
                if isinstance(key.data, Running):
                    key.data._handle_ready()
                    if key.data._over:
                        self._selector.unregister(key.fd)
                else:
                    self._handle(key, events)

    def _handle_ready(self) -> None:
        for key, events in self._selector.select(0):
            self._handle(key, events)

    def _look(self) -> float:
        """Compare with the limits that have to be looked at; return the seconds until the next look."""
        now = time.monotonic()
        deadline = self._started + self._limits.wall_seconds
        if now >= deadline:
            self.stop("wall")
        elif now >= self._next_look:
            if self._init is not None:
                if resident_bytes(self._init_pid) > self._limits.memory_bytes:
                    self.stop("memory")
                elif count_files(self._init_pid, self._popen_arguments) > self._limits.files:
                    self.stop("files")
            self._next_look = time.monotonic() + _WATCH_SECONDS
        return max(0.0, min(deadline, self._next_look) - now)

    def _handle(self, key: selectors.SelectorKey, events: int) -> None:
        if key.data == "end":
            self._over = True
            self._selector.unregister(key.fd)
        elif key.data == "stdin":
            if not self._write(key.fd):
                self._selector.unregister(key.fd)
                self._close(key.fd)
        elif key.data == "heard":
            if events & selectors.EVENT_WRITE and not self._write(key.fd):
                self._selector.modify(key.fd, selectors.EVENT_READ, "heard")
            if events & selectors.EVENT_READ:
                self._hear(key.fd)
        elif self._read(key.fd, key.data):
            self.stop("output")

    def _write(self, descriptor: int) -> bool:
        """Write to the program; return True if there is more to write."""
        try:
            self._outgoing = self._outgoing[os.write(descriptor, self._outgoing[:_CHUNK_BYTES]) :]
        except BlockingIOError:
            return True
        except (BrokenPipeError, ConnectionResetError):
            self._outgoing = self._outgoing[:0]
        return bool(self._outgoing)

    def _hear(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        self._heard += data
        if not data:
            self._selector.unregister(descriptor)  # it ends now, or it is waited for
        elif len(self._heard) > 2 * self._most_heard + _CHUNK_BYTES:
            self.stop("output")  # a program that writes unasked is not read without end

    def _read(self, descriptor: int, name: str) -> bool:
        """Read what is there; return True if it is more than the program may write."""
        try:
            data = os.read(descriptor, _CHUNK_BYTES)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(descriptor)
            return False
        if name == "status":
            self._status += data
            if self._init is None:
                self._find_init()
            return False
        stream = self._streams[name]
        room = self._limits.output_bytes - len(stream)
        stream += data[:room]
        return len(data) > room

    def _find_init(self) -> None:
        line, found, _ = self._status.partition(b"\n")
        if found:
            self._init_pid = json.loads(line)["child-pid"]
            # Killed before its first instruction: then there is nothing to hold.
            with contextlib.suppress(ProcessLookupError):
                self._init = os.pidfd_open(self._init_pid)
                self._open.append(self._init)
            os.write(self._start, b"!")

    def _kill(self) -> None:
        """Kill process 1 of the sandbox, and with it by the kernel's rule every other."""
        with contextlib.suppress(ProcessLookupError):
            if self._init is not None:
                signal.pidfd_send_signal(self._init, signal.SIGKILL)

    def _end(self) -> None:
        """Kill all and wait until they are gone."""
        self._over = True
        self._kill()
        if self._process.poll() is None:
            # The group: in its first moments bubblewrap has a child that nothing else ends.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_END_SECONDS)
        if self._init is not None and not _ends(self._init, _END_SECONDS):
            raise SandboxFailure(f"processes of a sandbox (process {self._init_pid}) outlive SIGKILL for 20 s")

    def _drain(self) -> None:
        """Read what was written before the end and not read yet."""
        while ready := [key for key, _ in self._selector.select(0) if key.data in ("status", "stdout", "stderr")]:
            if any(self._read(key.fd, key.data) for key in ready):
                return

    def _limit_by_end(self, ended_by: int | None, stderr: bytes, seconds: float) -> Limit | None:
        # A program that ignores SIGXCPU gets SIGKILL after one more second of CPU time.
        if ended_by == signal.SIGXCPU or (ended_by == signal.SIGKILL and seconds >= self._limits.cpu_seconds):
            return "cpu"
        if ended_by == signal.SIGXFSZ:
            return "file_size"
        last = stderr.rstrip().rpartition(b"\n")[2]
        if last.startswith(b"MemoryError") or b"std::bad_alloc" in last:
            return "memory"
        if b"[Errno 27]" in last or b"[Errno 28]" in last:
            return "file_size"
        if b"[Errno 11]" in last or b"can't start new thread" in last:
            return "processes"
        return None

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._open += ends
        return ends

    def _sockets(self) -> tuple[int, int]:
        ours, theirs = socket.socketpair()
        ends = ours.detach(), theirs.detach()
        self._open += ends
        return ends

    def _file_of(self, data: bytes) -> int:
        descriptor = os.memfd_create("seccomp")
        self._open.append(descriptor)
        os.write(descriptor, data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._open.remove(descriptor)
        os.close(descriptor)

    def _close_files(self) -> None:
        self._selector.close()
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()


def _ends(pidfd: int, seconds: float) -> bool:
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and all below it; pages that they share count for each. Gone ones count
    0.

    By each of its threads: one whose first thread has ended shows nothing of itself, and lives on.
    """
    total, waiting = 0, [pid]
    while waiting:
        largest = 0
        with contextlib.suppress(OSError):
            for thread in Path("/proc", str(waiting.pop()), "task").iterdir():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    waiting += map(int, (thread / "children").read_text(encoding="utf-8").split())
                    largest = max(largest, int((thread / "statm").read_text(encoding="utf-8").split()[1]))
        total += largest * _PAGE_BYTES
    return total


def count_files(pid: int, popen_arguments: dict[str, Any]) -> int:
    """Count the files, folders and links in the writable folders of the sandbox of process `pid`; 0 when it is gone.

    popen_arguments: of the sandbox's user. Root without CAP_SYS_PTRACE, as it is in most containers, may not look into
    another user's process; that user may.
    """
    with contextlib.suppress(OSError):
        for thread in Path("/proc", str(pid), "task").iterdir():
            counts = [_count_below(thread / "root", folder, popen_arguments) for folder in _FOLDERS]
            if any(counts):  # else a thread that has ended
                return sum(counts)
    return 0


def _count_below(root: Path, folder: str, popen_arguments: dict[str, Any]) -> int:
    inside = f"{root}{folder}"
    try:
        device, used = os.stat(inside).st_dev, os.statvfs(inside)
        count = used.f_files - used.f_ffree
    except PermissionError:
        try:
            device = int(_ask_stat(["--format", "%d", inside], popen_arguments))
            every, free = _ask_stat(["--file-system", "--format", "%c %d", inside], popen_arguments).split()
            count = int(every) - int(free)
        except ValueError:
            return 0
    except OSError:
        return 0
    # Before bubblewrap has made the sandbox, this is still the machine's own folder.
    return count if device != os.stat(folder).st_dev else 0


def _ask_stat(arguments: list[str], popen_arguments: dict[str, Any]) -> str:
    command = ["/usr/bin/stat", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        check=False,
        text=True,
        env={},
        cwd="/",
        **popen_arguments,
        encoding="utf-8",
        errors="replace",
    ).stdout
