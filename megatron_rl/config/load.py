"""Turns TOML and `--set a.b=value` into the frozen configuration tree, with errors that name the key and the remedy."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from megatron_rl.config.other_names import keys_called, why_none
from megatron_rl.config.reference import keys_of
from megatron_rl.parsing import MAX_NESTING, parse_toml, read_text, shown

C = TypeVar("C", bound=BaseModel)

_NAMED, _TOLD = 5, 8  # in a message: keys, and problems


def load_config(kind: type[C], path: str | Path, overrides: Iterable[str] = (), *, without_weights: bool = False) -> C:
    """Read a TOML file, apply `key.path=value` overrides (TOML values; bare words are strings), validate.

    without_weights: of a model of the Hugging Face Hub only the configuration is fetched.
    """
    folders: list[Path] = []
    overrides = list(overrides)
    values = read_values(Path(path), overrides, folders)
    try:
        return kind.model_validate(values, context={"folders": folders, "without_weights": without_weights})
    except ValidationError as error:
        lines = _explained(kind, error.errors())
        more = f"; and {len(lines) - _TOLD} more" if len(lines) > _TOLD else ""
        raise ValueError(f"{path}{' with --set' if overrides else ''}: " + "; ".join(lines[:_TOLD]) + more) from None


def read_values(path: Path, overrides: Iterable[str] = (), folders: list[Path] | None = None) -> dict[str, Any]:
    """Return what a file and the files under its `base` keys say, with overrides applied; not validated.

    base = "other.toml" (beside the file): its values, where this file has none. Tables are joined key by key; anything
    else, lists too, is replaced. folders: takes those of all these files, where functions of the user's own are looked
    for.
    """
    values = _with_base(path, (), [] if folders is None else folders)
    for override in overrides:
        _apply_override(values, override)
    return values


def _with_base(path: Path, seen: tuple[Path, ...], folders: list[Path]) -> dict[str, Any]:
    if not path.is_file():
        wrong = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"config file {path} {wrong}" + (f", which is the base of {seen[-1]}" if seen else ""))
    if path.resolve() in (other.resolve() for other in seen):
        raise ValueError(f"{path} is its own base, by way of {', '.join(map(str, seen))}")
    try:
        values = parse_toml(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    folders.append(path.parent)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: base must be the name of a TOML file beside it, got {base!r}")
    return _joined(_with_base(path.parent / base, (*seen, path), folders), values)


def _joined(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {k: _joined(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return below | above | both


def dump_config(config: BaseModel) -> str:
    """Return the resolved configuration as TOML; `load_config` reads it back to an equal tree."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def secret_variables(config: BaseModel) -> set[str]:
    """Collect the environment variables that the configuration names as holding keys, in whatever section."""
    return set(_named_keys(config.model_dump()))


def _named_keys(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _named_keys(value)
        elif name == "api_key_variable" and value:
            yield value


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set takes key.path=value, got {override!r}")
    try:
        value = parse_toml(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except ValueError as error:
        raise ValueError(f"--set {key}: the value cannot be read: {error}") from None
    *parents, leaf = key.strip().split(".")
    if len(parents) > MAX_NESTING:
        raise ValueError(f"--set {key[:40]}...: the key has {len(parents) + 1} parts; no section is that deep")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {parent} is a value, not a section")
    values[leaf] = value


def _explained(kind: type[BaseModel], problems: Sequence[Any]) -> list[str]:
    """Explain problems, unknown keys first. A key that is missing beside one, or that one probably means, is not
    told: it may be there, misspelt."""
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    lines = [_explain(kind, problem) for problem in unknown]
    sections, told = {problem["loc"][:-1] for problem in unknown if len(problem["loc"]) > 1}, " ".join(lines)
    for problem in problems:
        is_hidden = problem["type"] == "missing" and (
            problem["loc"][:-1] in sections or f"did you mean {'.'.join(map(str, problem['loc']))}?" in told
        )
        if problem not in unknown and not is_hidden:
            lines.append(_explain(kind, problem))
    return lines


# What TOML calls a kind of value that pydantic has another name for.
_IN_TOML = {
    "tuple_type": "must be a list, in brackets",
    "list_type": "must be a list, in brackets",
    "dict_type": "must be a table",
    "model_type": "must be a table",
}


def _explain(kind: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where}; {_meant(where, problem['input'], [key.path for key in keys_of(kind)])}"
    if problem["type"] == "missing":
        return f"{where} is required"
    message = _IN_TOML.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {shown(problem['input'])}" if where else message


def _meant(where: str, value: Any, known: Sequence[str]) -> str:
    """Say what an unknown key or section probably means: by what others call it, then by its name, then by its
    spelling."""
    where = re.sub(r"\.\d+(?=\.)", "", where)  # of an item of a list of tables
    if isinstance(value, dict):
        inner = {f"{where}.{name}": keys_called(f"{where}.{name}", known) for name in value}
        here = [f"{name} is {keys[0]} here" for name, keys in inner.items() if keys]
        if here:
            return ", ".join(here[:_NAMED])
    if meant := keys_called(where, known):
        return f"did you mean {' or '.join(meant[:_NAMED])}?"
    if why := why_none(where):
        return why
    if same := [key for key in known if key.rpartition(".")[2] == where.rpartition(".")[2]]:
        return f"did you mean {' or '.join(same[:_NAMED])}?"
    section, _, leaf = where.rpartition(".")
    beside = [key for key in known if key.startswith(f"{section}.")] if section else []
    near = difflib.get_close_matches(where, known, n=1, cutoff=0.85) or [
        key for key in (*beside, *known) if difflib.get_close_matches(leaf, [key.rpartition(".")[2]], cutoff=0.8)
    ]
    if near:
        return f"did you mean {near[0]}?"
    if beside:
        return f"{section} has {', '.join(key.removeprefix(f'{section}.') for key in beside)}"
    sections = dict.fromkeys(key.partition(".")[0] for key in known)
    close = difflib.get_close_matches(where.partition(".")[0], sections, n=1)
    return f"did you mean {close[0]}?" if close else f"the sections are {', '.join(sections)} (`megatron-rl keys`)"
