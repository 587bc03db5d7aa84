"""Chooses the reward that judges a response: by the domain of its prompt, of several parts, and by a model where rules
say no."""

import asyncio
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Protocol, Self

from megatron_rl.config.reward import OF_BENCHMARKS, PartSection, RewardSection, is_service
from megatron_rl.reward import code
from megatron_rl.reward.model_judge import ModelJudge
from megatron_rl.reward.own import OwnReward
from megatron_rl.reward.pool import RewardKind, RewardPool
from megatron_rl.reward.score import Attempt, Task
from megatron_rl.reward.service import ServiceReward
from megatron_rl.reward.verdict import GAVE_UP, Verdict, printable

logger = logging.getLogger(__name__)

# A sandbox may take so long on top of its program's time. Then its worker is ended, and the sandbox with it.
_SANDBOX_SECONDS = 10.0


class Judge(Protocol):
    """Judges by one kind. Verdicts are one for each response, in their order."""

    async def verdicts(self, task: Task, attempts: Sequence[Attempt]) -> list[Verdict]: ...

    def close(self) -> None: ...


class Rewards:
    """Owns a judge for each kind of reward that a configuration names. `close()` ends them."""

    def __init__(self, section: RewardSection, folder: Path | None = None) -> None:
        """Make the judges. folder: takes what functions of the user's own print; None: the folder of temporary files.

        Fault (SandboxUnavailable) when programs are to be judged and nothing can hold them; ValueError when a function
        cannot be called, or the judge or a service cannot be asked."""
        self._section = section
        self._model = ModelJudge(section.judge) if section.judge.domains else None
        self._judges: dict[str, Judge] = {}
        try:
            for kind in section.kinds:
                self._judges[kind] = _judge(kind, section, folder)
        except BaseException:
            self.close()
            raise

    async def verdicts(self, task: Task, attempts: Sequence[Attempt]) -> list[Verdict]:
        """Return one verdict for each response to a prompt. Does not block the event loop; cancelling it ends the work
        on them.

        A response that a function of the user's own, a service or a part gives up on has the mean score of the others:
        it is neither praised nor punished for that, whatever 0 means among these scores.
        """
        kinds = self._section.kinds_of(task.domain)
        if task.domain not in self._section.domains and self._section.parts:
            found = await asyncio.gather(*(self._judges[kind].verdicts(task, attempts) for kind in kinds))
            parts, decides = self._section.parts, self._section.correct_part
            return neutral([_added_up(parts, decides, of_parts) for of_parts in zip(*found, strict=True)])
        verdicts = await self._judges[kinds[0]].verdicts(task, attempts)
        if kinds[0] not in OF_BENCHMARKS:
            return neutral(verdicts)
        return list(
            await asyncio.gather(
                *(self._second_opinion(task, one, verdict) for one, verdict in zip(attempts, verdicts, strict=True))
            )
        )

    def close(self) -> None:
        for judge in self._judges.values():
            judge.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _second_opinion(self, task: Task, attempt: Attempt, verdict: Verdict) -> Verdict:
        if self._model is None or verdict.reason != "wrong" or task.domain not in self._section.judge.domains:
            return verdict
        return await self._model.verdict(task.prompt, task.answer, attempt.text)


class _BuiltIn:
    """Makes a pool a judge: it looks at answers alone."""

    def __init__(self, pool: RewardPool) -> None:
        self._pool = pool

    async def verdicts(self, task: Task, attempts: Sequence[Attempt]) -> list[Verdict]:
        return list(await asyncio.gather(*(self._pool.score_async(one.text, task.answer) for one in attempts)))

    def close(self) -> None:
        self._pool.close()


def _judge(kind: str, section: RewardSection, folder: Path | None) -> Judge:
    if is_service(kind):
        return ServiceReward(kind, section)
    if kind not in OF_BENCHMARKS:
        return OwnReward(kind, section, folder)
    if kind != "code":
        return _BuiltIn(RewardPool(kind, section.workers, section.timeout_seconds))
    settings = code.CodeSettings(**section.code.model_dump())
    code.warm_up(settings)  # here, where the run can still say what is missing
    logger.info("programs run in %s", code.runner(settings).description)
    judge = RewardKind(
        settle=code.settle_code,
        judge=functools.partial(code.judge_code, settings=settings),
        warm_up=functools.partial(code.warm_up, settings),
    )
    return _BuiltIn(RewardPool("code", section.workers, settings.seconds + _SANDBOX_SECONDS, judge))


def _added_up(parts: Mapping[str, PartSection], decides: str, verdicts: Sequence[Verdict]) -> Verdict:
    """Return the weighted sum of a response's parts. decides: the part that says whether it is correct; "": all of
    them."""
    by_name = dict(zip(parts, verdicts, strict=True))
    deciding = [by_name[decides]] if decides else verdicts
    failed = [verdict for verdict in verdicts if verdict.reason in GAVE_UP]
    blamed = [*failed, *(verdict for verdict in deciding if verdict.reason != "correct")]
    score = 0.0 if failed else sum(parts[name].weight * verdict.score for name, verdict in by_name.items())
    values: dict[str, float] = {}
    for name, verdict in by_name.items():
        if verdict.reason not in GAVE_UP:
            values |= {name: verdict.score, **{f"{name}.{inner}": value for inner, value in verdict.parts.items()}}
    return Verdict(
        score=score,
        reason=blamed[0].reason if blamed else "correct",
        seconds=sum(verdict.seconds for verdict in verdicts),
        details=printable("; ".join(f"{name}: {v.details}" for name, v in by_name.items() if v.details)),
        parts=values,
    )


def neutral(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts with the mean of the others as score where there is no verdict; 0 where there is none at
    all."""
    judged = [verdict.score for verdict in verdicts if verdict.reason not in GAVE_UP]
    if len(judged) == len(verdicts):
        return list(verdicts)
    mean = fmean(judged) if judged else 0.0
    return [replace(verdict, score=mean) if verdict.reason in GAVE_UP else verdict for verdict in verdicts]
