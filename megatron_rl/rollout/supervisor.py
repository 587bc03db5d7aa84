"""Keeps the servers of one node running: a thread restarts those that end or that the pool gives up."""

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.errors import Fault
from megatron_rl.files import write_whole
from megatron_rl.keys import new_key
from megatron_rl.rollout.server import GenerationServer, idle_gpus, server_gpus, server_starter

log = logging.getLogger(__name__)

_LOOK_EVERY_SECONDS = 0.2
# The first time a server that ended is started again at once; then after this, and twice as long each time.
FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 60.0
# The earlier ends of a server that has served for so long no longer count.
_FORGIVEN_SECONDS = 600.0
# Longer, because the file system is one that machines share, where a look takes longer.
_LOOK_FOR_WISHES_SECONDS = 2.0


@dataclass(slots=True, eq=False)
class _Kept:
    start: Callable[[int], GenerationServer]
    server: GenerationServer
    num_restarts: int = 0
    started_at: float = 0.0
    is_ready: bool = True
    again_at: float | None = None  # when it will be started again, once it has ended


def wish(folder: Path, url: str, reason: str) -> None:
    """Ask the node of the server at `url` to start it again, by a file in a folder that both see."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(_wish_path(folder, url), reason)


def _wish_path(folder: Path, url: str) -> Path:
    return folder / f"restart_{re.sub(r'[^0-9A-Za-z.]+', '_', url)}"


class ServerSupervisor:
    """Owns the server processes. `close()` ends them; so does the end of this process, whatever ends it.

    failure: set when a server was given up for good: it ended too often, or did not get ready.
    """

    def __init__(
        self,
        starts: Sequence[Callable[[int], GenerationServer]],
        rollout: RolloutSection,
        wishes: Path | None = None,
    ) -> None:
        """Start all servers; they get ready at the same time. wishes: a folder in which other machines ask by `wish`
        for a server of this one to be started again."""
        self._rollout, self._wishes, self._looked_at = rollout, wishes, 0.0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._is_held = False
        self._thread = threading.Thread(target=self._run, name="server-supervisor", daemon=True)
        self.failure: Fault | None = None
        self._kept: list[_Kept] = []
        try:
            for start in starts:
                self._kept.append(_Kept(start=start, server=start(0)))
                if wishes is not None:  # one that was left over is of another run
                    _wish_path(wishes, self._kept[-1].server.url).unlink(missing_ok=True)
        except BaseException:
            self.close()
            raise

    @property
    def urls(self) -> list[str]:
        return [kept.server.url for kept in self._kept]

    def wait_ready(self, check: Callable[[], None] = lambda: None) -> None:
        """Return when all serve; from then on they are watched. Raise ValueError with the last words of one that does
        not."""
        for kept in self._kept:
            kept.server.wait_ready(self._rollout.ready_deadline_seconds, check)
        self._thread.start()

    def key_of(self, url: str) -> str:
        """Return the key of the server at `url`, to be sent now. Raise ServerLost while it is not known who listens
        there."""
        return next(kept.server.key for kept in self._kept if kept.server.url == url)

    def check(self) -> None:
        """Raise `failure` if there is one."""
        if self.failure is not None:
            raise self.failure

    def replace(self, url: str, reason: str) -> None:
        """End the server at `url` now; the thread starts another there. Nothing happens to a server that has just
        begun, nor to another node's. May take seconds."""
        with self._lock:
            for kept in self._kept:
                if kept.server.url == url and kept.is_ready:
                    log.warning("ending the generation server %s: %s", url, reason)
                    kept.server.kill()

    def hold(self) -> None:
        """Start nothing again until `let_go`: others need the GPUs. What is just starting is ended."""
        with self._lock:
            self._is_held = True
            for kept in self._kept:
                if not kept.is_ready:
                    kept.server.kill()
                    kept.num_restarts -= 1  # not by its own fault

    def let_go(self) -> None:
        with self._lock:
            self._is_held = False

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._kept:
            with ThreadPoolExecutor(max_workers=len(self._kept)) as threads:  # SGLang takes seconds to end
                list(threads.map(lambda kept: kept.server.stop(), self._kept))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.wait(_LOOK_EVERY_SECONDS):
            self._hear_wishes()
            for kept in self._kept:
                try:
                    is_ready = kept.is_ready or kept.server.is_ready()  # may take seconds, so without the lock
                except ValueError as error:
                    self._give_up(str(error))
                    return
                with self._lock:
                    if not self._closing.is_set() and self.failure is None:
                        self._look_after(kept, is_ready)

    def _hear_wishes(self) -> None:
        now = time.monotonic()
        if self._wishes is None or now - self._looked_at < _LOOK_FOR_WISHES_SECONDS:
            return
        self._looked_at = now
        for kept in self._kept:
            path = _wish_path(self._wishes, kept.server.url)
            try:
                reason = path.read_text(encoding="utf-8", errors="replace")
                path.unlink()
            except OSError:  # none, in most cases
                continue
            self.replace(kept.server.url, reason)

    def _look_after(self, kept: _Kept, is_ready: bool) -> None:
        server, now = kept.server, time.monotonic()
        if server.exit_code is not None:
            if self._is_held or (kept.again_at is not None and now < kept.again_at):
                return
            if kept.again_at is None:
                self._note_end(kept, now)
                return
            kept.num_restarts, kept.again_at = kept.num_restarts + 1, None
            kept.server, kept.started_at, kept.is_ready = kept.start(server.port), now, False
        elif is_ready:
            kept.is_ready = True
            if now - kept.started_at > _FORGIVEN_SECONDS:
                kept.num_restarts = 0
        elif now - kept.started_at > self._rollout.ready_deadline_seconds:
            log.warning("a generation server did not get ready again: %s", server.last_words())
            server.kill()

    def _note_end(self, kept: _Kept, now: float) -> None:
        """Say that a server has ended, and when it is started again, or give it up."""
        server, count = kept.server, kept.num_restarts
        server.kill()  # what is left of its process group would still hold the port, and a GPU's memory
        if count >= self._rollout.max_restarts:
            self._give_up(
                f"the generation server ended with code {server.exit_code}, and it had been restarted {count} times "
                f"before (rollout.max_restarts): {server.last_words()}"
            )
            return
        pause = min(_LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (count - 1)) if count else 0.0
        again = f"; starting it again in {pause:g} s" if pause else ""
        log.warning("a generation server ended with code %s%s: %s", server.exit_code, again, server.last_words())
        kept.again_at = now + pause

    def _give_up(self, reason: str) -> None:
        self.failure = Fault(reason)
        log.error("%s", reason)  # another node's first rank reads only this


