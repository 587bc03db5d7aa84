"""Runs the training loop: synchronous rollout and train phases under a token budget. Every rank runs it; rank 0 leads.

Rank 0 alone talks to the servers, scores and plans, and says what all ranks do next: push weights, check that they
arrived, train a plan, or stop. The others wait for its word on gloo.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megatron_rl import device
from megatron_rl.config.schema import RlConfig
from megatron_rl.errors import EXIT_DONE, SharedFault, StopRequested
from megatron_rl.gpus import chosen_backend, visible_gpus
from megatron_rl.keys import key_in_environment
from megatron_rl.place import own_place
from megatron_rl.preflight.checks import check_seats
from megatron_rl.records import Plan
from megatron_rl.sync.all_ranks import on_all_ranks
from megatron_rl.sync.distributed import DistributedTransport
from megatron_rl.sync.folder import WeightFolder
from megatron_rl.sync.ipc import IpcTransport
from megatron_rl.sync.transport import DiskTransport, Transport
from megatron_rl.train.orchestrator.commands import Command, Stop, Work, receive
from megatron_rl.train.orchestrator.group_source import GroupSource, RecordedGroups, ServerGroups
from megatron_rl.train.orchestrator.node_servers import NodeServers, is_one_machine
from megatron_rl.train.orchestrator.orchestrator import Orchestrator, execute
from megatron_rl.train.run.alarms import SkipGuard
from megatron_rl.train.run.context import TrainContext
from megatron_rl.train.run.signals import StopSignals, told_in_words
from megatron_rl.train.step.objective import PolicyObjective
from megatron_rl.train.step.trainer import Batches, StepResult

log = logging.getLogger(__name__)


def run_rl(config: RlConfig, resume: bool, rollouts: Path | None = None, keys: Mapping[str, str] | None = None) -> int:
    """Train for `train.steps` steps and export `run_dir/hf`. Returns the exit code.

    rollouts: a file to train from (rollout/rollout_file.py); then there are no servers. keys: of the servers at
    rollout.urls, by their url, where rollout.api_key_variable does not name the one key of all.
    """
    if keys is None:
        key = key_in_environment(config.rollout.api_key_variable, "rollout.api_key_variable")
        keys = dict.fromkeys(config.rollout.urls, key)
    teacher = config.distillation
    teacher_key = key_in_environment(teacher.api_key_variable if teacher else "", "distillation.api_key_variable")
    if rollouts is None:
        check_seats(config, own_place().local_world_size, device.on_cuda())
    signals = StopSignals()
    num_optimizer_steps = config.train.steps * config.algorithm.optimizer_steps_of_phase
    context = TrainContext(config, num_optimizer_steps, resume, check=signals.check)
    context.watchdog.num_steps = config.train.steps
    # Every part is closed, whatever another one raises.
    with context, ExitStack() as parts, told_in_words(context.watchdog):
        if config.algorithm.kl_coefficient:
            context.trainer.keep_reference()
        restored = context.restore()
        first = restored[0]["step"] if restored else 0
        if first > config.train.steps:
            raise ValueError(
                f"the checkpoint is of step {first}, and this configuration ends after {config.train.steps}; raise "
                "train.steps, or set run_dir to a new folder"
            )
        servers: NodeServers | None = None
        teachers: NodeServers | None = None
        transport = None
        try:
            if rollouts is None:
                folder = WeightFolder(
                    context.control,
                    context.architecture.num_parameters() * context.model.dtype.itemsize,
                    shared=None if is_one_machine(config.rollout.urls) else config.run_dir,
                )
                parts.callback(folder.close)
                context.export(folder.path)  # what servers start with, now and whenever one is started again
                _make_room(config, context, None)  # servers size their caches by what is free when they start
                servers = NodeServers(config, folder.path, context.control, signals, keys)
                parts.callback(servers.close)
                if teacher is not None:
                    teacher_keys = dict.fromkeys(teacher.urls, teacher_key)
                    teachers = NodeServers(config, teacher.path, context.control, signals, teacher_keys, teacher)
                    parts.callback(teachers.close)
                transport = _transport(config, context, folder, servers, first)
                parts.callback(transport.close)
            orchestrator = None
            if context.is_rank_zero:
                open_source = partial(_open_source, config, context, signals, servers, teachers, rollouts)
                orchestrator = Orchestrator(config, context, first, restored, open_source, transport)
                parts.callback(orchestrator.close)
        except StopRequested:
            context.exit_code = context.stop_code  # before the first step: there is nothing to save yet
        else:
            context.tell((first, config.train.steps), servers.urls if servers is not None else None)
            context.exit_code = _steps(config, context, first, orchestrator, transport, servers)
    context.tell_end("train", config.train.steps)
    return context.exit_code


def _steps(
    config: RlConfig,
    context: TrainContext,
    first: int,
    orchestrator: Orchestrator | None,
    transport: Transport | None,
    servers: NodeServers | None,
) -> int:
    """Train from step `first` to the end. Return the exit code."""
    objective = PolicyObjective(config.algorithm, context.context_parallel_group)
    skips = SkipGuard(config.train, "Their batches are in run_dir/skipped. ")
    for step in range(first, config.train.steps):
        offload_seconds = _make_room(config, context, servers)
        work = orchestrator.begin(step) if orchestrator else _follow(context, step, transport)
        if isinstance(work, Stop):
            if work.exit_code is not None:
                return work.exit_code
            if step > first:
                _save(context, orchestrator, step)
                context.settle(wait=True)
            return context.stop_code
        reload_seconds = _take_room(config, context, servers)
        context.watchdog.enter("train", step)
        device.reset_peak_memory()
        results = _train(context, config, objective, *work)
        if orchestrator:
            orchestrator.end(step, results, offload_seconds, reload_seconds)
        context.settle()
        skips.check(results)
        keeps_best = bool(config.train.keep_best) and config.is_validated(step + 1)
        if keeps_best or context.save_is_due(step + 1, config.train.steps):
            _save(context, orchestrator, step + 1)
    context.settle(wait=True)
    if config.validation is not None:
        _make_room(config, context, servers)
    last = orchestrator.finish() if orchestrator else _follow(context, config.train.steps, transport)
    assert isinstance(last, Stop)
    if last.exit_code is None:  # in the last validation, before which all is saved
        return context.stop_code
    if last.exit_code == EXIT_DONE:
        context.export(config.run_dir / "hf")
    return last.exit_code


def _make_room(config: RlConfig, context: TrainContext, servers: NodeServers | None) -> float:
    """Make room for servers on the same GPUs, before they take their memory. What training alone needs leaves the GPUs,
    and servers that ended are started again. Return the seconds that it took."""
    started = time.perf_counter()
    if config.train.offload_while_generating:
        context.trainer.offloader.offload()
    if config.rollout.release_memory and servers is not None and servers.supervisor is not None:
        servers.supervisor.let_go()
    return time.perf_counter() - started


def _take_room(config: RlConfig, context: TrainContext, servers: NodeServers | None) -> float:
    """Take the GPUs back for training, once servers have released their memory. No server is started from here on, and
    what has left the GPUs comes back. Collective. Return the seconds that it took. Raise SharedFault when a rank has no
    room for it."""
    started = time.perf_counter()
    offloader, seconds = context.trainer.offloader, config.train.free_memory_deadline_seconds

    def reload() -> None:
        if servers is not None and servers.supervisor is not None:
            servers.supervisor.hold()
        device.wait_until_free(offloader.missing_bytes, seconds)
        offloader.reload()

    if config.rollout.release_memory:
        on_all_ranks(reload, context.control)
    return time.perf_counter() - started


def _open_source(
    config: RlConfig,
    context: TrainContext,
    signals: StopSignals,
    servers: NodeServers | None,
    teachers: NodeServers | None,
    rollouts: Path | None,
) -> GroupSource:
    if servers is not None:
        return ServerGroups(config, context.layout, signals, servers, teachers)
    assert rollouts is not None
    return RecordedGroups(config, rollouts, signals)


def _transport(
    config: RlConfig, context: TrainContext, folder: WeightFolder, servers: NodeServers, version: int
) -> Transport:
    """Make the transport that takes weights to the servers. Collective. version: of the weights that are in the folder
    already."""
    if config.sync.transport == "disk":
        return DiskTransport(folder, context.export, version)
    max_bytes, silence_seconds = config.sync.bucket_mb * 2**20, config.rollout.silence_seconds
    if config.sync.transport == "ipc":
        num_gpus = len(visible_gpus())
        return IpcTransport(
            context.model,
            context.control,
            max_bytes,
            servers.node,
            servers.supervisor.urls if servers.supervisor is not None else (),
            config.rollout.servers_on(num_gpus),
            num_gpus,
            silence_seconds,
            servers.key_of,
        )
    backend = chosen_backend(config.sync.backend, config.rollout.engine, device.on_cuda(), servers.beside)
    if context.is_rank_zero:
        log.info("weights go to the servers over %s", backend)
    return DistributedTransport(
        context.model, context.control, max_bytes, servers.address, silence_seconds, backend, servers.key_of
    )


def _train(
    context: TrainContext, config: RlConfig, objective: PolicyObjective, plan: Plan, work: Work
) -> list[StepResult]:
    """Run the train phase: the plan's optimizer steps over this rank's samples."""
    trainer, temperature = context.trainer, config.rollout.temperature
    batches: list[Batches] = [trainer.prefetch(step) for step in work]
    if config.algorithm.trains_on_own_old_logprobs and len(batches) > 1:
        # The first step starts from the weights that these log-probs would be of, and needs none.
        batches[1:] = [trainer.with_old_logprobs(step, temperature) for step in batches[1:]]
    return [
        trainer.train_step(step, objective, planned.denominator, temperature)
        for planned, step in zip(plan.steps, batches, strict=True)
    ]


def _follow(context: TrainContext, step: int, transport: Transport | None) -> tuple[Plan, Work] | Stop:
    """Do what rank 0 says until there is something to train, or the run ends. Runs on the other ranks."""
    while True:
        context.watchdog.enter("waiting for rank 0", step)
        command = receive(context.rank, context.layout, context.control)
        if not isinstance(command, Command) or isinstance(command, Stop):
            return command
        execute(command, context, transport, None)


def _save(context: TrainContext, orchestrator: Orchestrator | None, step: int) -> None:
    """Save a checkpoint after `step` completed steps, whose files are on the disk before it. Collective. Raise
    SharedFault, and save nothing, where those files could not be written."""
    context.watchdog.enter("save", step)
    refused, *_ = on_all_ranks(orchestrator.settle if orchestrator else None, context.control)
    if refused is not None:
        raise SharedFault(refused)
    state, carried = orchestrator.collector.state() if orchestrator else ({}, b"")
    context.save(step, {"step": step, **state} if orchestrator else {}, carried)
