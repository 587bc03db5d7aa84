"""Checks the tables of a configuration that are keyed by domain against the domains that prompts have."""

from collections.abc import Collection, Iterable, Mapping

from megatron_rl.config.reward import RewardSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.parsing import meant

_MOST_NAMED = 20


def check_reward_domains(prompts: Iterable[Prompt], reward: RewardSection, where: str) -> None:
    """Raise ValueError for a domain that reward.domains or reward.judge.domains names and no prompt has: a misspelt one
    would be judged by other rules, and score 0 throughout."""
    rows = list(prompts)
    for table, named in (("reward.domains", reward.domains), ("reward.judge.domains", reward.judge.domains)):
        check_named_domains(rows, table, named, where)


def check_named_domains(prompts: Iterable[Prompt], table: str, named: Iterable[str], where: str) -> None:
    """Refuse a table of the configuration that names a domain which no prompt has, by a ValueError."""
    found = {prompt.domain for prompt in prompts}
    for domain in sorted(set(named) - found):
        raise ValueError(
            f"{table} names {domain!r}, but no prompt of {where} has that domain ({_listed(found)}); rename it, "
            f"or take it out{meant(domain, found)}"
        )


def check_domains(prompts: Iterable[Prompt], shares: Mapping[str, float], where: str) -> None:
    """Raise ValueError unless the prompts are of the domains that have a share of the budget, all of these and no
    others."""
    found = {prompt.domain for prompt in prompts}
    for domain in sorted(found - shares.keys()):
        raise ValueError(
            f"{where} has prompts of domain {domain!r}, which has no share in budget.domains "
            f"({', '.join(sorted(shares))}); give it one, or leave its prompts out{meant(domain, shares)}"
        )
    for domain in sorted(shares.keys() - found):
        raise ValueError(
            f"budget.domains has a share for {domain!r}, but {where} has no prompts of that domain "
            f"({_listed(found)}); add some, or take the share out{meant(domain, found)}"
        )


def _listed(names: Collection[str]) -> str:
    """Return the names as a message has them, however many there are."""
    shown = sorted(names)[:_MOST_NAMED]
    return ", ".join(shown) + (f", ... {len(names)} in all" if len(names) > _MOST_NAMED else "")
