"""Runs `megatron-rl keys`, which shows every key that a configuration file may have, with its type, default and
description."""

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from megatron_rl.config.kinds import KINDS
from megatron_rl.config.other_names import names_of, why_none
from megatron_rl.config.reference import REQUIRED, Key, as_toml, keys_of

_WIDEST = 100


def run_keys(pattern: str) -> int:
    """Print the keys whose name, here or elsewhere, has the pattern, else those whose description has it. Returns the
    exit code."""
    found = [*_matching(all_keys(), pattern)]
    if not found:
        reason = why_none(pattern) or "`megatron-rl keys` without a pattern lists all of them"
        raise ValueError(f"no key has {pattern!r} in its name or description; {reason}")
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    for key, commands in found:
        sys.stdout.write("\n".join(_told(key, commands, width)) + "\n")
    return 0


def all_keys() -> list[tuple[Key, tuple[str, ...]]]:
    """Return every key of every kind of file, with the commands that have it so."""
    found: dict[str, tuple[Key, list[str]]] = {}
    for command, kind in KINDS.items():
        for key in keys_of(kind):
            found.setdefault(repr(key), (key, []))[1].append(command)
    return [(key, tuple(commands)) for key, commands in found.values()]


def _matching(keys: Iterable[tuple[Key, tuple[str, ...]]], pattern: str) -> Iterator[tuple[Key, tuple[str, ...]]]:
    try:
        looked_for = re.compile(pattern, re.IGNORECASE)
    except re.error:
        looked_for = re.compile(re.escape(pattern), re.IGNORECASE)
    by_name = [
        (key, commands)
        for key, commands in keys
        if looked_for.search(key.path) or any(looked_for.fullmatch(name) for name in names_of(key.path))
    ]
    yield from by_name or (one for one in keys if looked_for.search(one[0].description))


def _told(key: Key, commands: tuple[str, ...], width: int) -> Iterator[str]:
    default = "required" if key.default is REQUIRED else f"default {as_text(key.default)}"
    of = "" if len(commands) == len(KINDS) else f"; {', '.join(commands)}"
    yield f"{key.path}: {key.type}; {default}{of}"
    text = with_names(key.description, names_of(key.path))
    yield from textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def with_names(description: str, names: Sequence[str]) -> str:
    """Return a description, which ends in a full stop, with what other trainers call the key."""
    return f"{description} Called elsewhere: {', '.join(names)}." if names else description


def as_text(value: object) -> str:
    """Return a default as a file would have it; "none" where the key is not set."""
    return "none" if value is None else json.dumps(as_toml(value), default=str)
