"""Runs a program that nobody trusts, under bubblewrap, with limits, and says what became of it.

bubblewrap is started as an unprivileged user with an empty environment: as root it neither holds RLIMIT_NPROC nor keeps
/proc/sys shut, and its environment can be read from inside. docs/sandbox.md says what holds and what does not.
"""

import contextlib
import functools
import json
import os
import resource
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_rl.errors import Fault

Limit = Literal["wall", "cpu", "memory", "processes", "output", "file_size"]

# In no distribution's list of users: nothing else on the machine belongs to it.
UNPRIVILEGED_ID = 65533
# How often the memory of all processes of a sandbox together is looked at.
_WATCH_SECONDS = 0.05
# How long SIGKILL may take to empty a sandbox; it takes longer only where the kernel is stuck.
_END_SECONDS = 20.0
_CHUNK_BYTES = 65536
_PAGE_BYTES = resource.getpagesize()
# What a solution never needs; the last line is memory that no limit counts.
_DENIED_CALLS = """
ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp unshare setns mount umount2 move_mount open_tree fsopen
fsconfig fsmount fspick mount_setattr pivot_root chroot bpf perf_event_open userfaultfd keyctl add_key request_key
io_uring_setup io_uring_enter io_uring_register kexec_load init_module finit_module delete_module open_by_handle_at
name_to_handle_at personality acct quotactl swapon swapoff reboot syslog
memfd_create memfd_secret shmget msgget semget mq_open
"""
# bubblewrap's arguments, in this order; between _SYSTEM and _CLOSING come /proc, /dev and the tmpfs.
_ISOLATION = """
--unshare-user --unshare-all --as-pid-1 --uid 65534 --gid 65534 --hostname sandbox --die-with-parent --new-session
--cap-drop ALL --clearenv --setenv PATH /usr/bin:/bin --setenv HOME /tmp/w --setenv LANG C.UTF-8
"""
_SYSTEM = "--ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64"
_CLOSING = "--dir /tmp/w --chdir /tmp/w --disable-userns --remount-ro /dev --remount-ro /"
# Stands for the descriptors of one run.
_RUN_OPTIONS = "{run options}"
_HOW_TO_GET = (
    "Install it as root: `make install-sandbox`, or apt-get install -y --no-install-recommends bubblewrap (0.8.0 or "
    "newer). Or judge code on another machine: reward.code.endpoint = URL of a SandboxFusion server. "
    "Programs are never run without a sandbox"
)
_USER_NAMESPACES = (
    "Unprivileged user namespaces must be allowed: sysctl kernel.unprivileged_userns_clone=1, "
    "user.max_user_namespaces above 0, on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; in Docker "
    "--security-opt seccomp=unconfined --security-opt apparmor=unconfined"
)


class SandboxUnavailable(Fault):
    """This machine cannot hold hostile code; the message says why and what to do."""


class SandboxFailure(Fault):
    """The sandbox itself failed at one run; it says nothing about the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a run may use.

    wall_seconds: of the whole run. cpu_seconds: of each process.
    memory_bytes: of address space for each process, and of resident memory for all of them together (looked at every
        50 ms, so a fast program is a little over before it ends). The tmpfs comes on top.
    processes: and threads.
    output_bytes: of stdout, and the same of stderr.
    file_bytes: of one file. disk_bytes: of /tmp, a quarter of it of /dev/shm; both are memory.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1024**3
    processes: int = 32
    output_bytes: int = 1024**2
    file_bytes: int = 16 * 1024**2
    disk_bytes: int = 64 * 1024**2
    open_files: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"sandbox limit {name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A command inside of the sandbox.

    private_stdout: stdout is a socket, which no process of the sandbox can open by its /proc entry, as it can a pipe.
    """

    command: tuple[str, ...]
    stdin: bytes = b""
    private_stdout: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What became of a program.

    exit_code: None if a signal ended it. signal: its number, None after an exit; a program that exits with
        128 + N reads the same as one that died of signal N. The program is process 1 of its namespace, so a signal
        that it sends to itself does not end it; a fault does.
    limit: the limit it ran into, or None. "wall", "memory" (of all processes together), "output" and "cpu" are
        observed; otherwise it is what the last line of stderr says, which a program may make up.
    """

    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    limit: Limit | None
    seconds: float


class Runner(Protocol):
    """Where programs run: this machine's sandbox or an endpoint."""

    def run_python(self, source: str, stdin: bytes, limits: Limits) -> RunRecord: ...


