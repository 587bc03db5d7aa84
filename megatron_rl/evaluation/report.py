"""Shows results to people: a table on the terminal and the same in Markdown."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from megatron_rl.evaluation.results import BenchmarkResult
from megatron_rl.evaluation.statistics import Estimate, mean_of

_HEADER = ("benchmark", "samples", "avg", "pass", "maj", "tokens", "cut", "none", "error")
_LEGEND = (
    "In percent, with 95 % intervals; with three decimals it is a mean of scores that go beyond 0 to 1. avg over all "
    "samples of every prompt; pass@k and maj@k, of responses judged correct, at the largest k; tokens of a response, "
    "in the mean; cut: ended by the limit of tokens; none: without an answer; error: not judged."
)


def average_of(results: Mapping[str, BenchmarkResult]) -> Estimate:
    return mean_of([result.average for result in results.values()])


def show(results: Mapping[str, BenchmarkResult], title: str) -> None:
    """Print the table on standard output. It fits into 80 columns."""
    table = Table(title=title, caption=_LEGEND, box=None, padding=(0, 1, 0, 0), caption_justify="left")
    for index, name in enumerate(_HEADER):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in _rows(results):
        table.add_row(*row)
    Console(highlight=False).print(table)


def markdown(results: Mapping[str, BenchmarkResult], title: str) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (_HEADER, ("---",) * len(_HEADER), *_rows(results))]
    return "\n".join([title, "", *lines, "", _LEGEND, ""])


def _rows(results: Mapping[str, BenchmarkResult]) -> list[tuple[str, ...]]:
    rows = [_row(name, result) for name, result in results.items()]
    if len(results) > 1:
        rows.append(("average", "", interval(average_of(results)), *[""] * (len(_HEADER) - 3)))
    return rows


def _row(name: str, result: BenchmarkResult) -> tuple[str, ...]:
    return (
        name,
        f"{result.num_prompts} x {result.samples_per_prompt}",
        interval(result.average),
        _at_largest(result.pass_at),
        _at_largest(result.majority_at or {}),
        f"{result.response_tokens_mean:.0f}",
        _percent(result.truncated_share),
        _percent(result.no_answer_share),
        _percent(result.error_share),
    )


def _at_largest(found: Mapping[int, Estimate]) -> str:
    return f"{_percent(found[max(found)].value)} @{max(found)}" if found else ""


def interval(found: Estimate) -> str:
    """Return a mean with its interval: a share in percent, and any other mean as it is."""
    if not found.is_share:
        return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    return f"{_percent(found.value)} [{_percent(found.low)}, {_percent(found.high)}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
