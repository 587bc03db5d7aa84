"""Runs a program that nobody trusts, under bubblewrap, with limits, and says what became of it.

bubblewrap is started as an unprivileged user with an empty environment: as root it neither holds RLIMIT_NPROC nor keeps
/proc/sys shut, and its environment can be read from inside. docs/sandbox.md says what holds and what does not.
"""

import ast
import contextlib
import functools
import importlib.util
import os
import resource
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.errors import Fault
from megatron_rl.reward.sandbox_run import Limits, Program, Running, RunRecord, SandboxFailure

# In no distribution's list of users: nothing else on the machine belongs to it.
UNPRIVILEGED_ID = 65533
# A solution never needs these calls. Those in the last line get memory that no limit counts.
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
# The training's numpy is mounted here for an interpreter that has none.
_PACKAGES = "/packages"
# Debian's numpy finds its BLAS through links of these names.
_ALTERNATIVES = Path("/etc/alternatives")
# All that a program may find there; Python itself adds LC_CTYPE.
_ENVIRONMENT = {"PATH", "HOME", "LANG", "LC_CTYPE", "PWD"}
_HOW_TO_GET = (
    "Install it as root: `make install-sandbox`, or apt-get install -y --no-install-recommends bubblewrap (0.8.0 or "
    "newer). Or judge code on another machine: reward.code.endpoint = URL of a SandboxFusion server. "
    "Programs are never run without a sandbox"
)
_NO_SECCOMP = (
    "the code sandbox has no seccomp filter, because {reason}: programs could reach more of the kernel, and take "
    "memory that no limit counts. Install pip's pyseccomp and the system's libseccomp2 (`make install-sandbox`, or "
    "apt-get install -y --no-install-recommends libseccomp2), or accept it: reward.code.allow_without_seccomp = true"
)
_USER_NAMESPACES = (
    "Unprivileged user namespaces must be allowed: sysctl kernel.unprivileged_userns_clone=1, "
    "user.max_user_namespaces above 0, on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; in Docker "
    "--security-opt seccomp=unconfined --security-opt apparmor=unconfined"
)


class SandboxUnavailable(Fault):
    """Says that this machine cannot hold hostile code; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Names the user that bubblewrap runs as; None: the one that we are."""

    user: int | None = field(default_factory=lambda: UNPRIVILEGED_ID if os.geteuid() == 0 else None)

    def popen_arguments(self) -> dict[str, Any]:
        return {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}