def start_servers(
    model_path: Path,
    folder: Path,
    rollout: RolloutSection,
    dtype: str,
    *,
    name: str = "server",
    host: str = "127.0.0.1",
    weights_roots: Sequence[Path] = (),
    secret_variables: Collection[str] = (),
    wishes: Path | None = None,
) -> ServerSupervisor:
    """Start this machine's servers, listening on `host`; their logs are `folder/NAME_I.log`. They divide its GPUs.

    They serve who shows a new key, which the supervisor knows. weights_roots: below these embedded servers may load
    weights, beside `model_path`. secret_variables: of the environment, what they must not inherit beside what is called
    a secret. wishes: as of `ServerSupervisor`. Raises ValueError when there is no SGLang to start, or too few GPUs.
    """
    key = new_key()
    shares = server_gpus(rollout)
    num_idle = idle_gpus(rollout)
    if num_idle > 0:
        log.warning(
            "%d of this machine's GPUs do not generate: %d server(s) take %d each; raise rollout.servers, or "
            "--tp-size in rollout.sglang_arguments",
            num_idle,
            len(shares),
            rollout.sglang_gpus,
        )
    return ServerSupervisor(
        [
            server_starter(
                model_path,
                folder / f"{name}_{i}.log",
                rollout,
                dtype,
                host=host,
                port=rollout.port + i if rollout.port else 0,
                gpus=gpus,
                weights_roots=weights_roots,
                key=key,
                secret_variables=secret_variables,
            )
            for i, gpus in enumerate(shares)
        ],
        rollout,
        wishes,
    )
