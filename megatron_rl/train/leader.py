"""Rank 0's part of a step: it talks to the servers, scores, plans, logs, and gives the orders that all ranks obey."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_rl.c3po.packing import cost_model
from megatron_rl.c3po.plan import Schedule
from megatron_rl.config.schema import RlConfig
from megatron_rl.errors import EXIT_DONE, EXIT_FAULT, EXIT_MISTAKE, Fault, SharedFault, StopRequested
from megatron_rl.records import Plan
from megatron_rl.rollout.archive import Carry, pack_carry
from megatron_rl.rollout.client import ServerError, ServerLost
from megatron_rl.rollout.pool import WEIGHTS, WORKSPACE, WeightsNeeded
from megatron_rl.sync.transport import PushSeconds, Receivers, Transport
from megatron_rl.train import traces
from megatron_rl.train.collector import Collector
from megatron_rl.train.exchange import Checksums, Order, Probe, Push, Stop, Work, send_order, send_work
from megatron_rl.train.guards import Alarms
from megatron_rl.train.metrics import MetricsLog, console
from megatron_rl.train.probe import mean_differences, told_difference, weight_checksums
from megatron_rl.train.resilience import StopSignals, disk_fault
from megatron_rl.train.serving import NodeServers
from megatron_rl.train.session import Session
from megatron_rl.train.trainer import StepResult

log = logging.getLogger(__name__)

_PUSHES = 3  # of the same weights, before a run gives up


def obey(order: Order, session: Session, transport: Transport | None, receivers: Receivers | None) -> Any:
    """Collective."""
    match order:
        case Push():
            assert transport is not None
            session.watch.enter("sync", order.version)
            session.model.gather_weights()
            return transport.push(order.version, receivers)
        case Probe():
            return mean_differences(session.trainer, order, session.control)
        case Checksums():
            return weight_checksums(session.trainer, order.dtypes, session.control)


class Leader:
    """Rank 0's part of a step, before and after the train phase."""

    def __init__(
        self,
        config: RlConfig,
        session: Session,
        signals: StopSignals,
        first: int,
        restored: tuple[Any, bytes] | None,
        source: NodeServers | Path,
        transport: Transport | None,
    ) -> None:
        """source: the servers, or the file that is trained from in their place. transport: with servers."""
        self._config, self._session, self._transport = config, session, transport
        self._first = first
        self._metrics: MetricsLog | None = None
        self._alarms = Alarms(config.train, ())
        self._schedule: Schedule | None = None
        self._row: dict[str, Any] = {}
        self._started = self._trained_from = 0.0
        # Of the end of a step; raised at the start of the next: there the other ranks listen, here they may be saving.
        self._failure: Fault | None = None
        # It failed in an order: the others may be in a collective that this rank has left, and do not listen.
        self._is_alone = False
        try:
            self.collector = Collector(config, session.layout, cost_model(session.bailing), signals, source)
            if restored:
                self.collector.restore(*restored)
            self._metrics = MetricsLog(config.run_dir, first)
            self._alarms = Alarms(config.train, self._metrics.past)
        except StopRequested:
            self._order(Stop(exit_code=None))
            raise
        except Exception as error:
            self._tell(error)
            raise

    def begin(self, step: int) -> tuple[Plan, Work] | Stop:
        """Weights to the servers, rollout, plan, and everybody's samples on their way."""
        self._started = time.perf_counter()
        try:
            # Without checkpoints a run begins anew, and what it sampled before would only fill the disk.
            covered = step if self._config.train.save_every == 0 else self._session.checkpoints.latest or 0
            self.collector.forget(lambda past: past < covered)
            if self._failure is not None:
                raise self._failure
            with console.status(f"step {step + 1}/{self._config.train.steps}: rollout"):
                schedule, times = self._collect(step)
            if self._releases_memory:
                started = time.perf_counter()
                self._release()
                times["release_seconds"] = time.perf_counter() - started
        except StopRequested:
            return self._order(Stop(exit_code=None))
        except SharedFault:
            raise  # as every rank does
        except Exception as error:
            self._tell(error)
            raise
        traced = traces.chosen(schedule, self._config.train.traced_groups)
        self._schedule = schedule = replace(schedule, plan=replace(schedule.plan, traced=traced))
        self._row |= times
        self._trained_from = time.perf_counter()
        return send_work(schedule.plan, schedule.samples, self._session.layout, self._session.control)

    def end(
        self, step: int, results: list[StepResult], offload_seconds: float = 0.0, reload_seconds: float = 0.0
    ) -> None:
        """Log the step. The first one is also the gate: the servers must have sampled from the weights trained here.

        offload_seconds, reload_seconds: what making room for servers took before `begin`, and the way back behind it.
        """
        assert self._metrics is not None and self._schedule is not None
        now = time.perf_counter()
        last = results[-1]
        seconds = now - self._started + offload_seconds
        train_seconds = now - self._trained_from - reload_seconds
        trained = sum(r.num_forward_tokens for r in results)
        padding = sum(r.num_padding_tokens for r in results)
        row = {
            "step": step,
            **self._row,
            "num_loss_tokens": last.num_loss_tokens,
            "num_loss_tokens_by_step": [r.num_loss_tokens for r in results],
            "num_forward_tokens": trained,
            "padding_share": padding / max(1, trained + padding),
            "num_skipped_steps": sum(r.skipped for r in results),
            "grad_norm": last.grad_norm,
            "learning_rate": last.learning_rate,
            **last.metrics,
            # Of the first optimizer step: its tokens are the only ones that the trained weights themselves sampled.
            **{name: value for name, value in results[0].metrics.items() if name.startswith("logprob_difference")},
            "train_seconds": train_seconds,
            "step_seconds": seconds,
            "num_failed_saves": self._session.checkpoints.num_failed_saves,
            "trained_tokens_per_second": trained / train_seconds,
            "end_to_end_tokens_per_second": self._row["num_generated_tokens"] / seconds,
            **self._session.memory_metrics(),
        }
        if self._releases_memory:
            row |= {"offload_seconds": offload_seconds, "reload_seconds": reload_seconds}
        self._alarms.report(row)
        try:
            self._metrics.write(row)
            if row["num_skipped_steps"]:
                self._keep_skipped(step, results)
        except OSError as error:
            self._failure = disk_fault(self._config, "the metrics of this step are not written", error)
        self._write_traces(step, results)
        tolerance = self._config.rollout.logprob_tolerance
        if step == self._first and row["logprob_difference_p999"] > tolerance:
            found = row["logprob_difference_p999"]
            self._failure = Fault(
                f"log-probs of servers and trainer differ by {found:.3g} at the 99.9th percentile in the first step "
                f"(rollout.logprob_tolerance {tolerance:g}): the servers run other weights or another model, or the "
                "precision is too low"
            )
            log.error("%s", self._failure)
            self.collector.forget(lambda sampled: sampled >= step)
        console.print(
            f"step {step + 1}/{self._config.train.steps}  reward {row['reward']:.3f}  entropy {row['entropy']:.3f}  "
            f"grad norm {row['grad_norm']:.3f}  tokens {row['num_loss_tokens']:,}  "
            f"rollout {row['rollout_seconds']:.2f} s  train {row['train_seconds']:.2f} s  "
            f"log-prob diff p99.9 {row['logprob_difference_p999']:.1e}",
            soft_wrap=True,
        )

    def _write_traces(self, step: int, results: list[StepResult]) -> None:
        assert self._schedule is not None
        path = self._config.run_dir / "tokens" / f"step_{step:06d}.jsonl"
        try:
            traces.write(path, self._schedule, [r.traced_logprobs for r in results], self.collector.decode)
        except OSError as error:
            self._failure = disk_fault(self._config, "the token traces of this step are not written", error)

    def _keep_skipped(self, step: int, results: list[StepResult]) -> None:
        """The batch of a step that was skipped, for whoever wants to know why."""
        assert self._schedule is not None
        folder = self._config.run_dir / "skipped"
        folder.mkdir(exist_ok=True)
        samples = self._schedule.samples
        carry = Carry(samples=samples, since=(step,) * len(samples))
        (folder / f"step_{step:06d}.npz").write_bytes(pack_carry(carry))
        (folder / f"step_{step:06d}.json").write_text(json.dumps(asdict(self._schedule.plan)))
        log.warning(
            "step %d: skipped, its loss %g or gradient norm %g is not finite; its batch is in %s",
            step + 1,
            results[-1].metrics["loss"],
            results[-1].grad_norm,
            folder,
        )

    def finish(self) -> Stop:
        """After the last step: the run is over. Raises what the gate has found in it."""
        if self._failure is not None:
            self._tell(self._failure)
            raise self._failure
        stop = Stop(exit_code=EXIT_DONE)
        self._order(stop)
        return stop

    def close(self) -> None:
        self.collector.close()
        if self._metrics is not None:
            self._metrics.close()

    def _collect(self, step: int) -> tuple[Schedule, dict[str, float]]:
        """Push, prove and roll out; again when all servers that had the weights were lost. Returns too how long push
        and proof took and, of the push, its parts."""
        for attempt in range(_PUSHES):
            started = time.perf_counter()
            times: dict[str, float] = {}
            try:
                if self._transport is not None:
                    times = self._push(step)
                    every = self._config.sync.probe_every
                    if every and step % every == 0:
                        self._prove(step)
                times["update_weights_seconds"] = time.perf_counter() - started
                self._session.watch.enter("rollout", step)
                schedule, self._row = self.collector.collect(policy_version=step)
                return schedule, times
            except WeightsNeeded as needed:
                if attempt == _PUSHES - 1:
                    raise
                log.warning("%s; pushing the weights again and starting the rollout phase anew", needed)
        raise AssertionError("unreachable")

    def _push(self, step: int) -> dict[str, float]:
        """The present weights to every server, as version `step`. Returns the seconds of its parts.

        Servers that released their memory take that of the weights again before, and the rest behind: while buckets of
        the trainer travel there need not be room for a cache as well.
        """
        pool, run = self.collector.pool, self.collector.run
        assert pool is not None
        resume_seconds = self._resume(WEIGHTS)
        for attempt in range(_PUSHES):
            try:
                seconds: PushSeconds = self._order(Push(version=step), Receivers(pool=pool, run=run))
                break
            except ServerLost as error:
                if attempt == _PUSHES - 1:
                    raise
                log.warning("%s; pushing again", error)
        resume_seconds += self._resume(WORKSPACE)
        times = {"export_seconds": seconds.export, "send_seconds": seconds.send, "install_seconds": seconds.install}
        return times | ({"resume_seconds": resume_seconds} if self._releases_memory else {})

    @property
    def _releases_memory(self) -> bool:
        return self._config.rollout.release_memory and self.collector.pool is not None

    def _release(self) -> None:
        assert self.collector.pool is not None
        self.collector.run(self.collector.pool.release_memory())

    def _resume(self, parts: Sequence[str]) -> float:
        """Returns how long it took."""
        started = time.perf_counter()
        if self._releases_memory:
            assert self.collector.pool is not None
            self.collector.run(self.collector.pool.resume_memory(parts))
        return time.perf_counter() - started

    def _prove(self, step: int) -> None:
        """Fault when a server's log-probs are not the trainer's, with the names of tensors that differ where the server
        can tell."""
        urls, probe = self.collector.probe(self._config.sync.probe_tokens)
        differences = self._order(probe)
        tolerance = self._config.probe_tolerance
        for url, difference in zip(urls, differences, strict=True):
            if difference <= tolerance:
                continue
            raise Fault(
                f"weights {step} did not arrive whole at {url}: log-probs of {len(probe.token_ids)} tokens differ by "
                f"{difference:.3g} in the mean (sync.probe_tolerance {tolerance:g}); {self._differing(url)}"
            )

    def _differing(self, url: str) -> str:
        """The tensors of the server at `url` that are not the trainer's, in words."""
        assert self.collector.pool is not None
        try:
            theirs, dtypes = self.collector.run(self.collector.pool.client(url).weight_checksums())
        except ServerError as error:
            return f"which tensors differ cannot be told ({error})"
        return told_difference(self._order(Checksums(dtypes=dtypes)), theirs)

    def _order(self, order: Order, receivers: Receivers | None = None) -> Any:
        """Say it and do it; a stop is returned."""
        send_order(order, self._session.control)
        if isinstance(order, Stop):
            return order
        try:
            return obey(order, self._session, self._transport, receivers)
        except (ServerError, StopRequested, SharedFault):
            raise  # behind the collectives
        except Exception:
            self._is_alone = True
            raise

    def _tell(self, error: Exception) -> None:
        """Let the other ranks end quietly; this one reports. Where they cannot listen they end as it does, whose
        connections close."""
        if not self._is_alone:
            self._order(Stop(exit_code=EXIT_MISTAKE if isinstance(error, ValueError) else EXIT_FAULT))
