"""Tests that a server ends with the process that started it, though it does not watch that process."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from until import wait_until

from megatron_rl.rollout.server import GenerationServer

# A server with a child of its own, as SGLang has; it writes both pids. The child shrugs off SIGTERM.
SERVER = """
import os, subprocess, sys, time
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(10**6)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
sys.exit(int(sys.argv[2])) if len(sys.argv) > 2 else time.sleep(10**6)
"""


def start(pids: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "megatron_rl.rollout.supervise",
        sys.executable,
        "-c",
        SERVER,
        str(pids),
        *arguments,
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(b"\n")  # no key
    process.stdin.flush()
    return process


def test_the_key_comes_in_a_file_that_is_gone_once_it_is_read_and_is_not_printed(tmp_path: Path) -> None:
    code = """
import os, stat, sys
path = sys.argv[sys.argv.index("--config") + 1]
modes = [oct(stat.S_IMODE(os.stat(name).st_mode)) for name in (path, os.path.dirname(path))]
print(*modes, path, open(path).read(), sys.argv, file=sys.stderr)
"""
    command = [sys.executable, "-m", "megatron_rl.rollout.supervise", sys.executable, "-c", code, "--port", "1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"0123456789abcdef\n")
    process.stdin.flush()
    said = process.stdout.read()
    assert process.wait(240) == 0
    file_mode, folder_mode, path, *rest = said.decode().split()
    assert (file_mode, folder_mode) == ("0o600", "0o700")
    assert rest[:2] == ["api-key:", '"..."']
    assert path.endswith(".yaml")
    assert not Path(path).parent.exists()
    assert b"0123456789abcdef" not in said


def is_gone(pid: int) -> bool:
    """Return whether a process is gone. A zombie is gone too: the process that adopted it has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("how", ["the lifeline closes", "SIGTERM"])
def test_everything_ends_when_it_has_to(how: str, tmp_path: Path) -> None:
    process = start(tmp_path / "pids")
    wait_until((tmp_path / "pids").exists, "the server has written its pids")
    server, child = map(int, (tmp_path / "pids").read_text().split())
    try:
        assert not is_gone(server)
        assert not is_gone(child)
        if how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            assert process.stdin is not None
            process.stdin.close()
        assert process.wait(240) != 0
        wait_until(lambda: is_gone(server) and is_gone(child), "the server and its child have ended")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_server_that_ends_by_itself_leaves_its_exit_code(tmp_path: Path) -> None:
    process = start(tmp_path / "pids", "7")
    assert process.wait(240) == 7
    _, child = map(int, (tmp_path / "pids").read_text().split())
    wait_until(lambda: is_gone(child), "the child of the server has ended")


# Its child listens, and has memory that the kernel takes a while to take back. Only then is the port closed.
LISTENER = """
import os, socket, sys, time
if os.fork() == 0:
    memory = b"x" * (768 << 20)
    listening = socket.create_server(("127.0.0.1", 0))
    open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {listening.getsockname()[1]}")
    os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(10**6)
"""


def test_a_killed_server_has_let_go_of_its_port_and_memory_when_another_is_started(tmp_path: Path) -> None:
    told = tmp_path / "told"
    server = GenerationServer([sys.executable, "-c", LISTENER, told], tmp_path / "log", 0, "127.0.0.1", "")
    wait_until(told.exists, "the server's child listens")
    pid, port = map(int, told.read_text().split())
    socket.create_connection(("127.0.0.1", port)).close()
    server.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert is_gone(pid)
    server.stop()  # once more does no harm
