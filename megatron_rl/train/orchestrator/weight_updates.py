"""Rank 0's part of a weight update: the servers get the present weights, prove it, and lend and take memory."""

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
from megatron_rl.train.orchestrator.weight_check import told_difference

# Says a command to all ranks and does it on this one.
Commands = Callable[[Command, Receivers | None], Any]


class WeightUpdates:
    """Updates the weights of the servers from which a run samples."""

    def __init__(self, config: RlConfig, servers: ServerGroups, command: Commands) -> None:
        self._config, self._servers, self._command = config, servers, command

    def update(self, step: int) -> dict[str, float]:
        """Push the present weights to every server as version `step`, and check them where it is time. Returns the
        seconds of the parts. WeightsNeeded when a server was lost on the way; Fault when weights did not arrive."""
        started = time.perf_counter()
        times = self._push(step)
        every = self._config.sync.probe_every
        if every and step % every == 0:
            self._prove(step)
        return {**times, "update_weights_seconds": time.perf_counter() - started}

    def release(self) -> dict[str, float]:
        """Take the servers' memory for training, where the configuration says so. Returns the seconds that it took."""
        if not self._config.rollout.release_memory:
            return {}
        started = time.perf_counter()
        self._servers.run(self._servers.pool.release_memory())
        return {"release_seconds": time.perf_counter() - started}

    def _push(self, step: int) -> dict[str, float]:
        """Servers that released their memory take that of the weights again before, and the rest behind: while buckets
        of the trainer travel there need not be room for a cache as well."""
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
        """Returns how long it took."""
        started = time.perf_counter()
        if self._config.rollout.release_memory:
            self._servers.run(self._servers.pool.resume_memory(parts))
        return time.perf_counter() - started

    def _prove(self, step: int) -> None:
        """Fault when a server's log-probs are not the trainer's, with the names of tensors that differ where the server
        can tell."""
        urls, probe = self._servers.probe(self._config.sync.probe_tokens)
        differences = self._command(probe, None)
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
        try:
            theirs, dtypes = self._servers.run(self._servers.pool.client(url).weight_checksums())
        except ServerError as error:
            return f"which tensors differ cannot be told ({error})"
        return told_difference(self._command(Checksums(dtypes=dtypes), None), theirs)
