"""Stands in for rank 0's surroundings: a source of groups that a test fills, and a context of one process."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from samples import make_segment, make_trajectory

from megatron_rl.c3po.budget import Shortfall
from megatron_rl.config.layout import Layout
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.prompts import Prompt
from megatron_rl.records import Group, UnfinishedGroup
from megatron_rl.rollout.sampler import Collected
from megatron_rl.train.step.trainer import StepResult

CONFIG = """
run_dir = "run"
[model]
path = "model"
[data]
train = "train.jsonl"
[rollout]
prompts_per_step = 2
samples_per_prompt = 2
max_prompt_tokens = 64
max_response_tokens = 50
[budget]
tokens = 200
[train]
steps = 4
micro_batch_tokens = 128
"""


def config_of(folder: Path, *changes: str) -> RlConfig:
    """Return the configuration above, written in `folder`, with `changes` of the form a.b=value."""
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    (folder / "run").mkdir(exist_ok=True)
    return load_config(RlConfig, folder / "config.toml", [f"run_dir={folder / 'run'}", *changes])


def group(position: int, lengths: Sequence[int], version: int = 0, rewards: Sequence[float] = (1.0, 0.0)) -> Group:
    """Make a scored group whose responses have these numbers of tokens."""
    segments = [make_segment(length, version, num_prompt_tokens=3) for length in lengths]
    samples = (
        replace(make_trajectory(position, index, [segment], reward), advantage=reward - 0.5)
        for index, (segment, reward) in enumerate(zip(segments, rewards, strict=True))
    )
    return Group(prompt_id=position, samples=tuple(samples))


class FakeGroups:
    """Gives groups of two responses of `length` tokens until a phase has what it needs; raises what it is told to."""

    def __init__(self, length: int = 20) -> None:
        self.length, self.next, self.asked, self.forgotten = length, 0, [], []
        self.raises: list[BaseException | None] = []
        self.decode = str
        self.closed = False

    def groups(
        self,
        needs: Sequence[Shortfall],
        policy_version: int,
        unfinished: Sequence[UnfinishedGroup],
        keep: Callable[[Group], bool],
    ) -> Collected:
        self.asked.append((policy_version, [need.missing for need in needs]))
        if self.raises and (error := self.raises.pop(0)):
            raise error
        found = Collected()
        for need in needs:
            while need.missing > 0:
                found.kept.append(group(self.next, [self.length, self.length], policy_version))
                self.next += 1
                need.add(1, [[self.length, self.length]])
        found.num_generated_tokens = 2 * self.length * len(found.kept)
        return found

    def prompt_of(self, position: int) -> Prompt:
        return Prompt(id=f"p{position}", domain="toys", prompt=f"question {position}", answer="1")

    def state(self) -> dict[str, Any]:
        return {"cursor": self.next}

    def restore(self, state: dict[str, Any]) -> None:
        self.next = state["cursor"]

    def metrics(self) -> dict[str, Any]:
        return {"num_lost_servers": 0}

    def forget(self, which: Callable[[int], bool]) -> None:
        self.forgotten.append([step for step in range(10) if which(step)])

    def close(self) -> None:
        self.closed = True


def context_of(config: RlConfig, control: Any, latest: int | None = None) -> Any:
    """Return a stand-in for a context with what the orchestrator uses of one."""
    return SimpleNamespace(
        control=control,
        resume=True,
        layout=Layout(world_size=1),
        architecture=None,
        watchdog=SimpleNamespace(enter=lambda phase, step: None),
        checkpoints=SimpleNamespace(latest=latest, num_failed_saves=0),
        memory_metrics=dict,
        accept=lambda step: None,
        model=SimpleNamespace(gather_weights=lambda: None),
        trainer=None,
    )


def result(difference: float = 1e-6, skipped: bool = False) -> StepResult:
    """Return a made-up report of an optimizer step."""
    metrics = {
        "loss": 0.1,
        "entropy": 1.0,
        "logprob_difference_mean": difference,
        "logprob_difference_p999": difference,
    }
    return StepResult(
        skipped=skipped,
        grad_norm=1.0,
        learning_rate=1e-6,
        num_loss_tokens=200,
        num_forward_tokens=230,
        num_padding_tokens=10,
        metrics=metrics,
    )
