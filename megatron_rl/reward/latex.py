"""Gives one spelling to what LaTeX, Unicode and Markdown write in many ways. Nothing here changes a value."""

import re

_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma",
    "τ": "tau", "υ": "upsilon", "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta",
    "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_SIGNS = {
    "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∈": "\\in ",
    "→": "\\to ", "⟶": "\\to ", "⇌": "\\to ",
    "∅": "\\emptyset ", "∪": "\\cup ", "∩": "\\cap ", "∞": "\\infty ", "ℝ": "\\mathbb{R}", "ℂ": "\\mathbb{C}",
    "ℤ": "\\mathbb{Z}", "±": "\\pm ", "∓": "\\mp ", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ",
    "÷": "\\div ", "°": "^\\circ ", "℃": "^\\circ C", "℉": "^\\circ F", "∠": "\\angle ", "△": "\\triangle ",
    "⟨": "\\langle ", "⟩": "\\rangle ", "µ": "\\mu ", "∶": ":", "、": ",", "。": ".", "⁄": "/", "−": "-",
    "–": "-", "—": "-", "‒": "-", "‑": "-", "﹣": "-", "…": "\\dots ", "“": '"', "”": '"', "’": "'", "′": "'",
    "【": "[", "】": "]", "∣": "|", "￥": "¥",
    "\u3000": " ", "\xa0": " ",
}  # fmt: skip
_SIGNS |= {letter: f"\\{name} " for letter, name in _GREEK.items()}
_SIGNS |= {
    sign: f"\\frac{{{above}}}{{{below}}}"
    for sign, above, below in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888", strict=True)
}
# Full-width forms of ASCII are 0xFEE0 further on.
_UNICODE = {code + 0xFEE0: chr(code) for code in range(0x21, 0x7F)} | {ord(sign): text for sign, text in _SIGNS.items()}
_RAISED, _LOWERED = ("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ")
_PLAIN = "0123456789+-n"
_FROM_RAISED, _FROM_LOWERED = (str.maketrans(signs, _PLAIN) for signs in (_RAISED, _LOWERED))
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|arcsin|arccos|arctan|arccot|ln|log|lg|exp|gcd|lcm|max|min|det"
# Names of points, the only thing whose mark a grader does not look for: the length AB of the segment AB.
_POINTS = r"(?:\{\s*([A-Z]{2,4})\s*\}|([A-Z]{2,4})(?![a-zA-Z]))"

_PART = r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*?)"
_OVER = rf"\{{{_PART}\\over(?![a-zA-Z])\s*{_PART}\}}"