@dataclass(frozen=True, slots=True)
class Identity:
    """The user that bubblewrap runs as; None: the one that we are."""

    user: int | None = field(default_factory=lambda: UNPRIVILEGED_ID if os.geteuid() == 0 else None)

    def popen_arguments(self) -> dict[str, Any]:
        return {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}


class Sandbox:
    """bubblewrap on this machine, proved by a run of its own when it is made. Threads may share one.

    python: interpreter for `run_python`, under /usr or in a prefix that every user may read; None looks for one.
    Raises SandboxUnavailable where a hostile program would not be held.
    """

    def __init__(self, python: str | None = None) -> None:
        if sys.platform != "linux":
            raise SandboxUnavailable(f"the code sandbox needs Linux, this is {sys.platform}. {_HOW_TO_GET}")
        bwrap = shutil.which("bwrap", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin")
        if bwrap is None:
            raise SandboxUnavailable(f"bubblewrap (bwrap) is not on this machine. {_HOW_TO_GET}")
        self._bwrap = bwrap
        self._identity = Identity()
        self.python, self._prefix = _find_python(python)
        self._filter = seccomp_filter()
        self._prove()

    @property
    def has_seccomp(self) -> bool:
        """False where pyseccomp or libseccomp2 is missing: one layer less, see docs/sandbox.md."""
        return self._filter is not None

    def run_python(self, source: str, stdin: bytes, limits: Limits) -> RunRecord:
        """Run `source` by an interpreter that sees its standard library only; stdout is private."""
        command = (self.python, "-I", "-S", "-X", "utf8", "-c", source)
        return self.run(Program(command=command, stdin=stdin, private_stdout=True), limits)

    def run(self, program: Program, limits: Limits) -> RunRecord:
        """Run it to its end or to a limit. When this returns no process of it is left.

        Call it from a thread that stays: bubblewrap ends when the thread that started it does. Raises SandboxFailure.
        """
        with _Run(self._arguments(program, limits), program, limits, self._identity, self._filter) as run:
            return run.finish()

    def _arguments(self, program: Program, limits: Limits) -> list[str]:
        # The program is process 1: bubblewrap's own would have neither the limits nor the filter, and a program of the
        # same user could take it over through /proc/1/mem.
        prefix = ["--ro-bind", self._prefix, self._prefix] if self._prefix else []
        limit_command = [
            "/usr/bin/prlimit",
            f"--nproc={limits.processes}",
            f"--as={limits.memory_bytes}",
            f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}",
            f"--fsize={limits.file_bytes}",
            f"--nofile={limits.open_files}",
            "--core=0",
            "--",
        ]
        shm_bytes = max(limits.disk_bytes // 4, _PAGE_BYTES)
        mounts = f"--size {shm_bytes} --tmpfs /dev/shm --size {limits.disk_bytes} --tmpfs /tmp".split()
        return [
            *(self._bwrap, *_ISOLATION.split(), *_SYSTEM.split(), *prefix, "--proc", "/proc", "--dev", "/dev", *mounts),
            *(*_CLOSING.split(), _RUN_OPTIONS, "--", *limit_command, *program.command),
        ]

    def _prove(self) -> None:
        """A run that looks out for what must not be there."""
        source = (
            "import os\n"
            "assert os.getuid() == 65534 and os.getpid() == 1, 'not alone'\n"
            "assert not {'root', 'home', 'etc', 'var', 'work'} & set(os.listdir('/')), 'host files'\n"
            "assert set(os.environ) <= {'PATH', 'HOME', 'LANG', 'LC_CTYPE', 'PWD'}, 'environment'\n"
            "assert os.listdir('/tmp') == ['w'], 'host files in /tmp'\n"
            "try:\n    os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY)\nexcept OSError:\n    print('held')\n"
        )
        try:
            record = self.run_python(source, b"", Limits(wall_seconds=30.0, processes=8))
        except SandboxFailure as failure:
            raise SandboxUnavailable(f"{failure}. {_USER_NAMESPACES}. {_HOW_TO_GET}") from failure
        if record.stdout != b"held\n":
            said = record.stderr.decode(errors="replace")[-500:].strip() or f"exit code {record.exit_code}"
            raise SandboxUnavailable(
                f"the sandbox's own check with {self.python} failed: {said}. Give a Python that every user may read "
                f"(apt-get install -y python3). {_HOW_TO_GET}"
            )


@functools.cache
def seccomp_filter() -> bytes | None:
    """A BPF program that denies what a solution never needs, or None without pyseccomp or libseccomp2."""
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError):
        return None
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ALLOW)
    denied = pyseccomp.ERRNO(1)
    for name in _DENIED_CALLS.split():
        # A name that this libseccomp does not know is one that its kernel headers did not have either.
        with contextlib.suppress(ValueError, OSError, RuntimeError):
            rules.add_rule(denied, name)
    rules.add_rule(denied, "socket", pyseccomp.Arg(0, pyseccomp.NE, socket.AF_UNIX))
    # glibc falls back to clone, whose flags can be looked at.
    rules.add_rule(pyseccomp.ERRNO(38), "clone3")
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        rules.add_rule(denied, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    # TIOCSTI puts characters into a terminal's input.
    rules.add_rule(denied, "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, 0xFFFFFFFF, 0x5412))
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as reader:
        with open(write_end, "wb") as writer:
            rules.export_bpf(writer)
        return reader.read()


class _Run:
    """One sandbox: its processes and file descriptors, ended and closed on the way out."""

    def __init__(
        self, arguments: list[str], program: Program, limits: Limits, identity: Identity, bpf: bytes | None
    ) -> None:
        self._limits = limits
        self._started = time.monotonic()
        self._init: int | None = None  # pidfd of the sandbox's process 1
        self._init_pid = 0
        self._status = bytearray()
        self._streams = {"stdout": bytearray(), "stderr": bytearray()}
        self._open: list[int] = []
        self._selector = selectors.DefaultSelector()
        status_read, status_write = self._pipe()
        stdin_read, stdin_write = self._pipe()
        stderr_read, stderr_write = self._pipe()
        if program.private_stdout:
            ours, theirs = socket.socketpair()
            stdout_read, stdout_write = ours.detach(), theirs.detach()
            self._open += [stdout_read, stdout_write]
        else:
            stdout_read, stdout_write = self._pipe()
        # The sandbox waits until we hold its process 1, so that no other process can be taken for it later.
        start_read, self._start = self._pipe()
        passed = [status_write, start_read]
        options = ["--json-status-fd", str(status_write), "--block-fd", str(start_read)]
        if bpf is not None:
            passed.append(self._file_of(bpf))
            options += ["--seccomp", str(passed[-1])]
        place = arguments.index(_RUN_OPTIONS)
        try:
            self._process = subprocess.Popen(
                [*arguments[:place], *options, *arguments[place + 1 :]],
                stdin=stdin_read,
                stdout=stdout_write,
                stderr=stderr_write,
                env={},
                cwd="/",
                pass_fds=passed,
                start_new_session=True,
                **identity.popen_arguments(),
            )
        except OSError as error:
            self._close_files()
            raise SandboxFailure(f"bubblewrap did not start: {error}") from error
        for descriptor in (*passed, stdin_read, stdout_write, stderr_write):
            self._close(descriptor)
        self._stdin = memoryview(program.stdin)
        self._status_read, self._stdin_write = status_read, stdin_write
        os.set_blocking(stdin_write, False)
        self._selector.register(status_read, selectors.EVENT_READ, "status")
        self._selector.register(stdout_read, selectors.EVENT_READ, "stdout")
        self._selector.register(stderr_read, selectors.EVENT_READ, "stderr")
        self._selector.register(stdin_write, selectors.EVENT_WRITE, "stdin")

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        finally:
            self._close_files()

    def finish(self) -> RunRecord:
        limit = self._watch()
        seconds = time.monotonic() - self._started
        self._end()
        self._drain()
        if b"exit-code" not in self._status and limit is None:
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
            limit=limit or self._limit_by_end(ended_by, stderr, seconds),
            seconds=seconds,
        )

    def _watch(self) -> Limit | None:
        """Move bytes until bubblewrap has ended; the limit that ended the watching, if one did."""
        process = os.pidfd_open(self._process.pid)
        self._open.append(process)
        self._selector.register(process, selectors.EVENT_READ, "end")
        deadline = self._started + self._limits.wall_seconds
        next_look = self._started + _WATCH_SECONDS
        while True:
            now = time.monotonic()
            if now >= deadline:
                return "wall"
            if now >= next_look:
                if self._init is not None and resident_bytes(self._init_pid) > self._limits.memory_bytes:
                    return "memory"
                next_look = time.monotonic() + _WATCH_SECONDS
            for key, _ in self._selector.select(max(0.0, min(deadline, next_look) - now)):
                if key.data == "end":
                    return None
                if key.data == "stdin":
                    self._write()
                elif self._read(key.fd, key.data):
                    return "output"

    def _write(self) -> None:
        try:
            self._stdin = self._stdin[os.write(self._stdin_write, self._stdin[:_CHUNK_BYTES]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._stdin = self._stdin[:0]
        if not self._stdin:
            self._selector.unregister(self._stdin_write)
            self._close(self._stdin_write)

    def _read(self, descriptor: int, name: str) -> bool:
        """Take what is there; True if it is more than the program may write."""
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

    def _end(self) -> None:
        """Kill process 1 of the sandbox, and with it by the kernel's rule every other, and wait until all are gone."""
        with contextlib.suppress(ProcessLookupError):
            if self._init is not None:
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(_END_SECONDS)
        if self._init is not None and not _ends(self._init, _END_SECONDS):
            raise SandboxFailure(f"processes of a sandbox (process {self._init_pid}) outlive SIGKILL for 20 s")

    def _drain(self) -> None:
        """What was written before the end and not read yet."""
        while ready := [key for key, _ in self._selector.select(0) if key.data in ("status", "stdout", "stderr")]:
            if any(self._read(key.fd, key.data) for key in ready):
                return

    def _limit_by_end(self, ended_by: int | None, stderr: bytes, seconds: float) -> Limit | None:
        # Who ignores SIGXCPU gets SIGKILL a second of CPU time later.
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
    """Resident memory of a process and all below it; pages that they share count for each. Gone ones count 0."""
    total, waiting = 0, [pid]
    while waiting:
        here = Path("/proc", str(waiting.pop()))
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int((here / "statm").read_text().split()[1]) * _PAGE_BYTES
            for thread in (here / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
    return total


def _find_python(wanted: str | None) -> tuple[str, str | None]:
    """An interpreter and the directory to be shown inside for it, None where it lies below /usr."""
    ours = getattr(sys, "_base_executable", None) or sys.executable
    for path in [wanted] if wanted else ["/usr/bin/python3", "/usr/local/bin/python3", ours]:
        if os.access(path, os.X_OK):
            real = os.path.realpath(path)
            return real, None if real.startswith("/usr/") else str(Path(real).parents[1])
    raise SandboxUnavailable(
        f"no Python for the sandbox at {wanted or '/usr/bin/python3'}: apt-get install -y python3, or name another"
    )
