"""Tests programs that try to escape or to take everything: each is held and leaves nothing behind.

Every test runs as the user that runs the tests and, where that is root, as an ordinary user too.
"""

import contextlib
import os
import signal
import socket
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from sandboxed import USERS, as_user, why_not
from until import wait_until

from megatron_rl.reward import sandbox as sandbox_module
from megatron_rl.reward.code_runners import InSandbox
from megatron_rl.reward.plain_data import pack, unpack
from megatron_rl.reward.sandbox import Identity, Sandbox, SandboxUnavailable
from megatron_rl.reward.sandbox_run import Ended, Limits, Program, SandboxFailure

LIMITS = Limits(wall_seconds=240.0, cpu_seconds=5, memory_bytes=256 * 1024**2, processes=16)
MISSING = why_not(Sandbox)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def left_over() -> list[str]:
    """Return the command lines of sandboxed processes that these tests started."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if MARK in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


MARK = f"sandbox-test-{os.getpid()}"


def run(user: int, source: str, limits: Limits = LIMITS, stdin: bytes = b""):
    """Run a program and return its record. Check that nothing of it is left and that the next program runs."""
    source = f"# {MARK}\n" + textwrap.dedent(source)

    def work():
        box = Sandbox()
        record = box.run_python(source, stdin, limits)
        leftovers = left_over()
        after = box.run_python("print(6 * 7)", b"", LIMITS)
        return record, leftovers, after

    record, leftovers, after = as_user(user, work)
    assert leftovers == []
    assert (after.exit_code, after.stdout, after.limit) == (0, b"42\n", None)
    return record


@pytest.fixture(params=USERS, ids=lambda user: "root" if user == 0 else "ordinary")
def user(request):
    return request.param


def test_a_program_gets_its_input_and_the_record_tells_what_it_did(user):
    record = run(
        user, "import sys\nprint(sys.stdin.read()[::-1])\nprint('no', file=sys.stderr)\nsys.exit(3)", stdin=b"abc"
    )
    assert (record.exit_code, record.signal, record.limit) == (3, None, None)
    assert (record.stdout, record.stderr) == (b"cba\n", b"no\n")
    assert 0 < record.seconds < LIMITS.wall_seconds


def test_input_and_output_of_megabytes_pass_while_both_flow(user):
    text = b"0123456789abcdef" * 40_000
    record = run(user, "import sys\nfor line in sys.stdin: print(line, end='')", stdin=text)
    assert record.stdout == text


def test_a_program_that_dies_of_a_signal_is_told_by_its_number(user):
    record = run(user, "import ctypes\nctypes.string_at(0)")
    assert (record.exit_code, record.signal) == (None, signal.SIGSEGV)


def test_a_fork_bomb_stays_within_its_number_of_processes(user):
    record = run(
        user,
        "import os, time\nwhile True:\n  try: os.fork()\n  except OSError: time.sleep(.05)",
        replace(LIMITS, wall_seconds=1.0),
    )
    assert record.limit == "wall"


def test_many_processes_and_threads_are_refused_at_the_limit(user):
    source = """
        import os, threading, time
        count = 0
        try:
            while count < 400:
                if os.fork() == 0: time.sleep(60)
                count += 1
        except OSError as error:
            print(error.errno, count)
    """
    errno, count = map(int, run(user, source).stdout.split())
    assert errno == 11
    assert count < LIMITS.processes
    threads = """
        import threading, time
        for i in range(400): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """
    assert run(user, threads).limit == "processes"


def test_ten_gigabytes_in_one_process_are_refused(user):
    record = run(user, "x = b'x' * 10**10")
    assert record.limit == "memory"
    assert record.exit_code == 1


def test_memory_of_many_processes_together_is_limited_too(user):
    source = """
        import os, time
        for i in range(10):
            if os.fork() == 0:
                x = b'x' * (100 * 1024**2)
                time.sleep(10**6)
        time.sleep(10**6)
    """
    assert run(user, source).limit == "memory"


def test_memory_that_is_neither_address_space_nor_a_file_is_refused(user):
    source = """
        import ctypes, os, mmap
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            os.memfd_create('x'); print('memfd')
        except PermissionError: pass
        if libc.shmget(0, 1 << 20, 0o1600) >= 0: print('shmget')
    """
    if not Sandbox().has_seccomp:
        pytest.skip("seccomp needs pyseccomp and libseccomp2")
    assert run(user, source).stdout == b""


def test_endless_output_ends_the_program_at_the_limit_on_either_stream(user):
    for stream in ("stdout", "stderr"):
        record = run(user, f"import sys\nwhile True: sys.{stream}.write('x' * 4096)")
        assert record.limit == "output"
        assert len(getattr(record, stream)) == LIMITS.output_bytes


def test_an_endless_loop_ends_by_cpu_time_and_a_sleep_by_the_wall_clock(user):
    record = run(user, "while True: pass", replace(LIMITS, cpu_seconds=1))
    assert record.limit == "cpu"
    record = run(user, "import time\ntime.sleep(10**6)", replace(LIMITS, wall_seconds=0.3))
    assert record.limit == "wall"


def test_a_program_that_ignores_signals_ends_all_the_same(user):
    source = """
        import signal, time
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        time.sleep(60)
    """
    assert run(user, source, replace(LIMITS, wall_seconds=0.5)).limit == "wall"


def test_files_without_end_are_refused_one_by_one_and_together(user):
    record = run(user, "f = open('x', 'w')\nwhile True: f.write('x' * 65536)")
    assert record.limit == "file_size"
    source = """
        import os
        written = 0
        for folder in ('/tmp', '/dev/shm'):
            try:
                for i in range(100):
                    with open(f'{folder}/{i}', 'wb', buffering=0) as f:
                        for _ in range(8): written += f.write(b'x' * 1024**2)
            except OSError as error:
                print(error.errno, written)
        for folder in ('/', '/dev', '/usr', '/proc', '/tmp/../dev/..'):
            try: open(folder + '/x', 'w'); print('wrote into', folder)
            except OSError: pass
    """
    first, second, *rest = run(user, source).stdout.splitlines()
    assert rest == []
    assert first.startswith(b"28 ")
    assert int(second.split()[1]) <= LIMITS.disk_bytes * 5 // 4


# More than the limit, and then it waits: who looks at it may be late.
EMPTY_FILES = """
    import os, time
    for i in range(20_000):
        os.close(os.open(f'/tmp/w/{i}', os.O_CREAT))
    print('made them', flush=True)
    time.sleep(SECONDS)
