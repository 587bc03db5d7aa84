"""Which reward judges a response: by the domain of its prompt, and by a model where rules say no."""

import functools
import logging
from typing import Self

from megatron_rl.config.reward import RewardSection
from megatron_rl.reward import code
from megatron_rl.reward.model_judge import ModelJudge
from megatron_rl.reward.pool import RewardKind, RewardPool
from megatron_rl.reward.verdict import Verdict

logger = logging.getLogger(__name__)

# What a sandbox may take on top of its program's time; beyond it the worker is ended, and its sandbox with it.
_SANDBOX_SECONDS = 10.0


class Rewards:
    """Owns a pool for each kind of reward that a configuration names. `close()` ends them."""

    def __init__(self, section: RewardSection) -> None:
        """Fault (SandboxUnavailable) when programs are to be judged and nothing can hold them; ValueError when the
        judge cannot be asked."""
        self._section = section
        self._judge = ModelJudge(section.judge) if section.judge.domains else None
        self._pools: dict[str, RewardPool] = {}
        for kind in (section.kind, *section.domains.values()):
            if kind not in self._pools:
                self._pools[kind] = _pool(kind, section)

    async def verdict(self, domain: str, question: str, answer: str, text: str) -> Verdict:
        """Of one response `text`. Does not block the event loop; cancelling it ends the work on it."""
        pool = self._pools[self._section.kind_of(domain)]
        verdict = await pool.score_async(text, answer)
        if self._judge is None or verdict.reason != "wrong" or domain not in self._section.judge.domains:
            return verdict
        return await self._judge.verdict(question, answer, text)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pool(kind: str, section: RewardSection) -> RewardPool:
    if kind != "code":
        return RewardPool(kind, section.workers, section.timeout_seconds)
    settings = code.CodeSettings(**section.code.model_dump())
    code.warm_up(settings)  # here, where the run can still say what is missing
    logger.info("programs run in %s", code.runner(settings).description)
    judge = RewardKind(
        settle=code.settle_code,
        judge=functools.partial(code.judge_code, settings=settings),
        warm_up=functools.partial(code.warm_up, settings),
    )
    return RewardPool("code", section.workers, settings.seconds + _SANDBOX_SECONDS, judge)
