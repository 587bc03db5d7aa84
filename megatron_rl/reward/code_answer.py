"""Finds the program in a response: which of its fenced blocks is the solution (docs/code_rewards.md has the rule)."""

import ast
import builtins
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.reward.code_program import PRELUDE
from megatron_rl.reward.code_tester import Names
from megatron_rl.reward.code_tests import AnyTests, StdinTests

CPP_TAGS = ("cpp", "c++", "cc", "cxx")
_PYTHON_TAG = re.compile(r"(?:python|py)[\w.]*|")
# A fence, or the end of the thinking, which ends every block.
_FENCE = re.compile(r"^([ \t]*)(`{3,})([^`\n]*)$|</think>", re.MULTILINE)
_DEFINED = re.compile(
    r"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(\w++)|^(\w++)[ \t]*(?::[^=\n]*)?=(?!=)", re.MULTILINE
)
_READS = re.compile(r"\b(?:input|stdin|open|fileinput|read|readline|scanf|cin|getline|getchar)\b")
_WRITES = re.compile(r"\b(?:print|stdout|write|printf|cout|puts|putchar)\b")
# A longer source counts as a program without being parsed: a hostile one would take long.
_LONGEST_PARSED = 1 << 16
_KNOWN = frozenset(dir(builtins)) | frozenset(PRELUDE) | {"__name__", "__file__", "__doc__"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Holds a fenced block; tag is what stands after the opening fence, in lower case."""

    tag: str
    source: str

    @property
    def is_cpp(self) -> bool:
        return self.tag in CPP_TAGS


def closed_blocks(text: str) -> list[Block]:
    """Find the fenced blocks, or nothing where the last one is never closed: a response that was cut off.

    A block ends at a line with at least as many backticks and nothing else, as in CommonMark; in a list it may be
    indented. One that is not closed when the thinking ends is none. Linear in the text.
    """
    opening, found = None, []
    for fence in _FENCE.finditer(text):
        if fence[2] is None:
            opening = None
        elif opening is None:
            opening = fence
        elif _closes(fence, opening):
            source = text[opening.end() + 1 : fence.start()]
            found.append(Block(tag=opening[3].strip().lower(), source=_outdented(source, opening[1])))
            opening = None
    return found if opening is None else []


def _closes(fence: re.Match[str], opening: re.Match[str]) -> bool:
    deep = len(fence[1]) > len(opening[1]) + 3
    return len(fence[2]) >= len(opening[2]) and not fence[3].strip() and not deep


def _outdented(source: str, indent: str) -> str:
    return re.sub(f"^{indent}", "", source, flags=re.MULTILINE) if indent else source


def solution_of(blocks: Sequence[Block], tests: AnyTests, cpp: bool) -> Block:
    """Choose the block that is judged. cpp: there is a compiler for blocks of C++.

    Blocks of other languages count only where there is nothing else. Of the rest it is the last of those that define
    most of what the tests call; for tests on stdin the last whole program, at best one that reads its input. Whether a
    block can be compiled does not matter: a mistake in the last attempt is no reason to go back to an earlier one.
    """
    ours = [block for block in blocks if _is_ours(block.tag) or (cpp and block.is_cpp)] or list(blocks)
    if isinstance(tests, StdinTests):
        ranks = [_wholeness(block) for block in ours]
    else:
        ranks = [len(tests.names & _defined(block.source)) for block in ours]
    return ours[max(range(len(ours)), key=lambda place: (ranks[place], place))]


def _is_ours(tag: str) -> bool:
    return _PYTHON_TAG.fullmatch(tag.split(maxsplit=1)[0] if tag else "") is not None


def _defined(source: str) -> set[str]:
    """Return the names of functions, methods, classes and assignments, by how their lines begin: the source may be
    broken."""
    return {one or other for one, other in _DEFINED.findall(source)}


def _wholeness(block: Block) -> int:
    """Rate how whole a program is. 0: no program, or a part of one. 1: it prints. 2: it reads something too."""
    if not _WRITES.search(block.source) or (not block.is_cpp and _needs_another(block.source)):
        return 0
    return 2 if _READS.search(block.source) else 1


def _needs_another(source: str) -> bool:
    """Tell whether the source uses a name that it does not define, as an example that calls the solution does."""
    if len(source) > _LONGEST_PARSED:
        return False
    names = Names()
    try:
        names.add(ast.parse(source))
    # The fault boundary: text that the parser refuses still counts as an attempt at a program.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return "*" not in names.bound and not names.read <= names.bound | _KNOWN