"""


def test_empty_files_and_folders_without_end_end_the_program(user):
    assert run(user, EMPTY_FILES.replace("SECONDS", "10**6")).limit == "files"
    folders = "import os, time\nfor i in range(20_000): os.mkdir(f'/dev/shm/{i}')\ntime.sleep(10**6)"
    assert run(user, folders).limit == "files"
    few = run(user, EMPTY_FILES.replace("20_000", "3_000").replace("SECONDS", "0.2"))
    assert (few.limit, few.stdout) == (None, b"made them\n")


def test_a_process_whose_first_thread_has_ended_is_looked_at_all_the_same(user):
    memory = """
        import ctypes, os, threading, time
        def eat():
            time.sleep(0.2)
            data = bytearray(150 << 20)
            for i in range(0, len(data), 4096): data[i] = 1
            time.sleep(10**6)
        for _ in range(3):
            if os.fork() == 0:
                threading.Thread(target=eat).start()
                ctypes.CDLL(None).syscall(60, 0)  # exit: of this thread alone
        time.sleep(10**6)
    """
    assert run(user, memory).limit == "memory"
    files = """
        import ctypes, os, threading, time
        def fill():
            time.sleep(0.1)
            for i in range(20_000): os.close(os.open(f'/tmp/w/{i}', os.O_CREAT))
            time.sleep(10**6)
        threading.Thread(target=fill).start()
        ctypes.CDLL(None).syscall(60, 0)
    """
    assert run(user, files).limit == "files"


@pytest.mark.skipif(os.geteuid() != 0, reason="shows what root does")
def test_root_without_the_right_to_look_into_processes_counts_files_as_the_sandboxes_user(monkeypatch):
    stat = os.stat

    def refuse(path, *arguments, **keywords):
        if "/root/" in str(path):
            raise PermissionError(path)
        return stat(path, *arguments, **keywords)

    monkeypatch.setattr(os, "stat", refuse)
    assert run(0, EMPTY_FILES.replace("SECONDS", "10**6")).limit == "files"


def test_no_file_of_the_host_can_be_read_or_seen(user, tmp_path):
    secret = Path("/tmp") / f"{MARK}-secret"
    secret.write_text("secret of the host")
    secret.chmod(0o644)
    source = f"""
        import os
        paths = ['/etc/passwd', '/etc/shadow', '/root', '/home', '/var', {str(secret)!r}, '/oldroot', '/newroot',
                 {str(Path(__file__).parent)!r}, '/proc/1/root/etc/passwd', '/proc/1/cwd/etc/passwd',
                 '/proc/self/root/etc/passwd',
                 '/dev/sda', '/dev/vda', '/dev/mem', '/dev/kmsg', '/sys', '/run']
        for path in paths:
            if os.path.exists(path): print(path)
        print(sorted(os.listdir('/')))
    """
    try:
        record = run(user, source)
    finally:
        secret.unlink()
    assert record.stdout.decode().split("\n", 1)[0] == str(["bin", "dev", "lib", "lib64", "proc", "tmp", "usr"])


def test_the_environment_of_the_host_is_in_none_of_the_processes_that_can_be_seen(user, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    source = """
        import os
        print(sorted(os.environ))
        for pid in filter(str.isdigit, os.listdir('/proc')):
            print(pid, open(f'/proc/{pid}/environ').read().count('hunter'), len(os.listdir(f'/proc/{pid}/task')))
    """
    first, *processes = run(user, source).stdout.decode().splitlines()
    assert set(eval(first)) <= {"PATH", "HOME", "LANG", "PWD", "LC_CTYPE"}
    assert [line.split()[1:] for line in processes] == [["0", "1"]] * len(processes)
    assert len(processes) == 1


def test_neither_loopback_nor_abstract_sockets_of_the_host_can_be_reached(user):
    name = f"\0{MARK}"
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as abstract:
        server.bind(("127.0.0.1", 0))
        server.listen()
        abstract.bind(name)
        abstract.listen()
        source = f"""
            import socket
            for family, address in ((socket.AF_INET, {server.getsockname()!r}), (socket.AF_UNIX, {name!r}),
                                    (socket.AF_INET, ('10.0.0.1', 53)), (socket.AF_INET6, ('::1', 80))):
                try:
                    s = socket.socket(family, socket.SOCK_STREAM)
                    s.settimeout(1)
                    s.connect(address)
                    print('reached', address)
                except OSError: pass
            print('end')
        """
        assert run(user, source).stdout == b"end\n"


def test_no_process_outside_can_be_signalled_and_killing_everything_inside_is_harmless(user):
    source = f"""
        import os, signal
        for pid in [{os.getpid()}, {os.getppid()}]:
            try: os.kill(pid, 0); print('saw', pid)
            except ProcessLookupError: pass
        print('ppid', os.getppid(), flush=True)
        if os.fork() == 0:
            os.kill(1, signal.SIGKILL)
            os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.wait()
        try: os.kill(-1, signal.SIGKILL)
        except ProcessLookupError: print('nobody else')
    """
    record = run(user, source)
    assert record.stdout == b"ppid 0\nnobody else\n"


def test_daemons_do_not_outlive_the_program(user):
    source = """
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork(): os._exit(0)
                for fd in range(3): os.close(fd)
                time.sleep(10**6)
        print('done', flush=True)
    """
    record = run(user, source)
    assert (record.exit_code, record.stdout) == (0, b"done\n")
    assert record.limit is None, "nobody waited for the daemons"


def test_symlinks_and_proc_lead_nowhere(user):
    source = """
        import os
        os.symlink('/proc/1/root/../../../../etc/passwd', '/tmp/w/link')
        os.symlink('/../../root', '/tmp/w/up')
        for path in ('/tmp/w/link', '/tmp/w/up/.bashrc'):
            try: open(path); print('read', path)
            except OSError: pass
        for path in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/proc/1/mem', '/proc/1/oom_score_adj',
                     '/proc/sys/kernel/hostname', '/proc/sys/vm/drop_caches', '/usr/bin/python3'):
            try: os.close(os.open(path, os.O_WRONLY)); print('write', path)
            except OSError: pass
        for pid in filter(str.isdigit, os.listdir('/proc')):
            for fd in os.listdir(f'/proc/{pid}/fd') if os.access(f'/proc/{pid}/fd', os.R_OK) else ():
                target = os.readlink(f'/proc/{pid}/fd/{fd}')
                if target.startswith('/') and not target.startswith(('/proc', '/dev/null')): print('file', target)
        print('end')
    """
    writable = set(run(user, source).stdout.decode().split("\n")) - {"end", ""}
    # Process 1 is the program itself.
    assert writable <= {"write /proc/1/oom_score_adj", "write /proc/1/mem"}


def test_no_process_of_the_sandbox_is_without_its_limits(user):
    source = """
        import os, resource
        pids = list(filter(str.isdigit, os.listdir('/proc')))
        text = [open(f'/proc/{pid}/limits').read().split('Max processes')[1].split()[0] for pid in pids]
        filters = [open(f'/proc/{pid}/status').read().split('Seccomp:')[1].split()[0] for pid in pids]
        print(len(pids), *text, *filters)
    """
    expected = "2" if as_user(user, lambda: Sandbox().has_seccomp) else "0"
    assert run(user, source).stdout.decode().split() == ["1", str(LIMITS.processes), expected]


def test_ptrace_and_the_memory_of_others_are_refused(user):
    source = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        child = os.fork()
        if child == 0:
            import time; time.sleep(10**6)
        print(libc.ptrace(16, child, 0, 0), libc.ptrace(0, 0, 0, 0))
    """
    if not Sandbox().has_seccomp:
        pytest.skip("seccomp needs pyseccomp and libseccomp2")
    assert run(user, source).stdout.split() == [b"-1", b"-1"]


