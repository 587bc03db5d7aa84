"""Does rank 0's part of a weight update: the servers get the present weights, prove it, and release and resume
memory."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.config.schema import RlConfig
from megatron_rl.errors import Fault
from megatron_rl.rollout.client import ServerError, ServerLost
from megatron_rl.rollout.pool import WEIGHTS, WORKSPACE, WeightsNeeded
from megatron_rl.sync.transport import PushSeconds, Receivers
from megatron_rl.train.orchestrator.commands import Checksums, Command, Push
from megatron_rl.train.orchestrator.group_source import ServerGroups
from megatron_rl.train.orchestrator.weight_check import differing, told_difference

log = logging.getLogger(__name__)

# Log-probs may differ by so many times the tolerance if every tensor is the trainer's. Then only the two programs'
# roundings differ, which bfloat16 makes large for unlikely text. A larger difference means another model.
_SAME_TENSORS = 10.0

# Says a command to all ranks and does it on this one.
Commands = Callable[[Command, Receivers | None], Any]


class WeightUpdates:
    """Updates the weights of the servers from which a run samples."""

    def __init__(self, config: RlConfig, servers: ServerGroups, command: Commands) -> None:
        self._config, self._servers, self._command = config, servers, command
        self._version = 0

    @property
    def can_refill(self) -> bool:
        """Tell whether servers that come back need `refill`, and there is memory for a push while the others
        generate."""
        return self._config.sync.transport != "disk" and not self._config.rollout.release_memory

    def update(self, step: int) -> dict[str, float]:
        """Push the present weights to every server as version `step`, and check them where it is time. Return the
        seconds of the parts. Raise WeightsNeeded when a server was lost on the way, and Fault when weights did not
        arrive."""
        started = time.perf_counter()
        self._version = step
        times = self._push(step)
        every = self._config.sync.probe_every
        if every and step % every == 0:
            self._prove(step)
        return {**times, "update_weights_seconds": time.perf_counter() - started}

    def refill(self) -> None:
        """Give the weights of the last update to servers that came back after it, while the others generate. A server
        that is lost again meanwhile is taken out, and comes back once more."""
        receivers = Receivers(pool=self._servers.pool, run=self._servers.run, late=True)
        try:
            self._command(Push(version=self._version), receivers)
        except ServerLost as error:
            log.warning("%s; the other servers go on", error)

    def release(self) -> dict[str, float]:
        """Take the servers' memory for training, where the configuration says so. Returns the seconds that it took."""
        if not self._config.rollout.release_memory:
            return {}
        started = time.perf_counter()
        self._servers.run(self._servers.pool.release_memory())
        return {"release_seconds": time.perf_counter() - started}

    def _push(self, step: int) -> dict[str, float]:
        """Push the weights. Servers that released their memory take that of the weights again before, and the rest
        afterwards: while buckets of the trainer travel there need not be room for a cache as well."""
        resume_seconds = self._resume(WEIGHTS)
        receivers = Receivers(pool=self._servers.pool, run=self._servers.run)
        try:
            seconds: PushSeconds = self._command(Push(version=step), receivers)
        except ServerLost as error:
            raise WeightsNeeded(str(error)) from error
        resume_seconds += self._resume(WORKSPACE)
        times = {"export_seconds": seconds.export, "send_seconds": seconds.send, "install_seconds": seconds.install}
        return times | ({"resume_seconds": resume_seconds} if self._config.rollout.release_memory else {})

    def _resume(self, parts: Sequence[str]) -> float:
        """Have the servers take the memory of these parts again. Return how long it took."""
        started = time.perf_counter()
        if self._config.rollout.release_memory:
            self._servers.run(self._servers.pool.resume_memory(parts))
        return time.perf_counter() - started

    def _prove(self, step: int) -> None:
        """Compare every server's log-probs with the trainer's. Raise Fault when they differ, with the names of tensors
        that differ where the server can tell. Only warn when log-probs differ and all tensors are the same."""
        urls, probe = self._servers.probe(self._config.sync.probe_tokens)
        differences = self._command(probe, None)
        tolerance = self._config.probe_tolerance
        for url, difference in zip(urls, differences, strict=True):
            if difference <= tolerance:
                continue
            told = (
                f"log-probs of {len(probe.token_ids) - probe.start} tokens differ by {difference:.3g} in the mean "
                f"(sync.probe_tolerance {tolerance:g})"
            )
            are_there, tensors = self._compared(url)
            if not are_there:
                raise Fault(f"weights {step} did not arrive whole at {url}: {told}; {tensors}")
            if difference > _SAME_TENSORS * tolerance:
                raise Fault(f"{url} has weights {step} and computes something else with them: {told}; {tensors}")
            log.warning(
                "weights %d are at %s, every tensor of them, and yet %s: the two round differently. If "
                "logprob_difference_mean in the metrics is large too, set model.dtype = 'float32'; else raise "
                "sync.probe_tolerance, which saves this comparison",
                step,
                url,
                told,
            )

    def _compared(self, url: str) -> tuple[bool, str]:
        """Tell whether all tensors of the server at `url` are the trainer's, and in words which are not."""
        try:
            theirs, dtypes = self._servers.run(self._servers.pool.client(url).weight_checksums())
        except ServerError as error:
            return False, f"which tensors differ cannot be told ({error})"
        ours = self._command(Checksums(dtypes=dtypes), None)
        return not any(differing(ours, theirs)), told_difference(ours, theirs)
