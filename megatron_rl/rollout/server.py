"""Starting, watching and stopping the embedded generation server as a process of its own."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.schema import RolloutSection
from megatron_rl.rollout.client import GenerationClient, ServerError

log = logging.getLogger(__name__)

# What torchrun sets for its own ranks; a server that inherits it would believe to be one of them.
_TORCHRUN = re.compile(
    r"^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|OMP_.*)$"
)


class EmbeddedServer:
    """A running `python -m megatron_rl.rollout.embedded`. It ends with this process, however this process ends."""

    def __init__(
        self,
        model_path: Path,
        log_path: Path,
        *,
        port: int = 0,
        max_running_requests: int = 64,
        context_length: int,
        threads: int = 1,
        dtype: str = "float32",
        weight_version: str = "0",
    ) -> None:
        """Start the process; `wait_ready` tells when it serves. ValueError when the port is taken."""
        self.port = port
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_rl.rollout.embedded", "--lifeline"]
        options = {
            "--model-path": model_path,
            "--port": port,
            "--max-running-requests": max_running_requests,
            "--context-length": context_length,
            "--dtype": dtype,
            "--weight-version": weight_version,
            "--threads": threads,
        }
        command += [str(part) for pair in options.items() for part in pair]
        environment = {name: value for name, value in os.environ.items() if not _TORCHRUN.match(name)}
        with log_path.open("wb") as log_file:
            # stdin is the lifeline: this end closes when this process dies, even by SIGKILL. A session of its own
            # keeps the terminal's Ctrl-C away from it; this process decides when it ends.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

        log_path.with_suffix(".pid").write_text(str(self._process.pid))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def wait_ready(self, deadline_seconds: float) -> None:
        """Return when the server serves. ValueError with its last words when it ends or the deadline passes."""
        give_up = time.monotonic() + deadline_seconds
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                raise ValueError(
                    f"the generation server ended with code {self._process.returncode}: {self.last_words()}"
                )
            if self.port == 0:
                self.port = self._announced_port()
            if self.port:
                client = GenerationClient(self.url)
                try:
                    if await client.is_ready():
                        return
                finally:
                    await client.close()
            await asyncio.sleep(0.1)
        self.stop()
        raise ValueError(
            f"the generation server was not ready within {deadline_seconds:g} s (rollout.ready_deadline_seconds): "
            f"{self.last_words()}"
        )

    def check_alive(self) -> None:
        if self._process.poll() is not None:
            raise ServerError(f"the generation server ended with code {self._process.returncode}: {self.last_words()}")

    def last_words(self, lines: int = 8) -> str:
        """The end of its log."""
        try:
            text = self.log_path.read_text(errors="replace")
        except OSError as error:
            return f"no log at {self.log_path} ({error})"
        return f"end of {self.log_path}:\n" + "\n".join(text.strip().splitlines()[-lines:])

    def stop(self, grace_seconds: float = 5.0) -> None:
        """End the process: close its lifeline, then SIGTERM, then SIGKILL to this one process group. Idempotent."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            os.killpg(self._process.pid, signal_number)
            try:
                self._process.wait(grace_seconds)
            except subprocess.TimeoutExpired:
                log.warning("generation server %d ignored %s", self._process.pid, signal_number.name)

    def _announced_port(self) -> int:
        match = re.search(r"serving .* on http://\S+:(\d+)", self.log_path.read_text(errors="replace"))
        return int(match[1]) if match else 0


def start_servers(
    model_path: Path, folder: Path, rollout: RolloutSection, dtype: str, name: str = "server"
) -> list[EmbeddedServer]:
    """Start `rollout.num_servers` servers; their logs are `folder/NAME_I.log`. They get ready at the same time."""
    servers: list[EmbeddedServer] = []
    try:
        for i in range(rollout.num_servers):
            servers.append(
                EmbeddedServer(
                    model_path,
                    folder / f"{name}_{i}.log",
                    port=rollout.port + i if rollout.port else 0,
                    max_running_requests=rollout.max_running_requests,
                    context_length=rollout.max_sequence_tokens,
                    threads=rollout.threads,
                    dtype=dtype,
                )
            )
    except BaseException:
        stop_servers(servers)
        raise
    return servers


async def wait_all_ready(servers: Sequence[EmbeddedServer], deadline_seconds: float) -> None:
    """Return when all serve; the first one's failure is raised."""
    for server in servers:
        await server.wait_ready(deadline_seconds)


def stop_servers(servers: Sequence[EmbeddedServer]) -> None:
    for server in servers:
        with contextlib.suppress(ProcessLookupError):  # it ended between the look and the signal
            server.stop()