def test_namespaces_cannot_be_nested_and_nothing_can_be_mounted(user):
    source = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        for flag in (0x10000000, 0x10000000 | 0x20000, 0x20000, 0x40000000, 0x20000000, 0x08000000):
            if libc.unshare(flag) == 0: print('unshared', hex(flag))
        if libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0: print('mounted')
        if libc.mount(b'/', b'/', 0, 32 | 4096, 0) == 0: print('remounted')
        if libc.chroot(b'/tmp') == 0: print('chroot')
        if libc.setuid(0) == 0: print('setuid')
        if libc.sethostname(b'x', 1) == 0: print('hostname')
        print(int(open('/proc/self/status').read().split('CapEff:')[1].split()[0], 16))
    """
    assert run(user, source).stdout == b"0\n"


def test_the_layers_below_hold_without_seccomp(user, monkeypatch):
    monkeypatch.setattr(sandbox_module, "seccomp_filter", lambda: None)
    with pytest.raises(
        SandboxUnavailable, match=r"no seccomp filter, because .*reward.code.allow_without_seccomp = true"
    ):
        Sandbox()
    source = """
        import ctypes, socket
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x10000000) == 0: print('user namespace')
        if libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0: print('mounted')
        try: socket.create_connection(('127.0.0.1', 22), 1); print('connected')
        except OSError: pass
        print('end')
    """

    def work():
        box = Sandbox(allow_without_seccomp=True)
        assert "NO seccomp" in box.description
        return box.run_python(textwrap.dedent(source), b"", LIMITS)

    assert as_user(user, work).stdout == b"end\n"


def test_what_one_program_leaves_in_its_files_the_next_does_not_see(user):
    def work():
        box = Sandbox()
        box.run_python("for p in ('/tmp/a', '/tmp/w/b', '/dev/shm/c'): open(p, 'w').write('x')", b"", LIMITS)
        return box.run_python(
            "import os\nprint(os.listdir('/tmp'), os.listdir('/tmp/w'), os.listdir('/dev/shm'))", b"", LIMITS
        )

    assert as_user(user, work).stdout == b"['w'] [] []\n"


def test_threads_run_their_programs_side_by_side(user):
    def work():
        box = Sandbox()
        records = {}
        threads = [
            threading.Thread(target=lambda i=i: records.update({i: box.run_python(f"print({i})", b"", LIMITS)}))
            for i in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {i: record.stdout for i, record in records.items()}

    assert as_user(user, work) == {i: b"%d\n" % i for i in range(6)}


def test_a_sandbox_ends_with_the_process_that_started_it(user):
    def work():
        pid = os.fork()
        if pid == 0:
            Sandbox().run_python(f"# {MARK}\nimport time\ntime.sleep(10**6)", b"", replace(LIMITS, wall_seconds=1e6))
        # Wait for the program itself. bubblewrap, which names it too, asks to end with us only moments after its start.
        wait_until(lambda: any("bwrap" not in line for line in left_over()), "the program has started")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        wait_until(lambda: not left_over(), "the program has ended")
        return True

    assert as_user(user, work)


def test_who_is_ended_at_any_moment_of_the_start_leaves_nothing(user):
    """Check ends before Bubblewrap has set anything up, while its child waits, and just after the program's start."""

    def work():
        box = Sandbox()
        for step in range(40):
            with box.start(Program(command=box.python_command(f"# {MARK}\nimport time\ntime.sleep(10**6)")), LIMITS):
                time.sleep(step * 0.00075)
        return left_over()

    assert as_user(user, work) == []


