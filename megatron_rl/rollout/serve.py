"""Runs `megatron-rl serve`: generation servers on machines of their own, and the folder where a training run finds
them."""

import json
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from megatron_rl.config.load import secret_variables
from megatron_rl.config.schema import RlConfig
from megatron_rl.files import whole_file
from megatron_rl.gpus import visible_gpus
from megatron_rl.rollout.ports import address_towards
from megatron_rl.rollout.server import find_sglang, torch_version
from megatron_rl.rollout.supervisor import start_servers

log = logging.getLogger(__name__)

_LOOK_EVERY_SECONDS = 0.2


class _StopRequested(Exception):
    """Says that a signal came."""


def run_serve(config: RlConfig, folder: Path, num_processes: int) -> int:
    """Start this machine's servers, register them in `folder`, and keep them running until SIGTERM or SIGINT. Return
    the exit code. Raise Fault when a server cannot be kept alive.

    What is registered is their urls, their key and the torch they have, in a file for this user alone. They listen on
    the address by which this machine reaches MASTER_ADDR, where the training run is; without that on loopback.
    num_processes: how many like this one register in the folder.
    """
    if config.rollout.urls:
        raise ValueError("this command starts servers; leave rollout.urls empty")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks training runs to save; see train/run/signals.py
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    name = f"{socket.gethostname()}-{os.getpid()}"
    torch = torch_version(find_sglang(config.rollout)) if config.rollout.engine == "sglang" else torch_version()
    _remove_stale(folder)
    host = address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)  # where the training run, on other machines, puts weights
        with start_servers(
            config.model.path,
            folder,
            config.rollout,
            config.model.dtype,
            name=name,
            host=host,
            weights_roots=[config.run_dir],
            secret_variables=secret_variables(config),
        ) as supervisor:
            supervisor.wait_ready()
            keys = {url: supervisor.key_of(url) for url in supervisor.urls}
            with whole_file(folder / f"{name}.json", mode=0o600) as file:
                json.dump({"keys": keys, "num_processes": num_processes, "torch": torch}, file)
            log.info("serving at %s", ", ".join(supervisor.urls))
            while True:
                supervisor.check()
                time.sleep(_LOOK_EVERY_SECONDS)
    except _StopRequested:
        return 0
    finally:
        (folder / f"{name}.json").unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Remove the registrations of processes of this machine that were killed."""
    for path in folder.glob(f"{socket.gethostname()}-*.json"):
        pid = path.stem.rpartition("-")[2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            path.unlink(missing_ok=True)


def _stop(number: int, _: Any) -> None:
    raise _StopRequested


def registered_keys(folder: Path, deadline_seconds: float) -> dict[str, str]:
    """Wait until all serving processes have registered in `folder`, and return the key of every server by its url.
    Raise ValueError after the deadline."""
    give_up = time.monotonic() + deadline_seconds
    told = False
    while True:
        found = list(_registrations(folder).values())
        expected = found[0]["num_processes"] if found else "any"
        if len(found) == expected:
            return {url: key for one in found for url, key in one["keys"].items()}
        if time.monotonic() > give_up:
            raise ValueError(
                f"{len(found)} of {expected} serving processes have registered in {folder} within "
                f"{deadline_seconds:g} s (rollout.ready_deadline_seconds); see the logs in that folder"
            )
        if not told:
            log.info("waiting for generation servers to register in %s", folder)
            told = True
        time.sleep(_LOOK_EVERY_SECONDS)


def check_registered_torch(folder: Path, config: RlConfig) -> None:
    """Raise ValueError where weights may go over NCCL to registered servers with another torch, whose NCCL is another
    one."""
    may_be_nccl = config.sync.transport == "distributed" and config.sync.backend != "gloo" and visible_gpus()
    if not may_be_nccl or config.rollout.engine != "sglang":
        return
    own = torch_version()
    for path, registration in _registrations(folder).items():
        theirs = registration.get("torch", own)
        if theirs != own:
            raise ValueError(
                f"the servers of {path} have torch {theirs or '(none)'}, this run {own}, and weights would go over "
                "NCCL; install the same torch in both, or set sync.backend = 'gloo'"
            )


def _registrations(folder: Path) -> dict[Path, Any]:
    """Read what `run_serve` has written into the folder so far, by file."""
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
