"""Shows where a rank is, by a heartbeat for whoever looks, and ends a phase that takes too long."""

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

from megatron_rl.files import write_whole

log = logging.getLogger(__name__)

HEARTBEAT = "heartbeat.json"
BEAT_SECONDS = 10.0
# So long after the deadline, faulthandler ends a process whose watching thread cannot run (C code has the GIL).
_STUCK_SECONDS = 30.0


class Watchdog:
    """Writes the heartbeat of a run, and ends a rank that is in one phase for too long.

    Rank 0 writes `run_dir/heartbeat.json`: time, pid, host, step, phase and the seconds spent in it, the steps that the
    run has, and its state: running, or how it ended. Every rank that is in one phase for longer than the deadline
    writes the stacks of its threads to `run_dir/stacks/rank_N.txt` and ends with exit code 1; its launcher then ends
    the others. `close()` stops watching.

    num_steps: of the whole run; None while that is not known.
    """

    def __init__(self, run_dir: Path, rank: int, deadline_seconds: float) -> None:
        self._run_dir, self._rank, self._deadline = run_dir, rank, deadline_seconds
        self.num_steps: int | None = None
        self._state, self._message = "running", ""
        self._end = threading.Event()
        self._lock = threading.Lock()
        self.enter("start", 0)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """Note that from now on this rank does `phase` of `step`, and has the whole deadline for it."""
        with self._lock:
            self.phase, self.step, self._since = phase, step, time.monotonic()
            self._beat()
        faulthandler.dump_traceback_later(self._deadline + _STUCK_SECONDS, exit=True)

    @property
    def place(self) -> str:
        """The rank, phase and step, for messages."""
        return f"rank {self._rank}, phase {self.phase} of step {self.step}"

    def close(self, state: str = "ended", message: str = "") -> None:
        """Stop watching, and write how the run ended. state: how the run ended, one of ended, stopped, failed and
        refused. message: why."""
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._state, self._message = state, message
        self._beat()

    def _run(self) -> None:
        beaten = time.monotonic()
        while not self._end.wait(min(1.0, self._deadline / 10)):
            with self._lock:
                now = time.monotonic()
                if now - self._since > self._deadline:
                    self._give_up()
                if now - beaten > BEAT_SECONDS:
                    beaten = now
                    self._beat()

    def _beat(self) -> None:
        if self._rank:
            return
        found = {
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self.step,
            "phase": self.phase,
            "phase_seconds": round(time.monotonic() - self._since, 1),
            "num_steps": self.num_steps,
            "state": self._state,
            "message": self._message,
        }
        path = self._run_dir / HEARTBEAT
        try:
            write_whole(path, json.dumps(found))
        except OSError as error:  # a full disk is for those to tell who lose something by it
            log.warning("%s cannot be written (%s)", path, error.strerror)

    def _give_up(self) -> None:
        """Write the stacks and end the process. An exception would not do: the main thread may sit in a collective that
        never ends."""
        log.critical(
            "%s: not done after train.phase_deadline_seconds = %g; the stacks of this process are in %s. Raise the "
            "deadline if the phase only needs longer; else look which rank's stack is not in a collective",
            self.place,
            self._deadline,
            self._run_dir / "stacks",
        )
        self._state, self._message = "failed", f"{self.phase} took longer than train.phase_deadline_seconds"
        self._beat()
        try:
            folder = self._run_dir / "stacks"
            folder.mkdir(exist_ok=True)
            with (folder / f"rank_{self._rank}.txt").open("w", encoding="utf-8") as file:
                file.write(f"{self.place}, after {self._deadline:g} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        finally:  # whatever the disk does
            os._exit(1)
