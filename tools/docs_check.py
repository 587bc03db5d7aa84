"""Check the pages: links and anchors, TOML and its keys, command lines, Python.

    python tools/docs_check.py

Looked at are docs/, README.md, CONTRIBUTING.md, SECURITY.md and the README of every example. Nothing is run, and no
network is asked. A block of TOML may be (a part of) a configuration, a mapping of tools/prepare_data.py or a file of
rates.
"""

import argparse
import ast
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import docs_reference as reference  # noqa: E402

from megatron_rl.cli import command_parser  # noqa: E402
from megatron_rl.config.reference import Key, flattened, keys_of  # noqa: E402
from megatron_rl.config.show import all_keys  # noqa: E402

_FENCE = re.compile(r"^([ ]*)```(\w*)[^\n]*\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|(?<=\A))((?:[ ]{4,}[^\n]*\n)+)", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# These look like keys of a section but are none: files, and what an agent asks of its model.
_NO_KEYS = re.compile(r".*\.(py|toml|jsonl|json|sbatch|md)|model\.(chat|complete|base_url|api_key)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Holds a block of code; language is "" where it has none."""

    line: int
    language: str
    text: str


def pages() -> list[Path]:
    """Return every page that is checked."""
    names = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
    found = [ROOT / name for name in names if (ROOT / name).exists()]
    return found + sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "examples").rglob("README.md"))


def blocks_of(text: str) -> Iterator[Block]:
    """Yield fenced and indented blocks."""
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(line=line, language=match.group(2), text=textwrap.dedent(match.group(3)))
    for match in _INDENTED.finditer(_without_fences(text)):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(line=line, language="", text=textwrap.dedent(match.group(1)))


def _without_fences(text: str) -> str:
    return _FENCE.sub(lambda match: "\n" * match.group(0).count("\n"), text)


def check_page(path: Path) -> Iterator[str]:
    """Yield what is wrong with a page."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
    for block in blocks_of(text):
        for problem in _check_block(block):
            yield f"{name}:{block.line}: {problem}"
    prose = _INDENTED.sub("", _without_fences(text))
    for code in _INLINE.findall(prose):
        for problem in [*check_command(code, whole=False), *_check_key(code)]:
            yield f"{name}: {problem}"
    for target in _LINK.findall(_INLINE.sub("", prose)):
        if problem := _check_link(path, target):
            yield f"{name}: {problem}"


def _check_block(block: Block) -> Iterator[str]:
    if block.language == "toml":
        yield from check_toml(block.text)
    elif block.language == "python":
        try:
            compile(block.text, "block", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except SyntaxError as error:
            yield f"Python does not compile: {error}"
    elif block.language in ("", "console", "bash", "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            yield from check_command(line.removeprefix("$ "))


def check_toml(text: str) -> Iterator[str]:
    """Yield what is wrong with a configuration, or a part of one."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        yield f"TOML does not parse: {error}"
        return
    unknown = [[path for path in _paths(values) if not _is_one_of(patterns, path)] for patterns in _KINDS]
    for path in min(unknown, key=len):
        yield f"TOML has {path}, and there is no such key"


def _paths(values: dict[str, object], prefix: str = "") -> Iterator[str]:
    for path, value in flattened(values, prefix):
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            for one in value:
                yield from _paths(one, f"{path}.")
        else:
            yield path


def _patterns(keys: Iterable[Key]) -> list[re.Pattern[str]]:
    """Return a pattern for each key. The content of a table by name belongs to the table's key."""
    types = {key.path: key.type for key in keys} | {"base": "text"}
    return [
        re.compile(re.escape(path).replace("NAME", r"[^.]+") + (r"(\..+)?" if "table" in kind else ""))
        for path, kind in types.items()
    ]


def _is_one_of(patterns: list[re.Pattern[str]], path: str) -> bool:
    return any(pattern.fullmatch(path) for pattern in patterns)


_CONFIGURATION = [key for key, _ in all_keys()]
_KINDS = [_patterns(_CONFIGURATION), *(_patterns(keys_of(kind)) for kind in reference.OTHER_FILES.values())]
_SECTIONS = {key.path.partition(".")[0] for key in _CONFIGURATION if "." in key.path}


def _check_key(code: str) -> Iterator[str]:
    """Yield a problem where code in a sentence looks like a key of a section, and is none."""
    match = re.fullmatch(r"([a-z_]+)(\.[a-z_]+)+(?= ?=|$).*", code)
    if match is None or match[1] not in _SECTIONS or _NO_KEYS.fullmatch(code):
        return
    path = code.partition("=")[0].strip()
    if not _is_one_of(_KINDS[0], path) and not any(key.path.startswith(f"{path}.") for key in _CONFIGURATION):
        yield f"{path} is named, and there is no such key"


def check_command(line: str, whole: bool = True) -> Iterator[str]:
    """Yield what the parser of the commands says of a line; nothing for a line without a command.

    whole: the line can be typed as it is. Else, and where it has "[" or "...", only the names of the command and of its
    options are looked at.
    """
    line = re.sub(r"\$\([^)]*\)", "1", re.sub(r"\s#.*$", "", line))
    match = re.search(r"(?:^|[\s;(/])(?:megatron-rl|-m megatron_rl\.cli)((?:\s+[^|;&>)]+)?)", line)
    if match is None or not match.group(1).strip():
        return
    try:
        words = shlex.split(re.split(r"\s\d?>", match.group(1))[0])
    except ValueError:
        return
    known = reference.subcommands(command_parser())
    if words[0] not in known:
        if re.fullmatch(r"[a-z]+", words[0]) or (words[0].startswith("-") and words[0] not in ("--version", "--help")):
            yield f"there is no command `megatron-rl {words[0]}`"
        return
    if whole and "[" not in line and "..." not in line and "--help" not in words:
        yield from _parse(words)
        return
    options = {option for action in known[words[0]]._actions for option in action.option_strings}
    for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", match.group(1)):
        if word not in options:
            yield f"`megatron-rl {words[0]}` has no option {word}"


class _Refused(Exception):
    pass


def _parse(words: list[str]) -> Iterator[str]:
    parser = command_parser()

    def refuse(message: str) -> None:
        raise _Refused(message)

    for one in (parser, *reference.subcommands(parser).values()):
        one.error = refuse  # type: ignore[method-assign, assignment]
    numbers = [re.sub(r"^[A-Z]$", "1", word) for word in words]  # N and M stand for numbers
    try:
        parser.parse_args(numbers)
    except _Refused as error:
        yield f"`megatron-rl {' '.join(words)}`: {error}"


def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and GitHub make them."""
    text = _without_fences(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\s-]", "", plain).strip().lower()
        slug, number = re.sub(r"[\s]+", "-", slug), 0
        while (name := f"{slug}_{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def _check_link(page: Path, link: str) -> str:
    if re.match(r"[a-z]+:", link):
        return ""
    target, _, anchor = link.partition("#")
    path = (page.parent / target).resolve() if target else page
    if path.parent == ROOT / "docs/reference" and path.stem in reference.PAGES:
        return ""
    if not path.exists():
        return f"links to {link}, and there is no such file"
    if anchor and path.suffix == ".md" and anchor not in anchors_of(path):
        return f"links to {link}, and there is no such heading"
    return ""


def main() -> int:
    """Print every problem. Return 1 where there is one."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = [problem for path in pages() for problem in check_page(path)]
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(pages())} pages, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
