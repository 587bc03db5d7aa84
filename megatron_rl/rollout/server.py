"""Starts, watches and stops generation servers, each a process of its own."""

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from megatron_rl.config.rollout import GenerationSection, RolloutSection
from megatron_rl.families import Architecture, family_of, load_architecture
from megatron_rl.files import write_whole
from megatron_rl.gpus import gpu_shares, visible_gpus, without_expandable_segments
from megatron_rl.keys import bearer, without_secrets
from megatron_rl.proxies import without_proxy
from megatron_rl.rollout.client import ServerLost
from megatron_rl.rollout.ports import close_port, hold_port, is_ours
from megatron_rl.rollout.supervise import members_of

log = logging.getLogger(__name__)

# Variables that torchrun sets for its own ranks; a server that inherits them would take itself for one of them.
_TORCHRUN = re.compile(
    r"^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|OMP_.*)$"
)

# --context-length of SGLang is this much above the longest sequence. It takes no input of context length - 6 tokens or
# more (0.5.21, tp_worker.py: max_req_input_len) and cuts a response, without a word, at context length - 2 in all
# (scheduler.py: init_req_max_new_tokens). With 7 it takes the longest sequence as input.
SGLANG_SPARE_TOKENS = 7

_ENDED_WITHIN_SECONDS = 60.0


class GenerationServer:
    """Owns a running server process. It ends with this process, however this process ends."""

    def __init__(
        self,
        command: Sequence[object],
        log_path: Path,
        port: int,
        host: str,
        key: str,
        secret_variables: Collection[str] = (),
        **environment: str,
    ) -> None:
        """Start `command`, whose stdin is its lifeline: the other end closes when this process dies, even by SIGKILL.

        port: where it will listen, one of `hold_port`. key: what requests have to show, which the command reads as the
        first line of its stdin: `ps` shows arguments to everybody. secret_variables: what it does not inherit, beside
        what is called a secret. `wait_ready` tells when it serves.
        """
        self.host, self.port = host, port
        self.log_path = log_path
        self._key, self._is_proven, self._has_ended = key, False, False
        log_path.parent.mkdir(parents=True, exist_ok=True)
        inherited = inherited_environment()
        # The log of a server that is started again goes on where the last one's ended.
        with log_path.open("ab") as log_file:
            # A session of its own keeps the terminal's Ctrl-C away from it; this process decides when it ends.
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                # SGLang asks itself whether it is up, and would ask a proxy of the environment.
                env=without_secrets(inherited, secret_variables) | without_proxy(inherited, host) | environment,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and `wait_ready` tells
            self._process.stdin.write(f"{key}\n".encode())
            self._process.stdin.flush()
        # Whoever waits for a new one never reads half of it.
        write_whole(log_path.with_suffix(".pid"), str(self._process.pid))

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def exit_code(self) -> int | None:
        """The exit code of the process; None while it runs."""
        return self._process.poll()

    @property
    def key(self) -> str:
        """The key that requests to the server have to show. Raise ServerLost until it is proven that this process is
        who listens there."""
        if not self._is_proven:
            raise ServerLost(f"{self.url} is not known to be our server yet, so nothing is asked there")
        return self._key

    def is_ready(self) -> bool:
        """Tell whether the server answers /ready with 200. Raise ValueError when another process listens where it
        should."""
        if not self._is_proven:
            if not is_ours(self.host, self.port, self._process.pid):
                return False
            close_port(self.host, self.port)
            # Look once more, now that nobody can take the port any more, dead or alive.
            self._is_proven = is_ours(self.host, self.port, self._process.pid)
        try:
            return self._answers("/ready", bearer(self.key)) == 200 and self._wants_key()
        except (httpx.HTTPError, ServerLost):
            return False

    def wait_ready(self, deadline_seconds: float, check: Callable[[], None] = lambda: None) -> None:
        """Return when the server serves. Raise ValueError with its last words when it ends or the deadline passes.

        check: called now and then; what it raises ends the wait.
        """
        give_up = time.monotonic() + deadline_seconds
        while time.monotonic() < give_up:
            check()
            if self.exit_code is not None:
                raise ValueError(f"the generation server ended with code {self.exit_code}: {self.last_words()}")
            if self.is_ready():
                return
            time.sleep(0.1)
        self.stop()
        raise ValueError(
            f"the generation server was not ready within {deadline_seconds:g} s (rollout.ready_deadline_seconds): "
            f"{self.last_words()}"
        )

    def last_words(self, lines: int = 8) -> str:
        """Return the end of the server's log."""
        try:
            text = self.log_path.read_text(errors="replace", encoding="utf-8")
        except OSError as error:
            return f"no log at {self.log_path} ({error})"
        return f"end of {self.log_path}:\n" + "\n".join(text.strip().splitlines()[-lines:])

    def stop(self, grace_seconds: float = 10.0) -> None:
        """End the process: close its lifeline, and kill what is still there after the grace. Idempotent.

        No signal before that: one to the whole group would make SGLang take the end of its own parts for a crash.
        """
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            log.warning(
                "generation server %d did not end within %g s of being told to", self._process.pid, grace_seconds
            )
        self.kill()

    def kill(self) -> None:
        """End the process group at once, even when it is stopped or deaf to SIGTERM. Return when nothing is left of it:
        a process lets go of its port last of all, after its memory, which takes seconds where there is much."""
        if self._has_ended:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        give_up = time.monotonic() + _ENDED_WITHIN_SECONDS
        while self._process.poll() is None or (left := members_of(self._process.pid)):
            if time.monotonic() > give_up:  # stuck in the kernel: it ends when that lets it go
                log.error(
                    "of generation server %d %s did not end within %g s of SIGKILL",
                    self._process.pid,
                    "itself" if self._process.poll() is None else f"processes {left}",
                    _ENDED_WITHIN_SECONDS,
                )
                return
            time.sleep(0.02)
        self._has_ended = True

    def _answers(self, route: str, headers: Mapping[str, str]) -> int:
        """Ask a route, and return the status."""
        return httpx.get(self.url + route, headers=headers, timeout=5.0, trust_env=False).status_code

    def _wants_key(self) -> bool:
        """Return True, or raise ValueError when the server serves those without the key too."""
        if self._key and self._answers("/model_info", {}) == 200:
            raise ValueError(
                f"the generation server at {self.url} answers without the run's key, so anybody who reaches it could "
                "change its weights; remove from rollout.sglang_arguments what makes it serve by several processes "
                "(--tokenizer-worker-num)"
            )
        return True