_SPELLINGS = (
    # written through JSON twice; only before commands, so that line breaks of matrices stay
    (r"\\\\(?=(?:d?frac|left|right|le|ge|lt|gt|leq|geq|pi|sqrt|cup|infty|boxed|text|in)(?![a-zA-Z]))", r"\\"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|large|Large|LARGE|huge|small|normalsize|bf|rm)"
     r"(?![a-zA-Z])\.?", ""),
    (r"\\text\s*\{\s*\\?\$\s*\}|\\[$]", "¤"),
    (r"(?<!\\)\\[()\[\]]|\$", " "),
    ("¤", r"\\$"),
    (r"(?<!\\)\\!\s*", ""),
    (r"\{([,:])\}", r"\1"),
    (_OVER, r"\\frac{\1}{\2}"),
    (_OVER, r"\\frac{\1}{\2}"),
    (_OVER.replace("over", "choose"), r"\\binom{\1}{\2}"),
    (r"(?<!\\)\\[,;: ]|~", " "),
    (r"\\(?:q?quad|enspace|thinspace)(?![a-zA-Z])", " "),
    (r"\\[dtcs]frac(?![a-zA-Z])", r"\\frac"),
    # \frac\pi4, \frac{a}b
    (r"\\frac\s*(\\(?!sqrt|text|frac)[a-zA-Z]+|\w)", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*(\\(?!sqrt|text|frac)[a-zA-Z]+|\w)", r"\1{\2}"),
    (r"\\[dt]?binom\s*(\d)\s*(\d)", r"\\binom{\1}{\2}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}\s*|\\color\s*\{[^{}]*\}", ""),
    # a bold letter is a letter, and so are the upright constants; other upright text may be a unit
    (r"\\(?:mathbf|boldsymbol|bm|mathit|pmb)\s*\{\s*(\\?[a-zA-Z]|[-+]?[\d.,]+)\s*\}", r" \1 "),
    (r"\\(?:mathbf|boldsymbol|bm)\s+([a-zA-Z])(?![a-zA-Z])", r" \1 "),
    (r"\\hat\s*(?:\{\s*([ijk])\s*\}|([ijk])(?![a-zA-Z]))", r" \1\2 "),
    (r"\\vec\s*(?:\{\s*([a-zA-Z])\s*\}|([a-zA-Z])(?![a-zA-Z]))", r" \1\2 "),
    (r"\\(?:mathrm|text|textrm)\s*\{\s*([ie])\s*\}", r" \1 "),
    (r"\\(?:mathrm|text|textrm)\s*\{\s*d\s*\}\s*", " d"),
    (r"\\var(epsilon|phi|theta|rho|sigma)(?![a-zA-Z])", r"\\\1"),
    (r"\^\s*(?:\\prime(?![a-zA-Z])|\{\s*\\prime\s*\})", "'"),
    (r"\^\s*\{\s*\\prime\s*\\prime\s*\}", "''"),
    # in front of an index, as in {}^{14}_6C
    (r"(?<![a-zA-Z}\\])\{\}", ""),
    (r"\\(?:longrightarrow|rightarrow|to|rightleftharpoons|leftrightarrow|Rightarrow)(?![a-zA-Z])|<?[-=]+>",
     r"\\to "),
    # \text{sec} and \text{min} are seconds and minutes
    (rf"\\(?:operatorname\*?|mathrm(?!\s*\{{\s*(?:sec|min)\s*\}})|text(?!\s*\{{\s*(?:sec|min)\s*\}}))\s*"
     rf"\{{\s*({_FUNCTIONS})\s*\}}", r"\\\1 "),
    (r"\\(?:textbf|textit|textrm|textsf|texttt|textnormal|mbox|mathrm|mathbf|mathit|mathsf|boldsymbol|operatorname|hbox"
     r"|ce|emph|underline)\s*\{", r"\\text{"),
    (r"\\text\{([^{}]*?)\b(and|or)\b([^{}]*)\}", r"\\text{\1}\\text{ \2 }\\text{\3}"),
    (r"\\text\{\s*\}", " "),
    (r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\neq(?![a-zA-Z])", r"\\ne "),
    (r"\\(?:varnothing|emptyset)(?![a-zA-Z])", r"\\emptyset "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    # a state of quantum mechanics is a letter with an index
    (r"\|\s*([\w+-]{1,8})\s*\\rangle(?![a-zA-Z])", r" q_{\1} "),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"\\[lr]?vert(?![a-zA-Z])", "|"),
    (r"\\(?:overline|widehat|angle|triangle)\s*" + _POINTS, r"\1\2"),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degrees?(?![a-zA-Z])", r"^\\circ "),
    (r"√\s*(\d+(?:\.\d+)?|[a-zA-Z]|\\[a-zA-Z]+)", r"\\sqrt{\1}"),
    (r"([√∛])\s*\(([^()]*)\)", r"\1{\2}"),
    (r"√", r"\\sqrt"),
    (r"∛\s*(\d+)", r"\\sqrt[3]{\1}"),
    (r"∛", r"\\sqrt[3]"),
    (r"\+\s*\\infty", r"\\infty"),
    (r"\\colon(?![a-zA-Z])", ":"),
    (r"\\mathbb\s*\{?\s*([A-Z])\s*\}?", r"\\mathbb{\1}"),
    (r"\\(?:bmod|mod)(?![a-zA-Z])", r"\\bmod "),
)  # fmt: skip
_RULES = tuple((re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS)
# A text of these characters alone needs none of the respellings.
_PLAIN_ASCII = re.compile(r"[A-Za-z0-9.,;:+/=()\[\]\s!?'-]*", re.ASCII)
_TEXT = re.compile(r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_BOLD = re.compile(r"\s*(\*\*|__)(.+)\1[.。]?\s*", re.DOTALL)


def clean(latex: str) -> str:
    """Return the same answer in one spelling: ASCII, no sizes, colours, spacing or dollars; short names of commands.

    Takes linear time and never fails. Cleaning twice is the same as once for what can be read as an answer.
    """
    if not _PLAIN_ASCII.fullmatch(latex):
        latex = _respelled(latex)
    latex = re.sub(r"\s+", " ", latex).strip()
    latex = re.sub("([①-⑳])(?=[①-⑳])", r"\1,", latex)
    return latex if latex.endswith("...") else latex.rstrip(".;,").strip()


def _respelled(latex: str) -> str:
    bold = _BOLD.fullmatch(latex)
    latex = bold[2] if bold else latex
    if not latex.isascii():
        latex = re.sub(f"[{_RAISED}]+", lambda run: f"^{{{run[0].translate(_FROM_RAISED)}}}", latex)
        latex = re.sub(f"[{_LOWERED}]+", lambda run: f"_{{{run[0].translate(_FROM_LOWERED)}}}", latex)
        latex = re.sub("或者?", " or ", latex.translate(_UNICODE))
    for pattern, replacement in _RULES:
        latex = pattern.sub(replacement, latex)
    return latex


def squeeze(latex: str) -> str:
    """Return the text for comparing spellings: no spaces but those that end a command, no `\\text`, no braces around
    one character."""
    latex = _TEXT.sub(r"\1", latex)
    latex = re.sub(r"(\\[a-zA-Z]+) +(?![a-zA-Z])", r"\1", latex)
    latex = re.sub(r"(?<!\\[a-zA-Z])(?<![a-zA-Z]) +| +(?![a-zA-Z])", "", latex)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", latex)


def without_text_marks(latex: str) -> str:
    return _TEXT.sub(r"\1", latex)


def split_top(latex: str, separators: re.Pattern[str]) -> list[str]:
    """Return the parts of `latex` between the separators that stand outside of all brackets. Brackets of intervals
    count as brackets whichever way they face."""
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
    """Tell whether the first bracket is closed by the last character and by nothing before. Other brackets do not
    count."""
    if not latex or latex[0] not in opening or latex[-1] not in closing:
        return False
    depth, position = 0, 0
    while position < len(latex):
        if latex[position] == "\\":
            position += 2
            continue
        depth += latex[position] in opening
        depth -= latex[position] in closing
        if depth == 0:
            return position == len(latex) - 1
        position += 1
    return False
