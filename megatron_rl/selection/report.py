"""Shows people the measured candidates: a table on the terminal and the same in Markdown."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_rl.evaluation.report import interval
from megatron_rl.evaluation.statistics import Estimate
from megatron_rl.selection.choice import Band, Measured, is_in, straddled_ends

_HEADER = ("candidate", "entropy", "accuracy", "tokens", "cut", "val loss", "val ent")
_LEGEND = (
    "*: chosen. entropy: of the policy, in nats per token; accuracy: mean reward, in percent where rewards "
    "are within 0 to 1; both with 95 % intervals. tokens of a response, in the mean; cut: percent of responses ended "
    "by the limit of tokens; "
    "val loss, val ent: validation loss and entropy of the SFT run, in nats per token."
)


def show(measured: Sequence[Measured], chosen: Measured | None, title: str, said: Sequence[str]) -> None:
    """Print the table on standard output. It fits into 80 columns. said: lines under the table."""
    table = Table(title=title, caption=_LEGEND, box=None, padding=(0, 1, 0, 0), caption_justify="left")
    for index, name in enumerate(_HEADER):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in _rows(measured, chosen):
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.print(table)
    for line in said:
        console.print(line, soft_wrap=True)


def markdown(measured: Sequence[Measured], chosen: Measured | None, title: str, said: Sequence[str]) -> str:
    rows = (_HEADER, ("---",) * len(_HEADER), *_rows(measured, chosen))
    lines = ["| " + " | ".join(row).replace("*", r"\*") + " |" for row in rows]
    return "\n".join([title, "", *lines, "", _LEGEND.replace("*", r"\*"), "", *(f"- {line}" for line in said), ""])


def verdict(
    measured: Sequence[Measured], nearest: Measured, in_band: bool, band: Band, prefer: str, chosen: Measured | None
) -> list[str]:
    """Return what is to be said about a choice, one line each. nearest: what the rule gives; chosen: None if
    refused."""
    told, name, value = _band(band), nearest.candidate.name, f"{nearest.entropy.value:.3f}"
    if in_band:
        inside = sum(is_in(one.entropy.value, band) for one in measured)
        by = f", by prefer = '{prefer}'" if inside > 1 else ""
        lines = [f"{name} is chosen: entropy {value}; {inside} of {len(measured)} candidates are within {told}{by}"]
    else:
        lines = [f"NO CANDIDATE IS WITHIN THE BAND {told}. The nearest is {name}, with entropy {value}"]
        lines[0] += "; it is chosen all the same" if chosen is not None else "; none is chosen (require_band)"
    for one in measured:
        for end in straddled_ends(one.entropy, band):
            lines.append(
                f"{one.candidate.name}: the interval {_interval(one.entropy)} holds {end:g}, an end of the band, so "
                "the sample does not tell whether it is within; more prompts would"
            )
    return lines


def _rows(measured: Sequence[Measured], chosen: Measured | None) -> list[tuple[str, ...]]:
    return [
        (
            one.candidate.name + (" *" if one is chosen else ""),
            _interval(one.entropy),
            interval(one.accuracy),
            f"{one.response_tokens_mean:.0f}",
            f"{100 * one.truncated_share:.1f}",
            _number(one.candidate.sft.validation_loss),
            _number(one.candidate.sft.validation_entropy),
        )
        for one in measured
    ]


def _interval(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _band(band: Band) -> str:
    return f"[{band[0]:g}, {band[1]:g}]"
