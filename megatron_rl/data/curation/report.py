"""Counts what became of the rows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCount:
    """Counts what became of the rows of a source. dropped: by reason. left_out: columns that kept rows do not have."""

    name: str
    num_rows: int
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: Sequence[str] = ()

    @property
    def num_kept(self) -> int:
        return self.num_rows - self.dropped.total()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Holds the numbers of a run. seconds: by stage. peak_rss_bytes: of all processes together, what they share counted
    in each."""

    sources: tuple[SourceCount, ...]
    seconds: dict[str, float]
    peak_rss_bytes: int

    @property
    def total(self) -> SourceCount:
        dropped = sum((source.dropped for source in self.sources), Counter[str]())
        return SourceCount(name="all", num_rows=sum(s.num_rows for s in self.sources), dropped=dropped)

    @property
    def rows_per_second(self) -> float:
        return self.total.num_rows / max(sum(self.seconds.values()), 1e-9)

    def as_json(self) -> dict[str, Any]:
        return {
            **_counts(self.total),
            "sources": [{"source": source.name, **_counts(source)} for source in self.sources],
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
            "rows_per_second": round(self.rows_per_second),
            "peak_rss_bytes": self.peak_rss_bytes,
        }

    def table(self) -> str:
        """Return a table for people: a line for each source and one for each reason under it."""
        lines = []
        for source in (*self.sources, *([self.total] if len(self.sources) > 1 else [])):
            lines.append(f"{source.name}: {source.num_kept:,} of {source.num_rows:,} rows kept")
            lines += [f"  {count:>10,}  {reason}" for reason, count in source.dropped.most_common()]
            if source.left_out:
                lines.append(
                    f"  left out: {', '.join(source.left_out)} (`meta` keeps columns for a reward of your own)"
                )
        lines.append(f"{self.rows_per_second:,.0f} rows/s, peak memory {self.peak_rss_bytes / 1e9:.2f} GB")
        return "\n".join(lines)


def _counts(source: SourceCount) -> dict[str, Any]:
    return {"rows": source.num_rows, "kept": source.num_kept, "dropped": dict(source.dropped.most_common())}
