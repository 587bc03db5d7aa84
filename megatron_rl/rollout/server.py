"""Starting, watching and stopping generation servers, each a process of its own."""

import asyncio
import contextlib
import importlib.util
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import RolloutSection
from megatron_rl.rollout.client import GenerationClient, ServerError

log = logging.getLogger(__name__)

# What torchrun sets for its own ranks; a server that inherits it would believe to be one of them.
_TORCHRUN = re.compile(
    r"^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|OMP_.*)$"
)


class GenerationServer:
    """A running server process. It ends with this process, however this process ends."""

    def __init__(self, command: Sequence[object], log_path: Path, port: int, **environment: str) -> None:
        """Start `command`, whose stdin is its lifeline: the other end closes when this process dies, even by SIGKILL.

        port: where it will listen; 0 when it is going to announce that in its log. `wait_ready` tells when it serves.
        """
        self.port = port
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not _TORCHRUN.match(name)}
        with log_path.open("wb") as log_file:
            # A session of its own keeps the terminal's Ctrl-C away from it; this process decides when it ends.
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=inherited | environment,
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


class EmbeddedServer(GenerationServer):
    """`python -m megatron_rl.rollout.embedded`, which watches its lifeline itself."""

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
        options = {
            "--model-path": model_path,
            "--port": port,
            "--max-running-requests": max_running_requests,
            "--context-length": context_length,
            "--dtype": dtype,
            "--weight-version": weight_version,
            "--threads": threads,
        }
        command = [sys.executable, "-m", "megatron_rl.rollout.embedded", "--lifeline"]
        super().__init__([*command, *(part for pair in options.items() for part in pair)], log_path, port)


class SglangServer(GenerationServer):
    """`python -m sglang.launch_server`, unmodified, under a supervisor that watches the lifeline for it."""

    def __init__(
        self,
        model_path: Path,
        log_path: Path,
        *,
        python: Path,
        port: int = 0,
        max_running_requests: int = 64,
        context_length: int,
        dtype: str = "float32",
        weight_version: str = "0",
        on_cpu: bool,
        arguments: Sequence[str] = (),
    ) -> None:
        """python: the interpreter of an environment with sglang. on_cpu: see rollout/sglang_cpu. arguments: further
        ones of launch_server, after ours, so that they win."""
        port = port or _free_port()
        options = {
            "--model-path": model_path,
            "--host": "127.0.0.1",
            "--port": port,
            "--max-running-requests": max_running_requests,
            "--context-length": context_length,
            "--dtype": dtype,
            "--weight-version": weight_version,
        }
        # The directory's configuration_bailing_moe.py describes a model that transformers does not know.
        flags: list[object] = ["--trust-remote-code", "--sleep-on-idle"]
        environment = {}
        if on_cpu:
            # Without a limit it takes 70 % of the memory for its cache.
            flags += ["--device", "cpu", "--max-total-tokens", max_running_requests * context_length]
            environment = {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(Path(__file__).parent / "sglang_cpu")}
        command = [sys.executable, "-m", "megatron_rl.rollout.supervise", python, "-m", "sglang.launch_server"]
        given = [part for pair in options.items() for part in pair]
        super().__init__([*command, *given, *flags, *arguments], log_path, port, **environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_servers(
    model_path: Path, folder: Path, rollout: RolloutSection, dtype: str, name: str = "server"
) -> list[GenerationServer]:
    """Start `rollout.num_servers` servers; their logs are `folder/NAME_I.log`. They get ready at the same time.

    ValueError when there is no SGLang to start.
    """
    servers: list[GenerationServer] = []
    python = find_sglang(rollout) if rollout.engine == "sglang" else None
    routed = ("--enable-return-routed-experts",) if rollout.router_replay else ()
    try:
        for i in range(rollout.num_servers):
            log_path = folder / f"{name}_{i}.log"
            shared: dict[str, Any] = {
                "port": rollout.port + i if rollout.port else 0,
                "max_running_requests": rollout.max_running_requests,
                "context_length": rollout.max_sequence_tokens,
                "dtype": dtype,
            }
            servers.append(
                SglangServer(
                    model_path,
                    log_path,
                    python=python,
                    on_cpu=not on_gpu(),
                    arguments=(*routed, *rollout.sglang_arguments),
                    **shared,
                )
                if python
                else EmbeddedServer(model_path, log_path, threads=rollout.threads, **shared)
            )
    except BaseException:
        stop_servers(servers)
        raise
    return servers


def find_sglang(rollout: RolloutSection) -> Path:
    """The interpreter that has sglang. ValueError tells how to get one."""
    if rollout.sglang_python is not None:
        if not os.access(rollout.sglang_python, os.X_OK):
            raise ValueError(f"rollout.sglang_python {rollout.sglang_python} is not an interpreter; correct or drop it")
        return rollout.sglang_python
    if importlib.util.find_spec("sglang") is not None:
        return Path(sys.executable)
    beside = Path(".venv-sglang/bin/python")
    if os.access(beside, os.X_OK):
        return beside.absolute()
    raise ValueError(
        "rollout.engine 'sglang' finds no sglang here and no .venv-sglang in the working directory; run "
        "`make install-sglang` (on a GPU machine: pip install 'megatron_rl[gpu]') or set rollout.sglang_python"
    )


def on_gpu() -> bool:
    """True where servers will find an NVIDIA GPU."""
    return os.environ.get("MEGATRON_RL_DEVICE") != "cpu" and Path("/dev/nvidia0").exists()


async def wait_all_ready(servers: Sequence[GenerationServer], deadline_seconds: float) -> None:
    """Return when all serve; the first one's failure is raised."""
    for server in servers:
        await server.wait_ready(deadline_seconds)


def stop_servers(servers: Sequence[GenerationServer]) -> None:
    for server in servers:
        with contextlib.suppress(ProcessLookupError):  # it ended between the look and the signal
            server.stop()