def inherited_environment() -> dict[str, str]:
    """Return this process's variables, without those that make it a rank of a training run."""
    return {name: value for name, value in os.environ.items() if not _TORCHRUN.match(name)}


class EmbeddedServer(GenerationServer):
    """Runs `python -m megatron_rl.rollout.embedded`, which watches its lifeline itself."""

    def __init__(
        self,
        model_path: Path,
        log_path: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_running_requests: int = 64,
        context_length: int,
        threads: int = 1,
        dtype: str = "float32",
        weight_version: str = "0",
        weights_roots: Sequence[Path] = (),
        key: str = "",
        secret_variables: Collection[str] = (),
    ) -> None:
        """Start the server. weights_roots: below these it may load weights, beside where its --help says that it always
        may. key: none by default. Raise ValueError when somebody else has the port."""
        port = hold_port(host, port)
        options = {
            "--model-path": model_path,
            "--host": host,
            "--port": port,
            "--max-running-requests": max_running_requests,
            "--context-length": context_length,
            "--dtype": dtype,
            "--weight-version": weight_version,
            "--threads": threads,
        }
        command = [sys.executable, "-m", "megatron_rl.rollout.embedded", "--lifeline", "--key-from-stdin"]
        command += [part for root in weights_roots for part in ("--weights-root", str(root))]
        # Another host than loopback is asked for only where a run has several nodes.
        command += ["--allow-remote"] if host != "127.0.0.1" else []
        command += [str(part) for pair in options.items() for part in pair]
        super().__init__(command, log_path, port, host, key, secret_variables)


def _refuse_what_a_cpu_cannot(architecture: Architecture) -> None:
    """Raise ValueError for a model of which SGLang 0.5.21 computes something else on a CPU; on a GPU it multiplies
    too."""
    factor = architecture.routed_scaling_factor
    if factor != 1 and family_of(architecture).is_unscaled_on_cpu:
        raise ValueError(
            f"SGLang leaves config.json's routed_scaling_factor {factor:g} out on a CPU, so its tokens would be of "
            "another model; set rollout.engine = 'embedded', or let it use a GPU"
        )


