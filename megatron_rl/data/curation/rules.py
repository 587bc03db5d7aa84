"""Finds defects of a record, by one function each, which returns what it found, or None. The key is the reason in the
report.

They would rather miss a defect than drop a good row; docs/data.md says what each does not see.
"""

import re
from collections.abc import Callable, Mapping

from megatron_rl.data.prompts import Prompt

Rule = Callable[[Prompt], str | None]

_BAD_CHARACTER = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff\ufffd\ufffe\uffff\U000f0000-\U0010ffff]"
)
# UTF-8 that was read as Latin-1 or Windows-1252: accents, signs and spaces, dashes and quotation marks.
_MOJIBAKE = re.compile("[ÃÂ][\u00a0-\u00bf]|â€[\u0080-\u00bf\u0152-\u0178\u02c6\u02dc\u2013-\u203a\u20ac\u2122]|ï»¿")
_IMAGE = re.compile(
    r"!\[[^\]\n]{0,200}\]\([^)\n]{1,500}\)|<img\b|<image>|\\includegraphics|data:image/|cdn\.mathpix\.com",
    re.IGNORECASE,
)
_IMAGE_WORDS = ("![", "image", "<img", "graph", "mathpix", "figure", "diagram", "picture", "illustration", "drawing")
_PLACEHOLDER = re.compile(r"\[image\]", re.IGNORECASE)
_PICTURE = r"(?:figure|diagram|picture|illustration|drawing)"
_BESIDE = r"(?:below|above|shown|(?:at|on|to) (?:the )?(?:right|left))"
_REFERS_TO_IMAGE = re.compile(
    rf"\b(?:shown|pictured|illustrated|depicted|drawn|indicated|seen) (?:here )?(?:in|on|by) (?:the|this) "
    rf"(?:(?:\w+ )?(?:{_PICTURE}|image)|graph)\b(?! of)"
    rf"|\bin (?:the|this) (?:(?:accompanying |adjacent |adjoining |following ){_PICTURE}"
    rf"|{_PICTURE}(?: \d+)?(?: {_BESIDE}\b|\s*[,.?]| is\b))"
    rf"|\b(?:the|this) (?:{_PICTURE} (?:shows|{_BESIDE})|image {_BESIDE})\b"
    rf"|\b(?:see|refer to) (?:the )?{_PICTURE}\b|\bthe graph {_BESIDE}\b"
    r"|\bgraph\b[^.?]{0,60}\b(?:is|are) shown\b",
    re.IGNORECASE,
)
_DRAWN_IN_TEXT = re.compile(r"\[asy\]|\\begin\{(?:tikzpicture|picture|asy)\}|```|<svg", re.IGNORECASE)
# Any two options or parts have this: without it the longer expressions need not be tried.
_SECOND_LABEL = re.compile(r"(?:[Bb2]|[Ii][Ii])\s*[.):]")
_PART = re.compile(r"(?:(?<=\s)|^)(?:\(([a-e]|[1-5]|i{1,3}|iv|v)\)|([a-e]|[1-5]|i{1,3}|iv)[.)](?=\s)"
                   r"|(?:part|question|problem)\s+([a-e]|[1-5]|i{1,3}|iv)\s*[:.)])", re.IGNORECASE)  # fmt: skip
_REFERS_TO_PART = re.compile(r"\b(?:in|from|of|to) part (?:\([a-e]\)|[a-e]\b)", re.IGNORECASE)
_ASKS = re.compile(
    r"\?|^\W*(?:also,? |then,? |hence,? |now,? )*(?:find|determine|calculate|compute|evaluate|prove|show|solve|what|"
    r"how|which|why|explain|describe|state|sketch|draw|write|give|express|estimate|derive|verify|deduce|simplify|factor|"
    r"list)\b",
    re.IGNORECASE,
)
# (A) or A. or A) or \textbf{(A)}, at the beginning of a line or, in brackets, anywhere.
_OPTION_LINE = re.compile(r"^[ \t>*-]*(?:\\text(?:bf|rm)?\{)?\(?([A-Ja-j])\s*[.):](?!\w)", re.MULTILINE)
_OPTION_IN_BRACKETS = re.compile(r"(?<![\w)])(?:\\(?:text|math)(?:bf|rm)?\{\s*)?\(([A-J])\)")
_OPTION_INLINE = re.compile(r"(?<=\s)([A-J])[.)](?=\s*\S)")
_LETTER_ANSWER = re.compile(r"\W*(?:\\text(?:bf)?\{)?\W*[A-Ja-j]\W*")
# Models read these as special tokens: those of ChatML and Llama 3, DeepSeek, Llama 2, Gemma and Ling.
_SPECIAL_TOKEN = re.compile(
    r"<\|[^\s<>|]{1,40}\|>|<｜[^\s<>｜]{1,40}｜>|</s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<role>(?:HUMAN|ASSISTANT|SYSTEM)</role>"
)
_LONGEST_WORD = 40  # characters of an answer that is one word or letter, with what may be around it
_WORD_ANSWER = re.compile(r"\W*(?:\\(?:text|mathrm|textbf)\s*\{)?\s*(true|false|yes|no)\b\s*\}?\W*", re.IGNORECASE)


