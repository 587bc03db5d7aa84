"""Counts what became of the responses of a teacher."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class Counts:
    """Counts the prompts and responses of one domain.

    num_prompts: that have responses; num_kept_prompts: of which a response stays. num_kept: responses that stay;
    num_validation: those of them for validation; num_characters: of them. dropped: responses, by reason.
    """

    num_prompts: int = 0
    num_kept_prompts: int = 0
    num_responses: int = 0
    num_kept: int = 0
    num_validation: int = 0
    num_characters: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        return {
            "prompts": self.num_prompts,
            "kept_prompts": self.num_kept_prompts,
            "responses": self.num_responses,
            "kept": self.num_kept,
            "validation": self.num_validation,
            "dropped": dict(self.dropped.most_common()),
            "mean_characters": round(self.num_characters / self.num_kept, 1) if self.num_kept else None,
        }


def total(counts: Iterable[Counts]) -> Counts:
    found = Counts()
    for one in counts:
        for part in fields(Counts):
            setattr(found, part.name, getattr(found, part.name) + getattr(one, part.name))
    return found


def table(domains: Mapping[str, Counts]) -> str:
    """Return a table for people: a line for each domain, and one for each reason under it."""
    named = [*sorted(domains.items()), *([("all", total(domains.values()))] if len(domains) > 1 else [])]
    lines = []
    for name, count in named:
        length = f", {count.num_characters / count.num_kept:,.0f} characters in the mean" if count.num_kept else ""
        validation = f" ({count.num_validation:,} for validation)" if count.num_validation else ""
        lines.append(
            f"{name}: {count.num_kept:,} of {count.num_responses:,} responses kept{validation}, to "
            f"{count.num_kept_prompts:,} of {count.num_prompts:,} prompts{length}"
        )
        lines += [f"  {number:>10,}  {reason}" for reason, number in count.dropped.most_common()]
    return "\n".join(lines)