class SglangServer(GenerationServer):
    """Runs `python -m sglang.launch_server`, unmodified, under a supervisor that watches the lifeline for it."""

    def __init__(
        self,
        model_path: Path,
        log_path: Path,
        *,
        python: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        max_running_requests: int = 64,
        context_length: int,
        dtype: str = "float32",
        weight_version: str = "0",
        gpus: Sequence[str] = (),
        releases_memory: bool = False,
        arguments: Sequence[str] = (),
        key: str = "",
        secret_variables: Collection[str] = (),
    ) -> None:
        """Start the server. Raise ValueError when somebody else has the port, and for a model that SGLang serves
        wrongly.

        python: the interpreter of an environment with sglang. context_length: of the longest sequence, which may be
        input too. gpus: those that it may use; without any it runs on the CPU, see rollout/sglang_cpu. releases_memory:
        on a GPU it is able to; on a CPU it only answers as if. arguments: further ones of launch_server, after ours, so
        that they win.
        """
        architecture = load_architecture(model_path)
        if not gpus:
            _refuse_what_a_cpu_cannot(architecture)
        port = hold_port(host, port)
        context_length += SGLANG_SPARE_TOKENS
        options = {
            "--model-path": model_path,
            "--host": host,
            "--port": port,
            "--max-running-requests": max_running_requests,
            "--context-length": context_length,
            "--dtype": dtype,
            "--weight-version": weight_version,
        }
        flags: list[object] = ["--sleep-on-idle"]
        if family_of(architecture).remote_code:
            flags.append("--trust-remote-code")
        # Spare tokens may be more than the model has positions; none is ever at one of them.
        environment = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if releases_memory and gpus:
            flags.append("--enable-memory-saver")
            # torch_memory_saver, by which SGLang releases memory, does not go together with them.
            environment |= without_expandable_segments(os.environ)
        if not gpus:
            # Without a limit it takes 70 % of the memory for its cache.
            flags += ["--device", "cpu", "--max-total-tokens", max_running_requests * context_length]
            environment |= {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(Path(__file__).parent / "sglang_cpu")}
        command: list[object] = [
            sys.executable,
            "-m",
            "megatron_rl.rollout.supervise",
            python,
            "-m",
            "sglang.launch_server",
        ]
        given = [part for pair in options.items() for part in pair]
        command += [*given, *flags, *arguments]
        super().__init__(command, log_path, port, host, key, secret_variables, **environment)


def server_starter(
    model_path: Path,
    log_path: Path,
    rollout: RolloutSection,
    dtype: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    gpus: Sequence[str] = (),
    weights_roots: Sequence[Path] = (),
    key: str = "",
    secret_variables: Collection[str] = (),
) -> Callable[[int], GenerationServer]:
    """Return a function that starts this server: with 0 the first time, later at the port that it had.

    port: where the first one listens; 0 picks. gpus: of this server, on a CPU none. weights_roots: of an embedded
    server; SGLang loads from anywhere. key, secret_variables: see GenerationServer. Raises ValueError when there is no
    SGLang to start.
    """
    shared: dict[str, Any] = {
        "host": host,
        "max_running_requests": rollout.max_running_requests,
        "context_length": rollout.max_sequence_tokens,
        "dtype": dtype,
        "key": key,
        "secret_variables": secret_variables,
    }
    if rollout.engine == "sglang":
        python = find_sglang(rollout)
        routed = ("--enable-return-routed-experts",) if rollout.router_replay else ()
        return lambda again: SglangServer(
            model_path,
            log_path,
            python=python,
            port=again or port,
            gpus=gpus,
            releases_memory=rollout.release_memory,
            arguments=(*routed, *rollout.sglang_arguments),
            **shared,
        )
    return lambda again: EmbeddedServer(
        model_path, log_path, port=again or port, threads=rollout.threads, weights_roots=weights_roots, **shared
    )


def idle_gpus(rollout: GenerationSection) -> int:
    """Count the GPUs of this machine on which no server that is started here generates; 0 or less where all do."""
    gpus = visible_gpus() if rollout.engine == "sglang" else []
    return len(gpus) - rollout.servers_on(len(gpus)) * rollout.sglang_gpus


def server_gpus(rollout: GenerationSection) -> list[list[str]]:
    """List the GPUs of each server of this machine, [] for one on the CPU. Raise ValueError when there are too few."""
    gpus = visible_gpus() if rollout.engine == "sglang" else []
    return gpu_shares(gpus, rollout.servers_on(len(gpus)), rollout.sglang_gpus)


def torch_version(python: Path | None = None) -> str:
    """Return the release of torch, such as "2.14.1", that an interpreter has, by default this one; "" where there is
    none.

    It is not imported. What comes behind a +, of which build it is, is left out.
    """
    if python is None:
        return importlib.metadata.version("torch").partition("+")[0]
    program = "import importlib.metadata; print(importlib.metadata.version('torch'))"
    try:
        done = subprocess.run(
            [python, "-c", program],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(
            f"{python} does not tell which torch it has ({error}); correct rollout.sglang_python"
        ) from None
    return done.stdout.strip().partition("+")[0]


def check_same_torch(rollout: GenerationSection) -> None:
    """Raise ValueError where servers on GPUs have another torch than this process, whose handles of memory they
    open."""
    if not visible_gpus():
        return
    python = find_sglang(rollout)
    own, theirs = torch_version(), torch_version(python)
    if theirs != own:
        raise ValueError(
            f"{python} has torch {theirs or '(none)'}, this process {own}: servers cannot open its memory "
            "(sync.transport 'ipc'); install the same torch in both, or set sync.transport = 'disk'"
        )


def find_sglang(rollout: GenerationSection) -> Path:
    """Return the interpreter that has sglang. Raise ValueError, which tells how to get one."""
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