def test_no_file_descriptor_is_left_open_after_any_kind_of_run(user):
    def work():
        box = Sandbox()
        before = sorted(os.listdir("/proc/self/fd"))
        box.run_python("print(1)", b"", LIMITS)
        box.run_python("while True: print('x' * 1000)", b"x" * 10**6, LIMITS)
        box.run(Program(command=("/usr/bin/true",)), LIMITS)
        with pytest.raises(SandboxFailure, match="could not make a sandbox|did not start"):
            box._bwrap = "/usr/bin/false"
            box.run(Program(command=("/usr/bin/true",)), LIMITS)
        return before == sorted(os.listdir("/proc/self/fd"))

    assert as_user(user, work)


def test_programs_share_the_compiled_helper_and_none_can_change_it(user):
    hostile = """
import fcntl, os
def f(x): return x
for fd in range(3, 300):
    for mode in (os.O_RDWR, os.O_WRONLY):
        try: os.write(os.open(f'/proc/self/fd/{fd}', mode), b'x')
        except OSError: pass
"""

    def work():
        box = InSandbox(Sandbox())
        helper = box._compiled["code_program"]
        before = os.pread(helper.descriptor, helper.size, 0)
        for _ in range(2):
            requests = [pack(["load", [hostile], {}]), pack(["solve", ["f", [6]], {}])]
            with contextlib.closing(box.answers(requests, LIMITS, 1000)) as answers:
                assert [unpack(answer)[1] for answer in answers] == [None, 6]
        for write in (lambda: os.pwrite(helper.descriptor, b"x", 0), lambda: os.ftruncate(helper.descriptor, 1)):
            with pytest.raises(PermissionError):
                write()
        return before == os.pread(helper.descriptor, helper.size + 1, 0)

    assert as_user(user, work)


