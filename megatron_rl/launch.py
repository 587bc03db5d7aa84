"""This module starts, watches and ends several training ranks on this machine."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from megatron_rl.errors import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_STOPPED, STOP_SIGNALS
from megatron_rl.lifeline import PARENT_VARIABLE
from megatron_rl.place import SOCKET_VARIABLE

log = logging.getLogger(__name__)

_LOOK_EVERY_SECONDS = 0.1
# Once a rank has ended with a code other than 0 the others have so long to end by themselves: most do at once, rank 0
# ends its servers first. A clean stop and a mistake are every rank's own; they only differ in speed.
_PATIENCE_SECONDS = {EXIT_STOPPED: 60.0, EXIT_MISTAKE: 30.0}
_PATIENCE_AFTER_A_FAULT_SECONDS = 3.0
_KINDNESS_SECONDS = 10.0  # from SIGTERM to SIGKILL


def run_ranks(arguments: list[str], num_ranks: int) -> int:
    """Run `megatron-rl ARGUMENTS` on `num_ranks` ranks. Signals go to all of them, and none outlives another for long.

    Return the exit code of the first rank that ended with one other than 0 and 75; else 75 when a rank ended with that.
    """
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: Any) -> None:
        for rank in ranks:
            rank.send_signal(number)

    for name in STOP_SIGNALS:
        signal.signal(name, pass_on)
    # Ranks inherit the mask, until they can handle what comes (errors.interrupt_on_signals).
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        _start(ranks, arguments, num_ranks)
    except BaseException:
        for rank in ranks:
            rank.kill()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return _watch(ranks)


def _start(ranks: list[subprocess.Popen[bytes]], arguments: list[str], num_ranks: int) -> None:
    """Start all ranks, and append each as it starts."""
    # Bound and not listening: the port is this run's, and ranks that come before rank 0 listens know it.
    with socket.socket() as store:
        store.bind(("127.0.0.1", 0))
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        environment |= {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.getsockname()[1]),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            PARENT_VARIABLE: str(os.getpid()),
        }
        for number in range(num_ranks):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            if number == 0:
                own[SOCKET_VARIABLE] = str(store.fileno())
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "megatron_rl.cli", *arguments],
                    env=environment | own,
                    pass_fds=[store.fileno()] if number == 0 else [],
                    # A session of its own keeps the terminal's Ctrl-C away: it comes once, through this process.
                    start_new_session=True,
                )
            )


def _watch(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait until all ranks have ended. When one does not end well, end the others soon after. Return the exit code."""
    running = dict(enumerate(ranks))
    codes: list[int] = []
    terminate_at = kill_at = float("inf")
    while running:
        time.sleep(_LOOK_EVERY_SECONDS)
        now = time.monotonic()
        for number, rank in list(running.items()):
            if rank.poll() is None:
                continue
            del running[number]
            code = _exit_code(number, rank.returncode)
            codes.append(code)
            if code != EXIT_DONE and running:
                patience = _PATIENCE_SECONDS.get(code, _PATIENCE_AFTER_A_FAULT_SECONDS)
                terminate_at = min(terminate_at, now + patience)
        if now > terminate_at:
            terminate_at, kill_at = float("inf"), min(kill_at, now + _KINDNESS_SECONDS)
            log.warning("a rank has ended with exit code %d; ending rank %s too", _worst(codes), _numbers(running))
            for rank in running.values():
                rank.terminate()
        if now > kill_at:
            kill_at = float("inf")
            log.warning("ending rank %s by force, which did not obey SIGTERM", _numbers(running))
            for rank in running.values():
                rank.kill()
    return _worst(codes)


def _exit_code(number: int, code: int) -> int:
    """Translate the return code that subprocess gives a rank, which may be a signal, into an exit code of errors.py."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if -code in STOP_SIGNALS:  # before it could handle them
        return EXIT_INTERRUPTED
    log.error("rank %d was ended by %s%s", number, name, "; was memory full?" if name == "SIGKILL" else "")
    return EXIT_FAULT


def _worst(codes: list[int]) -> int:
    """Choose the command's exit code from those of all ranks, in the order of their ends."""
    others = [code for code in codes if code != EXIT_DONE]
    return next((code for code in others if code != EXIT_STOPPED), EXIT_STOPPED if others else EXIT_DONE)


def _numbers(running: dict[int, Any]) -> str:
    return ", ".join(map(str, sorted(running)))