def is_program(record: Prompt) -> bool:
    """Tell whether the prompt is about a program. Such prompts list cases, label options and answer True as a matter of
    course."""
    return record.domain.startswith("code")


def invalid_characters(record: Prompt) -> str | None:
    texts = (record.prompt,) if is_program(record) else (record.prompt, record.answer)
    for text in texts:
        found = None if text.isascii() and text.isprintable() else _BAD_CHARACTER.search(text) or _MOJIBAKE.search(text)
        if found:
            return f"{found[0]!a} at character {found.start()}"
    return None


def special_tokens(record: Prompt) -> str | None:
    """Find what is left of another model's chat, or an attack on the template."""
    found = _SPECIAL_TOKEN.search(record.prompt)
    return found and f"{found[0]} at character {found.start()}"


def image(record: Prompt) -> str | None:
    small = record.prompt.lower()
    if not any(word in small for word in _IMAGE_WORDS):  # ten times as fast as the expressions
        return None
    found = _IMAGE.search(record.prompt)
    if not found and not is_program(record) and not _DRAWN_IN_TEXT.search(record.prompt):
        found = _PLACEHOLDER.search(record.prompt) or _REFERS_TO_IMAGE.search(record.prompt)
    return found and found[0][:80]


def multiple_choice(record: Prompt) -> str | None:
    """Find options labelled A, B, C, ... in their order; two are enough at the beginning of lines when the answer is
    one."""
    if is_program(record) or not _SECOND_LABEL.search(record.prompt):
        return None
    is_letter = bool(_LETTER_ANSWER.fullmatch(record.answer[:_LONGEST_WORD]))
    for pattern, least in (
        (_OPTION_LINE, 2 if is_letter else 3),
        (_OPTION_IN_BRACKETS, 2 if is_letter else 3),
        (_OPTION_INLINE, 3 if is_letter else 4),
    ):
        labels = _run([label.upper() for label in pattern.findall(record.prompt)], "ABCDEFGHIJ")
        if len(labels) >= least and (pattern is not _OPTION_LINE or is_letter or not _asks_twice(record.prompt)):
            return f"options {', '.join(labels)}"
    return None


def multi_part(record: Prompt) -> str | None:
    """Find parts that are labelled in their order, of which at least two ask for something; or one of them alone."""
    if is_program(record):
        return None
    if not _asks_twice(record.prompt):
        reference = _REFERS_TO_PART.search(record.prompt)
        return reference and reference[0]
    return f"parts {', '.join(label for label, _ in _parts(record.prompt))}"


def true_or_false(record: Prompt) -> str | None:
    found = None if is_program(record) else _WORD_ANSWER.fullmatch(record.answer[:_LONGEST_WORD])
    return found and f"the answer is {found[1]}"


def _asks_twice(prompt: str) -> bool:
    return bool(_SECOND_LABEL.search(prompt)) and sum(bool(_ASKS.search(text)) for _, text in _parts(prompt)) >= 2


def _parts(prompt: str) -> list[tuple[str, str]]:
    """Return (label, text up to the next label) for the longest run a, b, ... or 1, 2, ... or i, ii, ... of labels."""
    marks = [(next(filter(None, found.groups())).lower(), found) for found in _PART.finditer(prompt)]
    best: list[tuple[str, re.Match[str]]] = []
    for order in ("abcde", "12345", ("i", "ii", "iii", "iv", "v")):
        taken: list[tuple[str, re.Match[str]]] = []
        for label, found in marks:
            if len(taken) < len(order) and label == order[len(taken)]:
                taken.append((label, found))
        best = max(best, taken, key=len)
    ends = [*(found.start() for _, found in best[1:]), len(prompt)][: len(best)]
    return [(label, prompt[found.end() : end]) for (label, found), end in zip(best, ends, strict=True)]


def _run(labels: list[str], order: str) -> list[str]:
    """Return the beginning of `order` that `labels` holds in this order."""
    taken: list[str] = []
    for label in labels:
        if len(taken) < len(order) and label == order[len(taken)]:
            taken.append(label)
    return taken


RULES: Mapping[str, Rule] = {
    "invalid_characters": invalid_characters,
    "special_tokens": special_tokens,
    "image": image,
    "multiple_choice": multiple_choice,
    "multi_part": multi_part,
    "true_or_false": true_or_false,
}
# The rules for conversations; the others are about questions that have one answer.
CHAT_RULES = ("invalid_characters", "special_tokens")
