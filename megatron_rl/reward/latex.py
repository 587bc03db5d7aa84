"""One spelling for what LaTeX writes in many ways. Nothing here changes a value."""

import re

_SPELLINGS = (
    # written through JSON twice; only before commands, so that line breaks of matrices stay
    (r"\\\\(?=(?:d?frac|left|right|le|ge|lt|gt|leq|geq|pi|sqrt|cup|infty|boxed|text|in)(?![a-zA-Z]))", r"\\"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])\.?", ""),
    (r"\\[$]|[€£]", ""),
    (r"(?<!\\)\\[()\[\]]|\$", " "),
    (r"(?<!\\)\\!\s*", ""),
    (r"\{,\}", ","),
    (r"(?<!\\)\\[,;: ]|~", " "),
    (r"\\(?:q?quad|enspace|thinspace)(?![a-zA-Z])", " "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    # \frac\pi4, \frac{a}b
    (r"\\frac\s*(\\(?!sqrt)[a-zA-Z]+|\w)", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*(\\(?!sqrt)[a-zA-Z]+|\w)", r"\1{\2}"),
    (r"\\(?:textbf|textit|textrm|mbox|mathrm|mathbf|mathit|operatorname|hbox)\s*\{", r"\\text{"),
    (r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])|≤|<=", r"\\le "),
    (r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])|≥|>=", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\neq(?![a-zA-Z])|≠", r"\\ne "),
    (r"\\(?:varnothing|emptyset)(?![a-zA-Z])|∅", r"\\emptyset "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])|°", " "),
    (r"∪", r"\\cup "),
    (r"∞", r"\\infty "),
    (r"π", r"\\pi "),
    (r"√", r"\\sqrt "),
    (r"−", "-"),
    (r"\+\s*\\infty", r"\\infty"),
    (r"²", "^2"),
    (r"³", "^3"),
    (r"\\colon(?![a-zA-Z])", ":"),
    (r"\\mathbb\s*\{?\s*R\s*\}?|ℝ", r"\\mathbb{R}"),
    (r"\s+", " "),
)
_RULES = tuple((re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def clean(latex: str) -> str:
    """The same answer in one spelling: no sizes, spacing, dollars or degree signs; short names of commands."""
    for pattern, replacement in _RULES:
        latex = pattern.sub(replacement, latex)
    return latex.strip().rstrip(".;,").strip() if not latex.rstrip().endswith("...") else latex.strip()


def squeeze(latex: str) -> str:
    """For comparing spellings: no spaces but those that end a command, no `\\text`, no braces around one character."""
    latex = _TEXT.sub(r"\1", latex)
    latex = re.sub(r"(\\[a-zA-Z]+) +(?![a-zA-Z])", r"\1", latex)
    latex = re.sub(r"(?<!\\[a-zA-Z])(?<![a-zA-Z]) +| +(?![a-zA-Z])", "", latex)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", latex)


def without_text_marks(latex: str) -> str:
    return _TEXT.sub(r"\1", latex)


def split_top(latex: str, separators: re.Pattern[str]) -> list[str]:
    """Parts of `latex` between the separators that stand outside of all brackets. Brackets of intervals count as
    brackets whichever way they face."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(latex):
        character = latex[position]
        if depth == 0 and (match := separators.match(latex, position)) and match.end() > position:
            parts.append(latex[start:position])
            start = position = match.end()
            continue
        if character == "\\" and position + 1 < len(latex):
            name = latex[position + 1]
            depth += name == "{"
            depth -= name == "}"
            if latex.startswith(("\\begin", "\\end"), position):
                depth += 1 if latex.startswith("\\begin", position) else -1
            position += 2
            continue
        depth += character in "([{"
        depth -= character in ")]}"
        position += 1
    parts.append(latex[start:])
    return [part.strip() for part in parts]


def is_one_bracket(latex: str, opening: str = "([{", closing: str = ")]}") -> bool:
    """Whether the first bracket is closed by the last character and by nothing before."""
    if not latex or latex[0] not in opening or latex[-1] not in closing:
        return False
    depth, position = 0, 0
    while position < len(latex):
        if latex[position] == "\\":
            position += 2
            continue
        depth += latex[position] in "([{"
        depth -= latex[position] in ")]}"
        if depth == 0:
            return position == len(latex) - 1
        position += 1
    return False
