"""This module compares the sockets, files and threads that a command will have at once with what the machine allows
it."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.schema import RlConfig, RolloutPhase, RunConfig, SamplingConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.open_files import possible_open_files
from megatron_rl.preflight.registry import Start
from megatron_rl.rollout.sampler import requests_in_flight
from megatron_rl.rollout.server import server_gpus

# The files beside the connections: shards, logs, the journal, modules of a GPU's libraries; and pipes of a reward
# worker.
_FILES, _FILES_OF_WORKER = 512, 4
# The threads beside those that compute: of the interpreter, of collectives, of HTTP; and of a reward worker.
_THREADS, _THREADS_OF_WORKER = 32, 4


def limit_problems(start: Start) -> Iterator[str]:
    """Yield the limits that are too low. What is needed is counted generously."""
    rollout, num_servers = _served(start)
    config = start.config
    workers = 0
    if isinstance(config, RolloutPhase | EvaluateConfig):
        kinds = {*config.reward.kinds, *(one.reward for one in start.benchmarks.values() if one.reward)}
        workers = max(2, len(kinds)) * config.reward.workers  # of each kind that needs some
    if rollout is not None:
        # Each server takes two more sockets: its health is looked at while weights are pushed.
        sockets = requests_in_flight(rollout, num_servers) + 2 * num_servers
        if rollout.has_agent:
            sockets *= 2  # as many agents ask
        if isinstance(config, RlConfig) and start.trains and (teacher := config.distillation) is not None:
            of_teacher = teacher.as_rollout(rollout)
            count = len(teacher.urls) or len(server_gpus(of_teacher))
            sockets += requests_in_flight(of_teacher, count) + 2 * count
        files = _FILES + _FILES_OF_WORKER * workers
        limit = possible_open_files()
        if sockets + files > limit:
            yield (
                f"{sockets} connections to {num_servers} servers and up to {files} other files are open at once, and a "
                f"process may have {limit} here (RLIMIT_NOFILE, the hard one: ulimit -Hn); raise that limit "
                "(LimitNOFILE= of systemd, docker run --ulimit nofile=, /etc/security/limits.conf), or lower "
                "rollout.max_running_requests"
            )
    threads = _threads(start, num_servers if start.serves or not start.trains else 0) + _THREADS_OF_WORKER * workers
    for name, limit in _thread_limits():
        if threads > limit:
            yield (
                f"this command starts about {threads} threads, and {name} leaves it {limit}; raise that limit, or "
                "lower reward.workers, rollout.servers or threads"
            )


def _served(start: Start) -> tuple[RolloutSection | None, int]:
    """Return the settings of the servers that this command asks, None without any, and the number of servers."""
    config = start.config
    if isinstance(config, EvaluateConfig):
        rollout = config.rollout.as_rollout()
    elif isinstance(config, SelectConfig) or (isinstance(config, SamplingConfig) and (start.trains or start.model)):
        rollout = config.rollout
    else:
        return None, 0
    if start.rollouts is not None:
        return None, 0
    if start.benchmarks:  # which are not sampled partially
        rollout = rollout.model_copy(update={"partial": False})
    return rollout, len(rollout.urls) or len(server_gpus(rollout))


def _threads(start: Start, num_servers: int) -> int:
    """Count the threads of training ranks and servers of this machine."""
    config, cores = start.config, os.cpu_count() or 1
    ranks = start.world_size * ((config.threads or cores) + _THREADS) if isinstance(config, RunConfig) else 0
    of_server = cores + _THREADS  # whatever an engine takes
    return ranks + num_servers * of_server


def _thread_limits() -> Iterator[tuple[str, int]]:
    """Yield every limit by name, and what other processes have left of it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:  # which it does not hold for
        yield "RLIMIT_NPROC (ulimit -u)", soft - _threads_of_user()
    for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/pids")):
        try:
            most, now = ((folder / f"pids.{name}").read_text(encoding="utf-8").strip() for name in ("max", "current"))
        except OSError:
            continue
        if most.isdigit() and now.isdigit():
            yield f"{folder}/pids.max (docker run --pids-limit)", int(most) - int(now)


def _threads_of_user() -> int:
    user, count = os.geteuid(), 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids, num_threads = process.info["uids"], process.info["num_threads"]
        count += num_threads or 0 if uids is not None and uids.real == user else 0
    return count
