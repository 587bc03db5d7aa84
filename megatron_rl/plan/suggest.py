"""This module is `megatron-rl plan --suggest`: it finds the fastest layouts that fit on the given GPUs, with the keys
to set."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.layout import Layout
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig, RunConfig
from megatron_rl.families import Architecture
from megatron_rl.memory import RankBytes, host_bytes, rank_bytes
from megatron_rl.model import backends
from megatron_rl.plan.gpus import gpu_bytes
from megatron_rl.plan.servers import GIB
from megatron_rl.plan.speed import SpeedModel
from megatron_rl.simulation.rates import Rates

# The shares of a GPU's memory that a suggestion may fill. The first leaves room for what estimates do not count
# (docs/gpu.md); the second is tried where nothing fits into that.
_MARGINS = (0.95, 1.0)
_SHOWN = 3
_SHARES = (0.85, 0.7, 0.55, 0.4)  # of --mem-fraction-static
_OFFLOADED = (0.0, 0.5, 1.0)
# Predictions are no better than this; where they differ by less the layout that changes fewer keys is better.
_SAME = 0.05
_TENSOR, _SHARE = ("--tp-size", "--tp", "--tensor-parallel-size"), ("--mem-fraction-static",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """Holds one layout. config: with everything set. keys: the settings that differ from the configuration, by key.
    seconds: predicted for a step, by part. memory: bytes of the fullest GPU of each kind. host_bytes: of a training
    node's memory."""

    config: RunConfig
    keys: dict[str, Any]
    seconds: dict[str, float]
    memory: dict[str, int]
    host_bytes: int

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the suggestion for JSON."""
        return {
            "set": self.keys,
            "step_seconds": round(self.step_seconds, 2),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "memory": self.memory,
            "host_memory": self.host_bytes,
        }


def suggest(search: "Search") -> list[Suggestion]:
    """Return the fastest few layouts that fit, the fastest first; none when nothing fits."""
    for margin in _MARGINS:
        found = sorted(search.fitting(margin), key=lambda one: one.step_seconds)
        if found:
            return _distinct(found)
    return []


def _distinct(found: Sequence[Suggestion]) -> list[Suggestion]:
    """Choose, among the layouts about as fast as the first, the one that changes the fewest keys and fills its GPUs the
    least. Then do the same with the next ones, which are slower."""
    shown: list[Suggestion] = []
    left = list(found)
    while left and len(shown) < _SHOWN:
        limit = left[0].step_seconds * (1 + _SAME)
        alike = [one for one in left if one.step_seconds <= limit]
        shown.append(min(alike, key=lambda one: (len(one.keys), max(one.memory.values()))))
        left = left[len(alike) :]
    return shown


class Search:
    """Searches all layouts of one configuration on one cluster."""

    def __init__(self, config: RunConfig, architecture: Architecture, cluster: ClusterSection) -> None:
        """Prepare the search. ValueError without a limit of memory."""
        if not cluster.gpu_memory_gb:
            raise ValueError("--suggest needs the memory of a GPU to fit into; set --gpu-memory-gb")
        self._config, self._architecture, self._cluster = config, architecture, cluster
        rates = load_config(Rates, cluster.rates) if cluster.rates is not None else None
        self._speed = SpeedModel(config=config, architecture=architecture, cluster=cluster, rates=rates)
        self._rollout_seconds = cache(self._speed.rollout_seconds)

    def fitting(self, margin: float) -> Iterator[Suggestion]:
        """Yield every layout that needs no more than this share of the memory."""
        servers = list(self._servers())
        for trained in self._trained():
            state = self._trainer(trained)
            if state[0].total <= self._limit(margin):
                for changes in servers:
                    yield from self._evaluated(_with_servers(trained, changes), *state, margin)

    def evaluated(self, config: RunConfig, margin: float = 1.0) -> Iterator[Suggestion]:
        """Yield what is predicted for one configuration, if it divides the model and fits."""
        layout = config.parallel.layout(self._cluster.training_ranks)
        if any(layout.problems(self._architecture)):
            return
        yield from self._evaluated(config, *self._trainer(config), margin)

    def _trainer(self, config: RunConfig) -> tuple[RankBytes, float]:
        """Return what the fullest training rank holds, and the seconds of the optimizer steps. Servers change
        neither."""
        layout = config.parallel.layout(self._cluster.training_ranks)
        fullest = max(rank_bytes(config, self._architecture, layout), key=lambda rank: rank.total)
        return fullest, self._speed.train_seconds(config, layout)

    def _evaluated(
        self, config: RunConfig, fullest: RankBytes, train_seconds: float, margin: float
    ) -> Iterator[Suggestion]:
        memory, numbers, against = gpu_bytes(asdict(fullest), config, self._architecture, self._cluster)
        totals = {name: sum(parts.values()) for name, parts in memory.items() if name != "host"}
        if against or max(totals.values()) > self._limit(margin):
            return
        layout = config.parallel.layout(self._cluster.training_ranks)
        seconds = {"train": train_seconds, "pauses": self._speed.pause_seconds(config, layout)}
        if isinstance(config, RlConfig):
            seconds = {"rollout": self._generation_seconds(config, numbers)} | seconds
        ranks = self._cluster.gpus_per_node
        host = host_bytes(config, self._architecture, layout, ranks) | memory["host"]
        yield Suggestion(
            config=config,
            keys=self._changes(config),
            seconds=seconds,
            memory=totals,
            host_bytes=sum(host.values()),
        )

    def _limit(self, margin: float) -> int:
        return round(self._cluster.gpu_memory_gb * GIB * margin)

    def _trained(self) -> Iterator[RunConfig]:
        """Yield the configuration under every layout of the trainer that divides the model."""
        config, ranks = self._config, self._cluster.training_ranks
        sizes = [size for size in (2**i for i in range(12)) if size <= ranks]
        in_node = [size for size in sizes if size <= self._cluster.gpus_per_node]
        own = config.parallel
        for tensor, pipeline, expert in itertools.product(
            sorted({*in_node, own.tensor}), sorted({*in_node, own.pipeline}), sorted({*sizes, own.expert})
        ):
            more = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
            more["virtual_pipeline"] = own.virtual_pipeline if pipeline == own.pipeline else 1
            parallel = own.model_copy(update=more)
            layout: Layout = parallel.layout(ranks)
            against = backends.problems(config.model, self._architecture, layout, config.lora)
            if [*layout.problems(self._architecture), *against]:
                continue
            recomputes = dict.fromkeys(("none", "selective", "full", config.model.recompute))
            for recompute, fraction in itertools.product(recomputes, {*_OFFLOADED, config.optimizer.offload_fraction}):
                yield config.model_copy(
                    update={
                        "parallel": parallel,
                        "model": config.model.model_copy(update={"recompute": recompute}),
                        "optimizer": config.optimizer.model_copy(update={"offload_fraction": fraction}),
                    }
                )

    def _servers(self) -> Iterator[dict[str, Any]]:
        """Yield the possible settings of the servers that the run starts: a single empty one where it starts none, or
        the CPU has them."""
        config, cluster = self._config, self._cluster
        if not isinstance(config, RlConfig) or config.rollout.urls or config.rollout.engine != "sglang":
            yield {}
            return
        gives_back: list[tuple[bool, bool]] = [(False, False)]
        if not cluster.serving_nodes:
            gives_back += [(True, False), (True, True)]
        sizes = [size for size in (2**i for i in range(6)) if cluster.gpus_per_node % size == 0]
        slots = [max(1, config.rollout.max_running_requests // part) for part in (1, 2, 4)]
        shares = [config.rollout.sglang_memory_share, *_SHARES]
        for (release, offload), size, share in itertools.product(gives_back, sizes, dict.fromkeys(shares)):
            for running in slots if share is None else slots[:1]:  # a share says itself how many find room
                yield {
                    "release_memory": release,
                    "offload_while_generating": offload,
                    "size": size,
                    "servers": cluster.gpus_per_node // size if config.rollout.servers else 0,
                    "share": share,
                    "max_running_requests": running,
                }

    def _generation_seconds(self, config: RlConfig, numbers: dict[str, int]) -> float:
        """Predict a phase. Its engines run as many responses of the mean length as their caches hold."""
        if not numbers or not numbers["gpus_each"]:
            return 0.0  # on the CPU, or elsewhere: the same for all layouts
        tokens = numbers["full_length_responses"] * config.rollout.max_sequence_tokens
        running = min(config.rollout.max_running_requests, round(tokens / self._speed.mean_tokens))
        power = 1 << max(0, running.bit_length() - 1)  # few numbers, each simulated once
        running = power if running < power * 1.5 else power * 3 // 2
        return self._rollout_seconds(numbers["gpus_each"], max(1, running))

    def _changes(self, config: RunConfig) -> dict[str, Any]:
        """Return the settings in which a layout differs from the configuration, by key."""
        asked = [
            *(f"parallel.{name}" for name in ("tensor", "pipeline", "virtual_pipeline", "expert")),
            *("model.recompute", "optimizer.offload_fraction", "train.offload_while_generating"),
            *(f"rollout.{name}" for name in ("servers", "max_running_requests", "release_memory", "sglang_arguments")),
        ]
        found = {}
        for key in asked:
            section, name = key.split(".")
            before, now = (getattr(getattr(one, section, None), name, None) for one in (self._config, config))
            if before != now:
                found[key] = list(now) if isinstance(now, tuple) else now
        return found


def _with_servers(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    if not changes:
        return config
    assert isinstance(config, RlConfig)
    rollout = config.rollout
    arguments = _replaced(rollout.sglang_arguments, _TENSOR, str(changes["size"]) if changes["size"] > 1 else "")
    arguments = _replaced(arguments, _SHARE, f"{changes['share']:g}" if changes["share"] is not None else "")
    more = {
        "sglang_arguments": rollout.sglang_arguments if sorted(arguments) == sorted(_words(rollout)) else arguments,
        "servers": changes["servers"],
        "release_memory": changes["release_memory"],
        "max_running_requests": changes["max_running_requests"],
    }
    train = config.train.model_copy(update={"offload_while_generating": changes["offload_while_generating"]})
    return config.model_copy(update={"rollout": rollout.model_copy(update=more), "train": train})


def _words(rollout: Any) -> list[str]:
    return [part for argument in rollout.sglang_arguments for part in argument.replace("=", " ").split()]


def _replaced(arguments: Sequence[str], names: Sequence[str], value: str) -> tuple[str, ...]:
    """Return the arguments of a server with one of them set, or without it for "". names: the first is how it is
    written."""
    words = [part for argument in arguments for part in argument.replace("=", " ").split()]
    kept: list[str] = []
    skip = False
    for word in words:
        if word in names or skip:
            skip = word in names
            continue
        kept.append(word)
    return (*kept, *((names[0], value) if value else ()))
