"""Reads what answers say besides a value: for which numbers it holds, and how two things lie to each other."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.reward import latex


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Holds the values of a formula for all numbers of a domain: `\\frac{\\pi}{4} + k\\pi, k \\in \\mathbb{Z}`.

    domain: Z, N0 (from 0), N1 (from 1), N (either), R, Q or C.
    """

    value: str
    letter: str
    domain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Congruence:
    """Says that `left` is `right` up to a multiple of `modulus`."""

    left: str
    right: int
    modulus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """Holds a relation of two things, such as parallel; it says the same the other way around."""

    name: str
    sides: tuple[str, str]


# \mathbb{Z}^+, \mathbb{N}_0, \mathbb{N}^*, Z
_SET = r"(?:\\mathbb\{)?(?P<set>[ZNRQC])\}?\s*(?:[\^_]\s*\{?\s*(?P<part>[+*0]|\\ast|\\ge\s*0)\s*\}?)?"
_IN_SET = re.compile(
    rf"(?P<value>.*?)[\s,;]*\(?(?:\\text\s*\{{\s*(?:where|for|with)?\s*(?:all|any|some)?\s*\}})?\s*"
    rf"(?P<letter>[a-zA-Z])\s*\\in(?![a-zA-Z])\s*{_SET}\s*\)?",
    re.DOTALL,
)
_COUNTED = re.compile(
    r"(?P<value>.*?)[\s,;]*\(?(?P<letter>[a-zA-Z])\s*=\s*(?P<signs>\\pm\s*)?(?P<first>[01])\s*,\s*(?:\\pm\s*)?[12]\s*,"
    r"\s*(?:(?:\\pm\s*)?[23]\s*,\s*)?(?:\\[lc]?dots|\.\.\.)\s*\)?",
    re.DOTALL,
)
_NOUN = (
    r"(?P<{0}>real|integer|positive integer|non-?negative integer|natural|rational|complex|arbitrary)?"
    r"\s*(?:numbers?|constants?|values?)?"
)
_SAID = re.compile(
    r"(?P<value>.*?)[\s,;]*(?:where|for|with)\s+(?:"
    rf"(?:any|all|every|each|some|an?)\s+{_NOUN.format('noun')}s?\s*(?:of\s+)?(?P<letter>[a-zA-Z])(?:\s+in\s+{_SET})?"
    rf"|(?P<named>[a-zA-Z])\s+is\s+(?:any|an?)?\s*{_NOUN.format('said')})",
    re.DOTALL,
)
_DOMAINS = {
    "real": "R", "integer": "Z", "positive integer": "N1", "natural": "N", "rational": "Q", "complex": "C",
    "nonnegative integer": "N0", "non-negative integer": "N0", "arbitrary": "R", "": "R",
}  # fmt: skip
_CONGRUENCE = re.compile(
    r"(.+?)\s*\\equiv(?![a-zA-Z])\s*([-+]?\d+)\s*(?:,?\s*\(?\s*\\?p?b?mod\s*\{?\s*(\d+)\s*\}?\s*\)?)"
)
_NUMBERED = re.compile(r"(?<![a-zA-Z\\])[cC]_\s*(?:\d|\{\d\})")
_MAX_CONSTANTS = 3
_RELATION = re.compile(r"(.+?)\s*\\(parallel|perp|cong|sim)(?![a-zA-Z])\s*(.+)")


def read_family(text: str) -> Family | None:
    """Return `text` (cleaned by `latex.clean`) as a family, or None."""
    found = _IN_SET.fullmatch(text)
    if found and _speaks_of(found["value"], found["letter"]):
        set_, part = found["set"], found["part"]
        domain = {("N", None): "N", ("N", "0"): "N0"}.get((set_, part), "N1" if part else set_)
        return Family(value=found["value"].strip(), letter=found["letter"], domain=domain)
    found = _COUNTED.fullmatch(text)
    if found and _speaks_of(found["value"], found["letter"]):
        domain = "Z" if found["signs"] or "\\pm" in text[found.end("letter") :] else "N" + found["first"]
        return Family(value=found["value"].strip(), letter=found["letter"], domain=domain)
    plain = latex.without_text_marks(text)
    found = _SAID.fullmatch(plain)
    letter = (found["letter"] or found["named"]) if found else None
    if found and letter and _speaks_of(found["value"], letter):
        domain = found["set"] or _DOMAINS[found["noun"] or found["said"] or ""]
        return Family(value=found["value"].strip(), letter=letter, domain=domain)
    return None


def same_domain(one: str, other: str) -> bool:
    return one == other or {one, other} in ({"N", "N0"}, {"N", "N1"})


def with_letter(text: str, letter: str, replacement: str) -> str:
    """Return the formula `text` with another text in place of `letter`."""
    return re.sub(
        rf"\\(?:begin|end)\s*\{{[a-zA-Z]*\}}|\\[a-zA-Z]+|{letter}",
        lambda found: replacement if found[0] == letter else found[0],
        text,
    )


def constants_renamed(gold: str, answer: str) -> Iterator[str]:
    """Yield `answer` with its free constants called as those of `gold`, in every order: y = A\\cos x + B\\sin x.

    Only where the reference answer numbers them, c_1 and c_2: other letters may be given in the question.
    """
    golds = sorted({found[0] for found in _NUMBERED.finditer(gold)})
    numbered = sorted({found[0] for found in _NUMBERED.finditer(answer)})
    letters = sorted(set(re.findall(r"(?<![a-zA-Z\\])[A-D](?![A-Z_])", answer)))
    names = numbered or letters
    if not golds or len(golds) != len(names) or len(golds) > _MAX_CONSTANTS:
        return
    pattern = re.compile("|".join(rf"(?<![a-zA-Z\\]){re.escape(name)}" for name in names))
    for order in itertools.permutations(golds):
        called = dict(zip(names, order, strict=True))
        yield pattern.sub(lambda found, called=called: f" {called[found[0]]} ", answer)  # type: ignore[misc]


def read_congruence(text: str) -> Congruence | None:
    found = _CONGRUENCE.fullmatch(text)
    if found is None or not int(found[3]):
        return None
    return Congruence(left=found[1], right=int(found[2]), modulus=int(found[3]))


def read_relation(text: str) -> Relation | None:
    found = _RELATION.fullmatch(text)
    return None if found is None else Relation(name=found[2], sides=(found[1], found[3]))


def _speaks_of(value: str, letter: str) -> bool:
    return with_letter(value, letter, "") != value
