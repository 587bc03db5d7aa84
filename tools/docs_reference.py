"""Make the pages of the reference that are read from the code: keys, commands, checks, exit codes.

`make docs` adds them to the site (docs_hooks.py); none of them is committed. Alone, to look at one:

    python tools/docs_reference.py keys
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from megatron_rl import errors
from megatron_rl.cli import command_parser
from megatron_rl.config.kinds import KINDS
from megatron_rl.config.other_names import names_of
from megatron_rl.config.reference import REQUIRED, Key, keys_of
from megatron_rl.config.section import Section
from megatron_rl.config.show import all_keys, as_text, with_names
from megatron_rl.data.curation.config import CurationConfig
from megatron_rl.preflight import checks, thorough  # noqa: F401  (they register what is checked)
from megatron_rl.preflight.registry import CHECKS, THOROUGH, Check
from megatron_rl.simulation.rates import Rates

_WIDTH = 100  # of the commands' help

# Files besides those of commands, by what reads them.
OTHER_FILES: dict[str, type[Section]] = {
    "Mappings of `tools/prepare_data.py`": CurationConfig,
    "Rates of `tools/simulate_cluster.py` and `plan`": Rates,
}


def keys() -> str:
    """Return the page of all configuration keys, a table for each section."""
    lines = [
        *("---", "search:", "  boost: 10", "---", ""),  # who searches for a key wants this page first
        "# Configuration keys",
        "",
        "This page is made from the code. `megatron-rl keys PATTERN` prints the same on a terminal, and finds a key",
        "by the name that TRL, slime, verl or prime-rl give it. `NAME` stands for a name of your own. The last",
        "column says which kinds of file have the key.",
    ]
    sections: dict[str, list[tuple[Key, tuple[str, ...]]]] = {}
    for key, commands in all_keys():
        section = key.path.partition(".")[0] if "." in key.path else ""
        sections.setdefault(section, []).append((key, commands))
    for section, found in sorted(sections.items(), key=lambda one: one[0] != ""):
        heading = f"## [{section}]" if section else "## Top of a file"
        lines += ["", heading, "", "| key | description | type | default | files |", "|---|---|---|---|---|"]
        lines += [_row(_cells(key), files) for key, files in found]
    for heading, kind in OTHER_FILES.items():
        lines += ["", f"## {heading}", "", "| key | description | type | default |", "|---|---|---|---|"]
        lines += [_row(_cells(key)) for key in keys_of(kind)]
    return "\n".join(lines) + "\n"


def _cells(key: Key) -> tuple[str, ...]:
    default = "required" if key.default is REQUIRED else f"`{as_text(key.default)}`"
    text = with_names(key.description, [f"`{name}`" for name in names_of(key.path)])
    return f"`{key.path}`", text, key.type, default


def _row(cells: tuple[str, ...], files: tuple[str, ...] = ()) -> str:
    if files:
        cells = (*cells, "all" if len(files) == len(KINDS) else ", ".join(files))
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Return a text as a cell of a table. Angle brackets and stars outside of code would be taken for markup."""
    parts = text.replace("|", "\\|").replace("\n", " ").split("`")
    parts[::2] = [re.sub(r"([<>*_\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def commands() -> str:
    """Return the page of all commands, each with its help as the terminal shows it."""
    lines = ["# Commands", "", "This page is made from the code. It is what `megatron-rl COMMAND --help` prints."]
    for name, parser in subcommands(command_parser()).items():
        parser.formatter_class = _PlainFormatter
        lines += ["", f"## {name}", "", "```text", parser.format_help().rstrip(), "```"]
    return "\n".join(lines) + "\n"


class _PlainFormatter(argparse.HelpFormatter):
    """Formats help as argparse's own class does, at one width wherever the page is made."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_WIDTH)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command, by its name."""
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(choices[0])


def exit_codes() -> str:
    """Return the page of exit codes and of what is checked before a start."""
    document = errors.__doc__ or ""
    lines = [
        "# Exit codes and errors",
        "",
        "This page is made from the code.",
        "",
        "## Exit codes",
        "",
        *(line for line in document.splitlines() if line.startswith("|")),
        "",
        "A message says what is wrong, the value, and the remedy. Only a bug prints a stack trace; please report it.",
        "",
        "## Checked before every start",
        "",
        "A command that finds one of these ends with code 2 before a model is built.",
        "",
        *_checks(CHECKS.values()),
        "",
        "## Checked by `megatron-rl check` besides",
        "",
        "These take longer, or a run would say them only later.",
        "",
        *_checks(THOROUGH.values()),
        "",
        "What goes wrong during a run is told in [When something fails](../start/failures.md).",
    ]
    return "\n".join(lines) + "\n"


def _checks(found: Iterable[Check]) -> Iterator[str]:
    yield "| check | what it looks at |"
    yield "|---|---|"
    for one in found:
        yield f"| `{one.name}` | {_cell(one.about)} |"


def other_names() -> str:
    """Return the page that says what other trainers call each key."""
    lines = [
        "# Names in other trainers",
        "",
        "This page is made from the code. A configuration that uses one of these names is refused, with the key",
        "that is meant; `megatron-rl keys NAME` looks one up. Units and defaults differ: read the description.",
        "",
        "| key here | in TRL, slime, verl, prime-rl and others |",
        "|---|---|",
    ]
    for path in dict.fromkeys(key.path for key, _ in all_keys()):
        if names := names_of(path):
            lines.append(f"| `{path}` | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "keys": keys,
    "commands": commands,
    "exit_codes": exit_codes,
    "other_names": other_names,
}


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in PAGES]:
        sys.exit(f"usage: reference.py {'|'.join(PAGES)}")
    sys.stdout.write(PAGES[sys.argv[1]]())
