"""Finds the answer that a text gives: in its boxes, or in what it says without one."""

import ast
import re

from megatron_rl.parsing import parse_json
from megatron_rl.reward.boxed import boxes

# Only this may stand between the boxes of one list: `\boxed{1}$ and $\boxed{2}`. Other text begins a new answer.
_SEPARATOR = re.compile(r"(?:[\s,;$]|\\[,;! ]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\\\]|\\\[|\\\(|\\\)|\b(?:and|or)\b)*")
_SAYS_MORE = re.compile(r"[,;]|\b(?:and|or)\b")
_CUE = re.compile(r"\banswer(?: is| should be)?(?::| is\b)?\s*", re.IGNORECASE)
# Behind the last box: "the answer is 6", and "wait, that is wrong, it is 6".
_REVISION = re.compile(
    r"\banswer (?:is|should be)\b"
    r"|\b(?:wait|no|actually|correction|wrong|mistake|sorry)\b.{0,80}?\b(?:it is|it's|should be)\b",
    re.IGNORECASE | re.DOTALL,
)
_SAYS_ANSWER = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])|answer is")
_END_OF_SENTENCE = re.compile(r"\.(?:\s|$)|\n|<\|")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
# The number must stand alone: not in a word, as in AZYUK2A, nor in a longer number. A unit may follow.
_NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)(?:\s?%)?(?!\w*\d)")
_CHOICE = re.compile(r"(?<![\w'])\(?([A-J])\)?(?![\w'])")
_WORD = re.compile(r"[A-Za-z]{2,}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z]*\}|\\[a-zA-Z]+")
_MARKED = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}")
_MAX_TAIL_CHARACTERS = 20_000


def boxed_answer(text: str) -> str | None:
    """Return what stands in the last box; None without one, or when the last one is never closed.

    Boxes before it that only a comma, "and" or "or" separates from it belong to the same answer and are joined by
    commas: `\\boxed{1}, \\boxed{2}` answers "1,2", and equal ones are one. An earlier box that is followed by more
    words was revised. So was the last one where "the answer is" or "wait, it is" with another answer comes behind it.
    """
    found = boxes(text)
    if not found:
        return None
    revised = _revised(text[found[-1].end :][-_MAX_TAIL_CHARACTERS:], found[-1].content)
    if revised:
        return revised
    first = len(found) - 1
    while first and _belongs(text[found[first - 1].end : found[first].start]):
        first -= 1
    return ",".join(dict.fromkeys(box.content.strip() for box in found[first:]))


def extracted_answer(judged_as: str, text: str) -> str | None:
    """Return what a reward of this kind takes from a response for its answer, for people to read; None for none, and
    for programs, which the response shows whole."""
    return None if judged_as == "code" else boxed_answer(text)


def reference_answers(answer: str) -> list[str]:
    """Return the answers that a data set accepts: each string of a JSON list, the box of a solution, or the text
    itself.

    Behind "####", where there is one: GSM8K's solutions end so.
    """
    text = answer.rpartition("####")[2].strip()
    listed = []
    if text.startswith(('["', "['")) and text.endswith(('"]', "']")):
        try:
            listed = parse_json(text) if text[1] == '"' else ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            listed = []
    texts = [item for item in listed if isinstance(item, str)] or [text]
    return [(stated_answer(one) if _SAYS_ANSWER.search(one) else one).strip() for one in texts]


def _belongs(between: str) -> bool:
    return bool(_SEPARATOR.fullmatch(between) and _SAYS_MORE.search(between))


def _revised(behind: str, boxed: str) -> str | None:
    """Return the answer that is stated after a box and is none of what stands in it."""
    *_, last = [None, *_REVISION.finditer(behind)]
    if last is None:
        return None
    candidates = _candidates(_END_OF_SENTENCE.split(behind[last.end() :].strip(), maxsplit=1)[0])
    stated = min(candidates)[1] if candidates else None
    if stated is None or re.search(rf"(?<![\w.]){re.escape(stated.strip('()'))}(?![\w.])", boxed):
        return None
    return stated


def stated_answer(text: str) -> str:
    """Return the answer of a text that need not have a box: for reference answers, and for evaluation of other models.

    In this order: the box; what follows the last "answer is"; the whole text when it is no prose; the last formula; the
    last number; the last lone letter A to J; the text itself. Training never calls this: there, no box is no answer.
    """
    text = text[-_MAX_TAIL_CHARACTERS:]
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    said = _after_cue(text)
    if said:
        return said if _is_bare(said) else _last_of(said) or said
    return text if _is_bare(text) else _last_of(text) or text


def _after_cue(text: str) -> str:
    *_, last = [None, *_CUE.finditer(text)]
    if last is None:
        return ""
    rest = text[last.end() :].strip()
    formula = _MATH.match(rest)
    if formula:
        return rest[: formula.end()]
    # Only the sentence counts: what follows it ("I hope it is correct.") is no answer.
    sentence = _END_OF_SENTENCE.split(rest, maxsplit=1)[0]
    return sentence if rest[:1] != "(" or ")" in sentence else rest


def _is_bare(text: str) -> bool:
    """Tell whether there is no prose outside of formulas: at most one word, such as a unit or an answer in words, and
    no number after it."""
    outside = _COMMAND.sub(" ", _MATH.sub(" 0 ", _MARKED.sub(" ", text)))
    words = list(_WORD.finditer(outside))
    return not words or (len(words) == 1 and not re.search(r"\d", outside[words[0].end() :]))


def _last_of(text: str) -> str | None:
    """Return whatever ends last, a formula or a number outside of one; without either, a letter."""
    found = _candidates(text)
    return max(found)[1] if found else None


def _candidates(text: str) -> list[tuple[int, str]]:
    """Return (where it ends, text) of formulas and of numbers outside of them; without either, of letters."""
    formulas = [(match.end(), next(filter(None, match.groups()))) for match in _MATH.finditer(text)]
    numbers = [(match.end(), match.group().rstrip(",")) for match in _NUMBER.finditer(_MATH.sub(_blank, text))]
    return formulas + numbers or [(match.end(), match.group()) for match in _CHOICE.finditer(text)]


def _blank(match: re.Match[str]) -> str:
    return "$" * len(match.group())