def test_who_does_not_answer_or_never_ends_its_answer_is_ended(user):
    def work():
        box = Sandbox()
        silent = Program(command=box.python_command("import time\ntime.sleep(10**6)"), talks=True)
        with box.start(silent, replace(LIMITS, wall_seconds=0.5)) as run:
            with pytest.raises(Ended, match="no answer"):
                run.ask(b"question", 100)
            assert run.finish().limit == "wall"
        endless = "import os\nwhile True: os.write(0, b'x' * 4096)"
        with box.start(Program(command=box.python_command(endless), talks=True), LIMITS) as run:
            with pytest.raises(Ended, match="more than 100000 bytes"):
                run.ask(b"question", 100_000)
            assert run.finish().limit == "output"
        echo = "import os\nwhile True: os.write(0, os.read(0, 100))"
        with box.start(Program(command=box.python_command(echo), talks=True), LIMITS) as run:
            assert [run.ask(b"a" * 50_000, 50_000), run.ask(b"b", 10)] == [b"a" * 50_000, b"b"]
        return True

    assert as_user(user, work)
    assert left_over() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="shows what root does")
def test_root_is_left_before_bubblewrap_starts():
    user = Identity().user
    assert user == sandbox_module.UNPRIVILEGED_ID
    box, runs = Sandbox(), []

    def work() -> None:
        program = Program(command=box.python_command(f"# {MARK}\nimport time\ntime.sleep(10**6)"))
        with box.start(program, LIMITS) as running:
            runs.append(running)
            running.finish()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    seen: set[int] = set()

    def is_seen() -> bool:
        for process in psutil.process_iter(["cmdline", "uids"]):
            if "bwrap" in (process.info["cmdline"] or [""])[0] and MARK in process.info["cmdline"][-1]:
                seen.update(process.info["uids"])
        return user in seen

    wait_until(is_seen, f"Bubblewrap runs as user {user}", pause=0.005)
    wait_until(lambda: any("bwrap" not in line for line in left_over()), "the program has started")
    is_seen()
    runs[0].stop()
    thread.join()
    assert 0 not in seen


def test_without_bubblewrap_it_says_how_to_get_it_and_runs_nothing(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(SandboxUnavailable, match="apt-get install -y --no-install-recommends bubblewrap"):
        Sandbox()


def test_where_namespaces_are_refused_it_says_which_settings_allow_them(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda *_, **__: str(fake))
    monkeypatch.setattr(sandbox_module, "Identity", lambda: Identity(None))
    with pytest.raises(SandboxUnavailable, match=r"No permissions(.|\n)*unprivileged_userns_clone(.|\n)*never run"):
        Sandbox()


def test_a_limit_must_be_above_zero():
    with pytest.raises(ValueError, match="processes must be above 0, got 0"):
        Limits(processes=0)
