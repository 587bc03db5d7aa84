"""Does rank 0's part of a step: pushes weights, has groups collected and planned, commands all ranks, and logs."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar, cast

from megatron_rl.c3po.packing import cost_model
from megatron_rl.c3po.plan import Schedule
from megatron_rl.config.schema import RlConfig
from megatron_rl.errors import EXIT_DONE, EXIT_FAULT, EXIT_MISTAKE, Fault, SharedFault, StopRequested
from megatron_rl.evaluation.validations import Validations, validation_metrics
from megatron_rl.records import Plan
from megatron_rl.rollout.archive import Carry, pack_carry
from megatron_rl.rollout.client import ServerError
from megatron_rl.rollout.pool import WeightsNeeded
from megatron_rl.sync.transport import Receivers, Transport
from megatron_rl.terminal import Eta, fitted, say
from megatron_rl.train.orchestrator.collector import Collector
from megatron_rl.train.orchestrator.commands import (
    Checksums,
    Command,
    NextPhase,
    Probe,
    Push,
    Stop,
    Work,
    send_command,
    send_work,
)
from megatron_rl.train.orchestrator.group_source import GroupSource, ServerGroups
from megatron_rl.train.orchestrator.validation import Validation
from megatron_rl.train.orchestrator.weight_check import mean_differences, weight_checksums
from megatron_rl.train.orchestrator.weight_updates import WeightUpdates
from megatron_rl.train.run.alarms import Alarms
from megatron_rl.train.run.context import TrainContext
from megatron_rl.train.run.metrics import MetricsLog, console
from megatron_rl.train.run.signals import disk_fault
from megatron_rl.train.run.step_row import step_row, token_counts
from megatron_rl.train.run.trackers import Trackers
from megatron_rl.train.step import token_traces as traces
from megatron_rl.train.step.trainer import StepResult

log = logging.getLogger(__name__)

_PUSHES = 3  # of the same weights, before a run gives up

T = TypeVar("T")


def execute(command: Command, context: TrainContext, transport: Transport | None, receivers: Receivers | None) -> Any:
    """Carry out a command of rank 0 on this rank. Collective."""
    match command:
        case Push():
            assert transport is not None
            context.watchdog.enter("sync", command.version)
            context.model.gather_weights()
            return transport.push(command.version, receivers)
        case Probe():
            return mean_differences(context.trainer, command, context.control)
        case Checksums():
            return weight_checksums(context.trainer, command.dtypes, context.control)
        case NextPhase():
            return None


class Orchestrator:
    """Does rank 0's part of a step, before and after the train phase."""

    def __init__(
        self,
        config: RlConfig,
        context: TrainContext,
        first: int,
        restored: tuple[Any, bytes] | None,
        open_source: Callable[[], GroupSource],
        transport: Transport | None,
    ) -> None:
        """Open the source of groups, and continue from a checkpoint. open_source: called here, so that the other ranks
        are told when it fails. transport: with servers."""
        self._config, self._context, self._transport = config, context, transport
        self._first = first
        self._metrics: MetricsLog | None = None
        self._validation: Validation | None = None
        self._alarms = Alarms(config.train)
        self._eta = Eta(config.train.steps)
        self._schedule: Schedule | None = None
        self._row: dict[str, Any] = {}
        self._validated: tuple[int, dict[str, float]] = (-1, {})  # completed steps of the last weights, and metrics
        self._started = self._trained_from = 0.0
        # Found at the end of a step, when other ranks may be saving; raised at the start of the next, when they listen.
        self._failure: Fault | None = None
        # It failed in a command: the others may be in a collective that this rank has left, and do not listen.
        self._is_alone = False
        try:
            self.source = open_source()
            if not context.resume:
                self.source.forget(lambda step: True)  # of another run in this folder
            self._validations = Validations(config.run_dir)
            self._validations.forget_behind(first if context.resume else -1)
            # Only servers need weights.
            servers = cast(ServerGroups, self.source)
            self._updates = WeightUpdates(config, servers, self._command) if transport is not None else None
            if self._updates is not None and self._updates.can_refill:
                servers.refill = self._refill
            if self._updates is not None and config.validation is not None:
                self._validation = Validation(config, config.validation, servers, self._validations)
                context.checkpoints.best = self._validation.best_step
            self.collector = Collector(config, context.layout, cost_model(context.architecture), self.source)
            if restored:
                self.collector.restore(*restored)
            context.accept(first)
            trackers = Trackers(config, first, context.resume)
            self._metrics = MetricsLog(config.run_dir, first, self._alarms.check, trackers)
        except StopRequested:
            self._command(Stop(exit_code=None))
            raise
        except Exception as error:
            self._tell(error)
            raise

    def begin(self, step: int) -> tuple[Plan, Work] | Stop:
        """Push weights to the servers, roll out, plan, and send every rank its samples."""
        self._started = time.perf_counter()
        try:
            # Without checkpoints a run begins anew, and what it sampled before would only fill the disk.
            latest = self._context.checkpoints.latest or 0
            covered = latest if self._config.train.has_checkpoints else step
            self.source.forget(lambda past: past < covered)
            if self._failure is not None:
                raise self._failure
            self.collector.files.check()
            with console.status(f"step {step} of {self._config.train.steps}: rollout"):
                schedule, self._row = self._with_weights(lambda: self._collect(step))
            if self._updates is not None:
                self._row |= self._updates.release()
        except StopRequested:
            return self._command(Stop(exit_code=None))
        except SharedFault:
            raise  # as every rank does
        except Exception as error:
            self._tell(error)
            raise
        traced = traces.chosen(schedule, self._config.train.traced_groups)
        self._schedule = schedule = replace(schedule, plan=replace(schedule.plan, traced=traced))
        self._trained_from = time.perf_counter()
        return send_work(schedule.plan, schedule.samples, self._context.layout, self._context.control)

    def end(
        self, step: int, results: list[StepResult], offload_seconds: float = 0.0, reload_seconds: float = 0.0
    ) -> None:
        """Log the step. The first one is also the gate: the servers must have sampled from the weights trained here.

        offload_seconds, reload_seconds: what making room for servers took before `begin`, and the way back behind it.
        """
        assert self._metrics is not None and self._schedule is not None
        now = time.perf_counter()
        seconds = now - self._started + offload_seconds - self._row.get("validation_seconds", 0.0)
        train_seconds = now - self._trained_from - reload_seconds
        context = self._context
        failed_saves, memory = context.checkpoints.num_failed_saves, context.memory_metrics()
        row = self._row | step_row(step, results, train_seconds, seconds, failed_saves, memory) | token_counts(results)
        row |= {
            "train_seconds": train_seconds,
            "end_to_end_tokens_per_second": row["num_generated_tokens"] / seconds,
        }
        if "release_seconds" in row:
            row |= {"offload_seconds": offload_seconds, "reload_seconds": reload_seconds}
        self._alarms.report(row, self.collector.examples)
        try:
            self._metrics.write(row)
            if row["num_skipped_steps"]:
                self._keep_skipped(step, results)
        except OSError as error:
            self._failure = disk_fault(self._config, "the metrics of this step are not written", error)
        self._write_traces(step, results)
        tolerance = self._config.logprob_tolerance
        if step == self._first and row["logprob_difference_p999"] > tolerance:
            found = row["logprob_difference_p999"]
            self._failure = Fault(
                f"log-probs of servers and trainer differ by {found:.3g} at the 99.9th percentile in the first step "
                f"(rollout.logprob_tolerance {tolerance:g}): the servers run other weights or another model, or the "
                "precision is too low"
            )
            log.error("%s", self._failure)
            self.source.forget(lambda sampled: sampled >= step)
            self._validations.forget_behind(step - 1)
        self._print(step, row)

    def _print(self, step: int, row: Mapping[str, Any]) -> None:
        """Print the line of a step for the person at the terminal."""
        say(
            fitted(
                [
                    f"step {step} of {self._config.train.steps}",
                    f"reward {row['reward']:.3f}",
                    f"no answer {row['no_answer_share']:.0%}",
                    f"errors {share:.0%}" if (share := row["reward_error_share"]) else "",
                    f"entropy {row['entropy']:.2f}" if row["num_loss_tokens"] else "",
                    "" if any(row["num_loss_tokens_by_step"]) else "nothing trained",
                    f"{row['step_seconds']:.3g} s",
                    self._eta.after(step, row["step_seconds"]) or "last step",
                ]
            )
        )

    def _write_traces(self, step: int, results: list[StepResult]) -> None:
        assert self._schedule is not None
        if not self._schedule.plan.traced:
            return
        path = self._config.run_dir / "tokens" / f"step_{step:06d}.jsonl"
        rows = traces.lines(self._schedule, [r.traced_logprobs for r in results], self.source.decode)
        self.collector.files.write(path, rows, "the token traces of this step are not written")

    def _keep_skipped(self, step: int, results: list[StepResult]) -> None:
        """Write the batch of a skipped step to a file, for whoever wants to know why it was skipped."""
        assert self._schedule is not None
        folder = self._config.run_dir / "skipped"
        folder.mkdir(exist_ok=True)
        samples = self._schedule.samples
        carry = Carry(samples=samples, since=(step,) * len(samples))
        (folder / f"step_{step:06d}.npz").write_bytes(pack_carry(carry))
        (folder / f"step_{step:06d}.json").write_text(json.dumps(asdict(self._schedule.plan)), encoding="utf-8")
        log.warning(
            "step %d: skipped, its loss %g or gradient norm %g is not finite; its batch is in %s",
            *(step, results[-1].metrics["loss"], results[-1].grad_norm, folder),
        )

    def finish(self) -> Stop:
        """Validate the weights of the last step, and end the run. Raise the failure that `end` has noted in that
        step."""
        last = self._config.train.steps
        try:
            if self._failure is not None:
                raise self._failure
            if self._validation is not None:
                if self._updates is not None and not self._validation.has(last):
                    self._with_weights(lambda: self._update(last))
                    self._updates.release()
                if told := self._validation.told_best():
                    say(told)
        except StopRequested:
            return self._command(Stop(exit_code=None))
        except SharedFault:
            raise  # as every rank does
        except Exception as error:
            self._tell(error)
            raise
        covered = self._context.checkpoints.latest or 0
        self.source.forget(lambda past: past < covered)
        stop = Stop(exit_code=EXIT_DONE)
        self._command(stop)
        return stop

    def settle(self) -> str | None:
        """Wait, before a checkpoint, until the files of the steps that it covers are on the disk, since a resumed run
        does not write them again. Return why the run cannot go on, if it cannot."""
        fault = self.collector.files.settle()
        return None if fault is None else str(fault)

    def close(self) -> None:
        self.source.close()
        self.collector.close()
        if self._validation is not None:
            self._validation.close()
        if self._metrics is not None:
            self._metrics.close()

    def _collect(self, step: int) -> tuple[Schedule, dict[str, Any]]:
        """Update the servers' weights, validate them where it is time, and roll out. Returns the plan, and metrics
        beside it."""
        times = self._update(step)
        self._context.watchdog.enter("rollout", step)
        schedule, metrics = self.collector.collect(policy_version=step)
        return schedule, metrics | times

    def _with_weights(self, work: Callable[[], T]) -> T:
        """Do work for which servers need the weights. Do it again when all servers that had them were lost."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return work()
            except WeightsNeeded as needed:
                if attempt == _PUSHES:
                    raise
                log.warning("%s; pushing the weights again and starting the phase anew", needed)

    def _update(self, num_steps: int) -> dict[str, float]:
        """Give the servers the weights of so many completed steps, and validate them. Returns metrics."""
        if self._updates is None:
            return {"update_weights_seconds": 0.0}
        times = self._updates.update(num_steps)
        return times | (self._validate(num_steps) if self._config.is_validated(num_steps) else {})

    def _refill(self) -> None:
        """Give the weights to servers that came back, in a phase in which servers generate."""
        assert self._updates is not None
        watchdog = self._context.watchdog
        phase, step = watchdog.phase, watchdog.step
        self._updates.refill()
        watchdog.enter(phase, step)

    def _validate(self, num_steps: int) -> dict[str, float]:
        """Validate the servers' weights, and return metrics. Trackers are told those of the last weights here, since no
        step begins with them."""
        assert self._validation is not None and self._metrics is not None
        if self._validated[0] == num_steps:  # before the servers were lost
            return self._validated[1]
        started = time.perf_counter()
        self._context.watchdog.enter("validate", num_steps)
        try:
            found = validation_metrics(self._validation.run(num_steps))
        except OSError as error:
            fault = disk_fault(self._config, "the validation of this step is not complete", error)
            if fault is not None:
                raise fault from error
            found = {}
        self._command(NextPhase())
        self._context.checkpoints.best = self._validation.best_step
        found["validation_seconds"] = time.perf_counter() - started
        self._validated = num_steps, found
        if num_steps == self._config.train.steps:
            self._metrics.track(num_steps, found)
        return found

    def _command(self, command: Command, receivers: Receivers | None = None) -> Any:
        """Send a command to the other ranks and do it here. A Stop is returned."""
        send_command(command, self._context.control)
        if isinstance(command, Stop):
            return command
        try:
            return execute(command, self._context, self._transport, receivers)
        except (ServerError, StopRequested, SharedFault):
            raise  # behind the collectives
        except Exception:
            self._is_alone = True
            raise

    def _tell(self, error: Exception) -> None:
        """Tell the other ranks to end quietly; this one reports the error. Ranks that cannot listen end as this one
        does, because its connections close."""
        if not self._is_alone:
            self._command(Stop(exit_code=EXIT_MISTAKE if isinstance(error, ValueError) else EXIT_FAULT))