class Sandbox:
    """Runs programs under bubblewrap on this machine. A run of its own proves it when it is made. Threads may share
    one.

    python: interpreter for programs, under /usr or in a prefix that every user may read; None looks for one.
    packages: where that interpreter has packages, which programs may import.
    Raises SandboxUnavailable where a hostile program would not be held, which includes a missing seccomp unless
    `allow_without_seccomp`.
    """

    def __init__(self, python: str | None = None, allow_without_seccomp: bool = False) -> None:
        if sys.platform != "linux":
            raise SandboxUnavailable(f"the code sandbox needs Linux, this is {sys.platform}. {_HOW_TO_GET}")
        bwrap = shutil.which("bwrap", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin")
        if bwrap is None:
            raise SandboxUnavailable(f"bubblewrap (bwrap) is not on this machine. {_HOW_TO_GET}")
        self._bwrap = bwrap
        self._identity = Identity()
        self.python, self._prefix = _find_python(python)
        self._filter = seccomp_filter()
        if self._filter is None and not allow_without_seccomp:
            raise SandboxUnavailable(_NO_SECCOMP.format(reason=_missing_for_seccomp()))
        self.packages: tuple[str, ...] = ()
        self._numpy = _blas_links()
        version = self._prove()
        self.has_numpy = version is None or self._show_numpy(version)

    @property
    def has_seccomp(self) -> bool:
        """Tell whether the sandbox has a seccomp filter. False only by `allow_without_seccomp`: one layer less, see
        docs/sandbox.md."""
        return self._filter is not None

    @property
    def description(self) -> str:
        """Say which layers hold, for the log of a run."""
        user = "an unprivileged user" if self._identity.user is not None else "this user"
        seccomp = "a seccomp filter" if self.has_seccomp else "NO seccomp filter (reward.code.allow_without_seccomp)"
        return (
            f"bubblewrap as {user}: namespaces of their own for processes, files, network, users; no capabilities; "
            f"{seccomp}; limits on time, memory, processes, files, output. Programs by {self.python}, "
            f"{'with' if self.has_numpy else 'without'} numpy"
        )

    def python_command(self, source: str) -> tuple[str, ...]:
        """Return the command of an interpreter that runs `source` with its standard library, and packages once they are
        in sys.path."""
        return (self.python, "-I", "-S", "-X", "utf8", "-c", source)

    def run_python(self, source: str, stdin: bytes, limits: Limits) -> RunRecord:
        """Run `source` by an interpreter that sees its standard library only; stdout is private."""
        return self.run(Program(command=self.python_command(source), stdin=stdin, private_stdout=True), limits)

    def run(self, program: Program, limits: Limits) -> RunRecord:
        """Run a program to its end or to a limit. When this returns no process of it is left. Raises SandboxFailure."""
        with self.start(program, limits) as run:
            return run.finish()

    def start(self, program: Program, limits: Limits) -> Running:
        """Start a program, for `with`. Call it from a thread that stays: bubblewrap ends when the thread that started
        it does."""
        return Running(
            lambda options: self._arguments(program, limits, options),
            program,
            limits,
            self._identity.popen_arguments(),
            self._filter,
        )

    def _arguments(self, program: Program, limits: Limits, run_options: Sequence[str]) -> list[str]:
        # The program is process 1: bubblewrap's own would have neither the limits nor the filter, and a program of the
        # same user could take it over through /proc/1/mem.
        prefix = ["--ro-bind", self._prefix, self._prefix] if self._prefix else []
        if program.numpy:
            prefix += self._numpy
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
        shm_bytes = max(limits.disk_bytes // 4, resource.getpagesize())
        memory = f"--size {shm_bytes} --tmpfs /dev/shm --size {limits.disk_bytes} --tmpfs /tmp"
        return [
            self._bwrap,
            *_ISOLATION.split(),
            *_SYSTEM.split(),
            *prefix,
            *f"--proc /proc --dev /dev {memory}".split(),
            *_CLOSING.split(),
            *run_options,
            "--",
            *limit_command,
            *program.command,
        ]

    def _show_numpy(self, version: tuple[int, ...]) -> bool:
        """Show programs the training's numpy where that is for this version of Python and works there."""
        found = importlib.util.find_spec("numpy")
        if found is None or not found.submodule_search_locations or version != sys.version_info[:2]:
            return False
        folder = Path(found.submodule_search_locations[0])
        before = self._numpy
        for path in (folder, folder.with_name("numpy.libs")):
            if path.is_dir():
                self._numpy = [*self._numpy, "--ro-bind", str(path), f"{_PACKAGES}/{path.name}"]
        source = f"import sys\nsys.path.append({_PACKAGES!r})\nimport numpy"
        try:
            program = Program(command=self.python_command(source), numpy=True)
            works = self.run(program, Limits(wall_seconds=30.0)).exit_code == 0
        except SandboxFailure:  # the folder is not for everybody
            works = False
        if works:
            self.packages = (*self.packages, _PACKAGES)
        else:
            self._numpy = before
        return works

    def _prove(self) -> tuple[int, ...] | None:
        """Run a program that looks for what must not be there. Return the version of a Python without numpy, else
        None."""
        source = (
            "import os, site, sys\n"
            "assert os.getuid() == 65534 and os.getpid() == 1, 'not alone'\n"
            "assert not {'root', 'home', 'etc', 'var', 'work'} & set(os.listdir('/')), 'host files'\n"
            f"assert set(os.environ) <= {_ENVIRONMENT!r}, 'environment'\n"
            "assert os.listdir('/tmp') == ['w'], 'host files in /tmp'\n"
            "before = set(sys.path)\n"
            "site.addsitepackages(None)\n"
            "try:\n    os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY)\n"
            "except OSError: pass\n"
            "else: sys.exit('/proc/sys can be written')\n"
            "import importlib.util\n"
            "has_numpy = importlib.util.find_spec('numpy') is not None\n"
            "print(ascii(([path for path in sys.path if path not in before], has_numpy, sys.version_info[:2])))\n"
        )
        try:
            record = self.run_python(source, b"", Limits(wall_seconds=30.0, processes=8))
        except SandboxFailure as failure:
            raise SandboxUnavailable(f"{failure}. {_USER_NAMESPACES}. {_HOW_TO_GET}") from failure
        try:
            packages, has_numpy, version = ast.literal_eval(record.stdout.decode())
        except (ValueError, SyntaxError):
            said = record.stderr.decode(errors="replace")[-500:].strip() or f"exit code {record.exit_code}"
            raise SandboxUnavailable(
                f"the sandbox's own check with {self.python} failed: {said}. Give a Python that every user may read "
                f"(apt-get install -y python3). {_HOW_TO_GET}"
            ) from None
        self.packages = tuple(map(str, packages))
        return None if has_numpy else version


def _blas_links() -> list[str]:
    """Return options that make anew the links by which Debian's numpy finds its BLAS: nothing else of /etc is there."""
    links = [*_ALTERNATIVES.glob("libblas*"), *_ALTERNATIVES.glob("liblapack*")]
    targets = [(os.path.realpath(link), str(link)) for link in links]
    return [part for pair in targets if pair[0].startswith("/usr/") for part in ("--symlink", *pair)]


@functools.cache
def seccomp_filter() -> bytes | None:
    """Return a BPF program that denies what a solution never needs, or None without pyseccomp or libseccomp2."""
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


def _missing_for_seccomp() -> str:
    if importlib.util.find_spec("pyseccomp") is None:
        return "the Python package pyseccomp is not installed"
    return "the system's libseccomp cannot be loaded"


def _find_python(wanted: str | None) -> tuple[str, str | None]:
    """Return an interpreter and the directory to be shown inside for it, None where it lies below /usr."""
    ours = getattr(sys, "_base_executable", None) or sys.executable
    for path in [wanted] if wanted else ["/usr/bin/python3", "/usr/local/bin/python3", ours]:
        if os.access(path, os.X_OK):
            real = os.path.realpath(path)
            return real, None if real.startswith("/usr/") else str(Path(real).parents[1])
    raise SandboxUnavailable(
        f"no Python for the sandbox at {wanted or '/usr/bin/python3'}: apt-get install -y python3, or name another"
    )
