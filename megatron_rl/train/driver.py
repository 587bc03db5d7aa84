"""The loop: synchronous rollout and train phases under a token budget. Every rank runs it; rank 0 leads.

Rank 0 alone talks to the servers, scores and plans, and says what all ranks do next: push weights, check that they
arrived, train a plan, or stop. The others wait for its word on gloo.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_rl import device
from megatron_rl.config.schema import RlConfig
from megatron_rl.errors import EXIT_DONE, StopRequested
from megatron_rl.gpus import chosen_backend, visible_gpus
from megatron_rl.keys import key_in_environment
from megatron_rl.place import own_place
from megatron_rl.preflight import check_seats
from megatron_rl.records import Plan
from megatron_rl.sync.all_ranks import on_all_ranks
from megatron_rl.sync.distributed import DistributedTransport
from megatron_rl.sync.folder import WeightFolder
from megatron_rl.sync.ipc import IpcTransport
from megatron_rl.sync.transport import DiskTransport, Transport
from megatron_rl.train.exchange import Order, Stop, Work, receive
from megatron_rl.train.guards import SkipGuard
from megatron_rl.train.leader import Leader, obey
from megatron_rl.train.objective import PolicyObjective
from megatron_rl.train.resilience import StopSignals, told_in_words
from megatron_rl.train.serving import NodeServers, is_one_machine
from megatron_rl.train.session import Session, should_save
from megatron_rl.train.trainer import Batches, StepResult

log = logging.getLogger(__name__)


def run_rl(config: RlConfig, resume: bool, rollouts: Path | None = None, keys: Mapping[str, str] | None = None) -> int:
    """Train for `train.steps` steps and export `run_dir/hf`. Returns the exit code.

    rollouts: a file to train from (rollout/recorded.py); then there are no servers. keys: of the servers at
    rollout.urls, by their url, where rollout.api_key_variable does not name the one key of all.
    """
    if keys is None:
        key = key_in_environment(config.rollout.api_key_variable, "rollout.api_key_variable")
        keys = dict.fromkeys(config.rollout.urls, key)
    if rollouts is None:
        check_seats(config, own_place().local_world_size, device.on_cuda())
    signals = StopSignals()
    num_optimizer_steps = config.train.steps * config.algorithm.optimizer_steps_per_rollout
    session = Session(config, num_optimizer_steps, resume, check=signals.check)
    # Every part is closed, whatever another one raises.
    with session, ExitStack() as parts, told_in_words(session.watch):
        if config.algorithm.kl_coefficient:
            session.trainer.keep_reference()
        restored = session.restore()
        first = restored[0]["step"] if restored else 0
        source: NodeServers | Path
        transport = None
        try:
            if rollouts is None:
                folder = WeightFolder(
                    session.control,
                    session.bailing.num_parameters() * session.model.dtype.itemsize,
                    shared=None if is_one_machine(config.rollout.urls) else config.run_dir,
                )
                parts.callback(folder.close)
                session.export(folder.path)  # what servers start with, now and whenever one is started again
                _make_room(config, session, None)  # servers size their caches by what is free when they start
                source = NodeServers(config, folder.path, session.control, signals, keys)
                parts.callback(source.close)
                transport = _transport(config, session, folder, source, first)
                parts.callback(transport.close)
            else:
                source = rollouts
            leader = None
            if session.is_leader:
                leader = Leader(config, session, signals, first, restored, source, transport)
                parts.callback(leader.close)
                if not resume:
                    leader.collector.forget(lambda step: True)  # of another run in this folder
        except StopRequested:
            return session.stop_code  # before the first step: there is nothing to save yet
        return _steps(config, session, first, leader, transport, source if isinstance(source, NodeServers) else None)


def _steps(
    config: RlConfig,
    session: Session,
    first: int,
    leader: Leader | None,
    transport: Transport | None,
    servers: NodeServers | None,
) -> int:
    """From step `first` to the end. Returns the exit code."""
    objective = PolicyObjective(config.algorithm, session.context_group)
    skips = SkipGuard(config.train, "Their batches are in run_dir/skipped. ")
    for step in range(first, config.train.steps):
        offload_seconds = _make_room(config, session, servers)
        work = leader.begin(step) if leader else _follow(session, step, transport)
        if isinstance(work, Stop):
            if work.exit_code is not None:
                return work.exit_code
            if step > first:
                session.save(step, *_driver_state(leader, step))
                session.settle(wait=True)
            return session.stop_code
        reload_seconds = _take_room(config, session, servers)
        session.watch.enter("train", step)
        device.reset_peak_memory()
        results = _train(session, config, objective, *work)
        if leader:
            leader.end(step, results, offload_seconds, reload_seconds)
        session.settle()
        skips.check(results)
        if should_save(step + 1, config.train.steps, config):
            session.save(step + 1, *_driver_state(leader, step + 1))
    session.settle(wait=True)
    last = leader.finish() if leader else _follow(session, config.train.steps, transport)
    assert isinstance(last, Stop) and last.exit_code is not None
    if last.exit_code == EXIT_DONE:
        session.export(config.run_dir / "hf")
    return last.exit_code


def _make_room(config: RlConfig, session: Session, servers: NodeServers | None) -> float:
    """Before servers on the same GPUs take their memory: what training alone needs leaves them, and servers that ended
    are started again. Returns the seconds that it took."""
    started = time.perf_counter()
    if config.train.offload_while_generating:
        session.trainer.residence.offload()
    if config.rollout.release_memory and servers is not None and servers.keeper is not None:
        servers.keeper.let_go()
    return time.perf_counter() - started


def _take_room(config: RlConfig, session: Session, servers: NodeServers | None) -> float:
    """Collective, once servers have released their memory: none is started from here on, and what has left the GPUs
    comes back. Returns the seconds that it took. SharedFault when a rank has no room for it."""
    started = time.perf_counter()
    residence, seconds = session.trainer.residence, config.train.free_memory_deadline_seconds

    def reload() -> None:
        if servers is not None and servers.keeper is not None:
            servers.keeper.hold()
        device.wait_until_free(residence.missing_bytes, seconds)
        residence.reload()

    if config.rollout.release_memory:
        on_all_ranks(reload, session.control)
    return time.perf_counter() - started


def _transport(
    config: RlConfig, session: Session, folder: WeightFolder, servers: NodeServers, version: int
) -> Transport:
    """Collective. version: of the weights that are in the folder already."""
    if config.sync.transport == "disk":
        return DiskTransport(folder, session.export, version)
    max_bytes, silence_seconds = config.sync.bucket_mb * 2**20, config.rollout.silence_seconds
    if config.sync.transport == "ipc":
        num_gpus = len(visible_gpus())
        return IpcTransport(
            session.model,
            session.control,
            max_bytes,
            servers.node,
            servers.keeper.urls if servers.keeper is not None else (),
            config.rollout.servers_on(num_gpus),
            num_gpus,
            silence_seconds,
            servers.key_of,
        )
    backend = chosen_backend(config.sync.backend, config.rollout.engine, device.on_cuda(), servers.beside)
    if session.is_leader:
        log.info("weights go to the servers over %s", backend)
    return DistributedTransport(
        session.model, session.control, max_bytes, servers.address, silence_seconds, backend, servers.key_of
    )


def _train(session: Session, config: RlConfig, objective: PolicyObjective, plan: Plan, work: Work) -> list[StepResult]:
    """The train phase: the plan's optimizer steps over this rank's samples."""
    trainer, temperature = session.trainer, config.rollout.temperature
    batches: list[Batches] = [trainer.feed(step) for step in work]
    if config.algorithm.trains_on_own_old_logprobs and len(batches) > 1:
        # The first step starts from the weights that these log-probs would be of, and needs none.
        batches[1:] = [trainer.with_old_logprobs(step, temperature) for step in batches[1:]]
    return [
        trainer.train_step(step, objective, planned.denominator, temperature)
        for planned, step in zip(plan.steps, batches, strict=True)
    ]


def _follow(session: Session, step: int, transport: Transport | None) -> tuple[Plan, Work] | Stop:
    """The other ranks: do what rank 0 says until there is something to train, or the run ends."""
    while True:
        session.watch.enter("waiting for rank 0", step)
        order = receive(session.rank, session.layout, session.control)
        if not isinstance(order, Order) or isinstance(order, Stop):
            return order
        obey(order, session, transport, None)


def _driver_state(leader: Leader | None, step: int) -> tuple[dict[str, Any], bytes]:
    if leader is None:
        return {}, b""
    state, carried = leader.collector.state()
    return {"step": step, **state}, carried
