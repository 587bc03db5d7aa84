"""Do two answers say the same? Their structure is compared here, single expressions by what the caller brings.

The rules are those of somebody who grades: the order of a set or list does not matter, that of a tuple does; the name
and the unit may be left out, but not be wrong; an approximation behind an exact value is not looked at.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rl.reward import latex
from megatron_rl.reward.number import equal_numbers, read_number
from megatron_rl.reward.region import read_region, same_region
from megatron_rl.reward.units import same_unit, split_unit

# (gold, answer) -> are these two expressions, without structure of their own, equal?
Leaf = Callable[[str, str], bool]

_AND = r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\(?:vee|lor)(?![a-zA-Z])"
_LIST = re.compile(rf"\s*(?:[,;]\s*(?:{_AND})|[,;]|{_AND})\s*")
_COLUMNS = re.compile(r"\s*&\s*")
_ROWS = re.compile(r"\s*\\\\\s*")
_EQUALS = re.compile(r"(?<![<>!\\:])=(?!=)")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|in)(?![a-zA-Z])")
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|doteq)(?![a-zA-Z])|≈")
_RATIO = re.compile(r"\s*:\s*")
_MATRIX = re.compile(r"\\begin\s*\{([pbvVB]?matrix|array)\}(?:\s*\{[^{}]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_IN = re.compile(r"^[a-zA-Z](?:_\w)?\s*\\in(?![a-zA-Z])\s*")
_LABEL = re.compile(r"(?:\(\s*([A-Z])\s*\)|([A-Z])(?:[.:)](?=\s|$)|$))\s*(.*)", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' .-]*")
_MAX_DEPTH = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """kind: "set" and "list" have no order, "tuple", "row" (one row or column of a matrix) and "matrix" have one.

    brackets: those of a tuple, which tell open ends from closed ones where it is an interval.
    """

    kind: str
    items: tuple[str, ...]
    brackets: str = ""


def same_answer(gold: str, answer: str, leaf: Leaf, depth: int = 0) -> bool:
    """Both cleaned by `latex.clean`. `leaf` is asked for expressions; it may not return, see `limits`."""
    gold, answer = (_without_braces(side) for side in (gold, answer))
    if latex.squeeze(gold) == latex.squeeze(answer):
        return bool(answer)
    if not gold or not answer or depth > _MAX_DEPTH:
        return False
    said = _same_words(gold, answer)
    if said is not None:
        return said
    plain_gold, plain_answer = _unnamed(gold, answer)
    if (plain_gold, plain_answer) != (gold, answer):
        return same_answer(plain_gold, plain_answer, leaf, depth + 1)
    if not same_unit(gold, answer):
        return False
    gold, answer = split_unit(gold)[0], split_unit(answer)[0]
    return _same_structure(gold, answer, leaf, depth)


def _same_structure(gold: str, answer: str, leaf: Leaf, depth: int) -> bool:
    numbers = read_number(gold), read_number(answer)
    if numbers[0] and numbers[1]:
        return equal_numbers(numbers[0], numbers[1])
    if _decimal_comma(gold, answer):
        return True
    parts = [[part.strip() for part in latex.split_top(side, _RATIO)] for side in (gold, answer)]
    if max(map(len, parts)) > 1:
        return _all_same(parts[0], parts[1], leaf, depth)
    shapes = _shape(gold), _shape(answer)
    if shapes[0] and shapes[1]:
        if _same_shape(shapes[0], shapes[1], leaf, depth):
            return True
    elif _is_single(shapes[0]) or _is_single(shapes[1]):
        return same_answer(_only(shapes[0], gold), _only(shapes[1], answer), leaf, depth + 1)
    regions = read_region(gold), read_region(answer)
    if regions[0] and regions[1]:
        return same_region(regions[0], regions[1], lambda g, a: same_answer(g, a, leaf, depth + 1))
    if len({len(latex.split_top(side, _EQUALS)) > 1 for side in (gold, answer)}) > 1:
        return False  # 4 = 5 is not 5, and an equation without its right side is none
    if {gold.lstrip("-"), answer.lstrip("-")} & {"\\infty"}:
        return False  # two and one more infinities are infinity to sympy, but no answer
    return _may_be_expressions(gold, answer, shapes) and leaf(gold, answer)


def _without_braces(side: str) -> str:
    """{5} is 5, {1, 2} a list."""
    while latex.is_one_bracket(side, "{", "}"):
        side = side[1:-1].strip()
    return side


def _may_be_expressions(gold: str, answer: str, shapes: tuple[Shape | None, Shape | None]) -> bool:
    """False for a list or tuple, which was compared already. A matrix may be a product, and one side may be a set of
    numbers that the other gives by an inequality."""
    listed = [shape for shape in shapes if shape is not None and shape.kind in ("list", "tuple", "set")]
    return not listed or bool(re.search(r"[<>]|\\(?:le|ge|ne|in|cup|mid)(?![a-zA-Z])", gold + answer))


def _same_words(gold: str, answer: str) -> bool | None:
    """For answers in words and letters of choices; None where either is mathematics."""
    gold_words, answer_words = (latex.without_text_marks(side).strip() for side in (gold, answer))
    choice = _label(gold_words)
    if choice and (len(gold_words) > 1 or re.fullmatch(r"\(?[A-Za-z]\)?[.:]?", answer_words)):
        return _same_choice(choice, answer_words)
    if _words(gold_words) is None or _words(answer_words) is None:
        return None
    if _words(gold_words) == _words(answer_words):
        return True
    # abc may be a product. A phrase, or what is marked as text, is not.
    marked = "\\text" in gold or "\\text" in answer or min(map(_shortest_word, (gold_words, answer_words))) > 1
    return False if marked else None


def _label(words: str) -> tuple[str, str] | None:
    """(letter, text) of "(B)", "B" and "(B) Paris". (A)(B) is a product."""
    match = _LABEL.fullmatch(words)
    return (match[1] or match[2], match[3]) if match and not re.match(r"[-+*/^=(]", match[3]) else None


def _same_choice(gold: tuple[str, str], answer: str) -> bool | None:
    """(B), B, b and "B. Paris" name one choice; its text alone does too."""
    label = _label(answer)
    if label:
        return label[0] == gold[0]
    if re.fullmatch(r"\(?[a-z]\)?", answer):
        return answer.strip("()").upper() == gold[0]
    return _words(answer) is not None and _words(answer) == _words(gold[1]) if gold[1] else None


_SAME_WORDS = {"no solutions": "no solution", "none": "no solution", "all reals": "all real numbers"}


def _words(text: str) -> str | None:
    if text.strip() == "\\emptyset":
        return "no solution"
    if text.strip() == "\\mathbb{R}":
        return "all real numbers"
    if not _WORDS.fullmatch(text) or len(text) < 2:
        return None
    words = " ".join(text.lower().replace("-", " ").rstrip(".").split())
    return _SAME_WORDS.get(words, words)


def _shortest_word(text: str) -> int:
    return min(map(len, text.split()), default=0)


def _unnamed(gold: str, answer: str) -> tuple[str, str]:
    """Without approximations, `x \\in`, and the name before "=" where only one has it or both have the same."""
    gold, answer = _exact_part(gold), _exact_part(answer)
    gold, answer = (side[match.end() :] if (match := _IN.match(side)) else side for side in (gold, answer))
    names = _name_and_value(gold), _name_and_value(answer)
    if names[0] and names[1]:
        same = latex.squeeze(names[0][0]) == latex.squeeze(names[1][0])
        return (names[0][1], names[1][1]) if same else (gold, answer)
    if names[0] and not _is_relation(answer):
        return names[0][1], answer
    if names[1] and not _is_relation(gold):
        return gold, names[1][1]
    return gold, answer


def _exact_part(side: str) -> str:
    first, *rest = _APPROXIMATELY.split(side)
    if not rest:
        return side
    exact = first.strip()
    return rest[-1].strip() if not exact or _is_name(exact) else exact


def _name_and_value(side: str) -> tuple[str, str] | None:
    """(name, value) of `k = 5` and `5 = k`, of `(x, y) = (1, 2)`, and of a chain `x = 5 + 6 = 11`."""
    if sum("=" in item for item in latex.split_top(side, _LIST)) > 1:
        return None  # several values, each with its own name
    parts = latex.split_top(side, _EQUALS)
    if len(parts) > 1 and parts[-1] and _is_name(parts[0]):
        return parts[0], parts[-1]
    return (parts[1], parts[0]) if len(parts) == 2 and parts[0] and _is_name(parts[1]) else None


def _is_name(side: str) -> bool:
    """Something that is computed and not an expression: x, f(2), a_{37}, A:B, (p,q,r), \\frac{NO}{BO}."""
    bare = re.sub(r"_\s*(?:\{[^{}]*\}|\w)|(?<=[a-zA-Z])\([^()]*\)", "", side)
    return bool(re.search(r"[a-zA-Z]", bare)) and not re.search(r"[-+*^\d]|\\(?:cdot|times|sqrt|int|sum)", bare)


def _is_relation(side: str) -> bool:
    """Outside of all brackets: the k=1 below a sum is none."""
    return len(latex.split_top(side, _RELATION)) > 1


def _decimal_comma(gold: str, answer: str) -> bool:
    """1000,99 for 1000.99; only where the gold answer leaves no doubt that it is one number."""
    if not re.fullmatch(r"[-+]?\d+,\d+", answer) or not re.fullmatch(r"[-+]?[\d,]*\.\d+", gold):
        return False
    read, expected = read_number(answer.replace(",", ".")), read_number(gold)
    return read is not None and expected is not None and read.value == expected.value


def _shape(side: str) -> Shape | None:
    """The structure of `side`, or None for a single expression."""
    matrix = _MATRIX.fullmatch(side.strip("[]() ") if side.startswith(("[\\begin", "(\\begin")) else side)
    if matrix and "\\begin" not in matrix[2]:
        return _matrix(matrix[2])
    if side.startswith("\\{") and side.endswith("\\}") and len(latex.split_top(side[2:-2], re.compile(r"\\\}"))) == 1:
        return Shape(kind="set", items=_items(side[2:-2]))
    if latex.is_one_bracket(side, "([", ")]"):
        items = _items(side[1:-1])
        return Shape(kind="tuple", items=items, brackets=side[0] + side[-1]) if len(items) > 1 else None
    items = _items(side)
    if len(items) > 1 and read_number(side) is None:
        return Shape(kind="list", items=items)
    return Shape(kind="list", items=_both_signs(side)) if "\\pm" in side else None


def _matrix(body: str) -> Shape:
    rows = [row for row in latex.split_top(body.strip(), _ROWS) if row and row != "\\hline"]
    cells = [latex.split_top(row, _COLUMNS) for row in rows]
    if len(cells) == 1 or all(len(row) == 1 for row in cells):
        return Shape(kind="row", items=tuple(cell for row in cells for cell in row), brackets=str(len(cells) > 1))
    return Shape(kind="matrix", items=tuple(f"({','.join(row)})" for row in cells))


def _items(side: str) -> tuple[str, ...]:
    """Parts of a list. A comma between groups of three digits, without a space, belongs to a number."""
    grouped = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "\0", side)
    return tuple(part.replace("\0", ",") for part in latex.split_top(grouped, _LIST) if part)


def _both_signs(side: str) -> tuple[str, ...]:
    upper = side.replace("\\pm", "+").replace("\\mp", "-")
    lower = side.replace("\\pm", "-").replace("\\mp", "+")
    return tuple(sign.lstrip("+ ") for sign in (upper, lower))


def _same_shape(gold: Shape, answer: Shape, leaf: Leaf, depth: int) -> bool:
    unordered = {"set", "list"}
    if gold.kind in unordered and answer.kind in unordered:
        if _has_names(gold) != _has_names(answer):
            return _all_same(gold.items, answer.items, leaf, depth)
        return _same_elements(_with_signs(gold.items), _with_signs(answer.items), leaf, depth)
    kinds = {gold.kind, answer.kind}
    if "set" in kinds or ("matrix" in kinds and len(kinds) > 1):
        return False
    # A bracket tells a closed end of an interval from an open one; three numbers are no interval.
    if len(gold.items) == 2 and (gold.brackets or "()") != (answer.brackets or "()") and "row" not in kinds:
        return False
    if kinds == {"row"} and gold.brackets != answer.brackets:
        return False
    return _all_same(gold.items, answer.items, leaf, depth)


def _with_signs(items: Sequence[str]) -> list[str]:
    return [sign for item in items for sign in (_both_signs(item) if "\\pm" in item else (item,))]


def _all_same(gold: Sequence[str], answer: Sequence[str], leaf: Leaf, depth: int) -> bool:
    return len(gold) == len(answer) and all(
        same_answer(g, a, leaf, depth + 1) for g, a in zip(gold, answer, strict=True)
    )


def _same_elements(gold: Sequence[str], answer: Sequence[str], leaf: Leaf, depth: int) -> bool:
    """The same elements in any order. Repeats count only where the gold answer has some: a double root."""
    matches = [[same_answer(g, a, leaf, depth + 1) for a in answer] for g in gold]
    if any(not any(row) for row in matches) or not all(map(any, zip(*matches, strict=True))):
        return False
    repeats = any(sum(column) > 1 for column in zip(*matches, strict=True))
    return len(gold) == len(answer) if repeats else True


def _has_names(shape: Shape) -> bool:
    """AB=4, CD=5: values whose order their names give. x=1, x=2 are two values of one."""
    names = [_name_and_value(item) for item in shape.items]
    return all(names) and len({latex.squeeze(name[0]) for name in names if name}) > 1


def _is_single(shape: Shape | None) -> bool:
    return shape is not None and shape.kind == "set" and len(shape.items) == 1


def _only(shape: Shape | None, side: str) -> str:
    return shape.items[0] if shape is not None and _is_single(shape) else side
