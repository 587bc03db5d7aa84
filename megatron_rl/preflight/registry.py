"""This module registers checks by name. Each finds problems of a command that is about to start, and every problem says
its remedy."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_rl.config.benchmarks import BenchmarkSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.schema import RlConfig, RunConfig, SamplingConfig, SftConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.families import Architecture, load_architecture

AnyConfig = RlConfig | SftConfig | EvaluateConfig | SelectConfig | SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Start:
    """Describes a command that is about to start on this machine.

    world_size: training ranks. resume: whether it goes on with what its folder holds. rollouts: a file to train from in
    place of servers. model: the checkpoint that answers, for commands that train nothing; None for an endpoint.
    """

    config: AnyConfig | RunConfig
    world_size: int = 0
    resume: bool = False
    rollouts: Path | None = None
    model: Path | None = None

    @property
    def trains(self) -> bool:
        return self.world_size > 0

    @property
    def serves(self) -> bool:
        """Tell whether training starts servers of its own."""
        config = self.config
        return self.trains and isinstance(config, RlConfig) and not config.rollout.urls and self.rollouts is None

    @property
    def benchmarks(self) -> Mapping[str, BenchmarkSection]:
        """The benchmarks that it answers, by name."""
        config = self.config
        if isinstance(config, RlConfig) and self.trains and config.validation is not None:
            return config.validation.benchmarks
        return config.benchmarks if isinstance(config, EvaluateConfig) else {}

    @cached_property
    def architecture(self) -> Architecture:
        """The shape of the one model."""
        if self.trains:
            assert isinstance(self.config, RunConfig)
            return load_architecture(self.config.model.path)
        assert self.model is not None
        return load_architecture(self.model)


Find = Callable[[Start], Iterator[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Describes a check. name: for the table of all checks. about: what it looks at. find: messages, each with its
    remedy behind the last semicolon; it may raise ValueError in place of the first. of_machine: it looks at this
    machine, which may be another one than the run's. after: the check that has to find nothing before this one makes
    sense."""

    name: str
    about: str
    find: Find
    of_machine: bool = False
    after: str = ""


# Every start does CHECKS. Only `megatron-rl check` also does THOROUGH: those take longer, or the run does them later.
CHECKS: dict[str, Check] = {}
THOROUGH: dict[str, Check] = {}


def check(
    name: str, about: str, *, of_machine: bool = False, after: str = "", among: dict[str, Check] = CHECKS
) -> Callable[[Find], Find]:
    """Register a function as a check, behind those before it. One that does not concern a command finds nothing."""

    def register(find: Find) -> Find:
        assert name not in CHECKS | THOROUGH, f"two checks are called {name}"
        among[name] = Check(name=name, about=about, find=find, of_machine=of_machine, after=after)
        return find

    return register


def refuse_problems(start: Start) -> None:
    """Raise ValueError with the first problem that a check finds."""
    for one in CHECKS.values():
        for problem in one.find(start):
            raise ValueError(problem)
