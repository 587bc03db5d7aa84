"""Represents expressions as trees for the tests of answers: their value, their spellings, and changes of one thing.

Shares no code with the package, and writes LaTeX without ever reading it. Values decide whether two trees differ.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import mpmath

_DIGITS = 40
CONSTANTS = {"\\pi": lambda: mpmath.pi, "e": lambda: mpmath.e, "i": lambda: mpmath.mpc(0, 1)}
FUNCTIONS = {"sin": mpmath.sin, "cos": mpmath.cos, "ln": mpmath.log, "arctan": mpmath.atan, "tan": mpmath.tan}
_OTHER_FUNCTION = {"sin": "cos", "cos": "sin", "ln": "sin", "arctan": "tan", "tan": "arctan"}
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
# Ranks of how tightly a written piece binds. They decide where it needs brackets.
_SUM, _SLASH, _PRODUCT, _POWER, _ATOM = range(5)


@dataclass(frozen=True, slots=True)
class Num:
    """Represents a number. A negative one is written with its sign."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Name:
    """Represents a letter, or one of CONSTANTS."""

    latex: str


@dataclass(frozen=True, slots=True)
class Sum:
    terms: tuple["Tree", ...]


@dataclass(frozen=True, slots=True)
class Product:
    factors: tuple["Tree", ...]


@dataclass(frozen=True, slots=True)
class Quotient:
    above: "Tree"
    below: "Tree"


@dataclass(frozen=True, slots=True)
class Power:
    base: "Tree"
    exponent: "Tree"


@dataclass(frozen=True, slots=True)
class Root:
    inside: "Tree"
    index: int = 2


@dataclass(frozen=True, slots=True)
class Call:
    """Represents one of FUNCTIONS of one argument."""

    name: str
    inside: "Tree"


Tree = Num | Name | Sum | Product | Quotient | Power | Root | Call


def num(value: int | Fraction) -> Num:
    return Num(Fraction(value))


def fraction(value: Fraction) -> Tree:
    """Return the tree of a fraction as it is usually written: the sign in front, and no denominator of 1."""
    if value.denominator == 1:
        return Num(value)
    positive = Quotient(num(abs(value.numerator)), num(value.denominator))
    return positive if value > 0 else negative(positive)


def negative(tree: Tree) -> Tree:
    return Num(-tree.value) if isinstance(tree, Num) else Product((num(-1), tree))


def letters(tree: Tree) -> frozenset[str]:
    if isinstance(tree, Name):
        return frozenset() if tree.latex in CONSTANTS else frozenset({tree.latex})
    return frozenset().union(*map(letters, _children(tree)))


def value(tree: Tree, point: dict[str, str]) -> mpmath.mpc:
    """Return the value at `point`, which gives each letter its number. Raise ZeroDivisionError if there is none."""
    with mpmath.workdps(_DIGITS):
        return mpmath.mpc(_value(tree, point))


def differ(first: Tree, second: Tree, rng: random.Random, relative: float = 1e-9) -> bool:
    """Return whether the values differ by more than `relative` at one of four random points.

    All letters are positive there. True proves that the trees differ. False proves nothing: trees are equal because
    they were made so.
    """
    names = sorted(letters(first) | letters(second))
    for _ in range(4):
        point = {name: f"{rng.uniform(0.3, 2.7):.6f}" for name in names}
        try:
            pair = value(first, point), value(second, point)
        except ZeroDivisionError:
            continue
        if abs(pair[0] - pair[1]) > relative * max(abs(pair[0]), abs(pair[1])):
            return True
    return False


def _value(tree: Tree, point: dict[str, str]) -> mpmath.mpf | mpmath.mpc:
    match tree:
        case Num(number):
            return mpmath.mpf(number.numerator) / number.denominator
        case Name(latex):
            return CONSTANTS[latex]() if latex in CONSTANTS else mpmath.mpf(point[latex])
        case Sum(terms):
            return mpmath.fsum(_value(term, point) for term in terms)
        case Product(factors):
            return mpmath.fprod(_value(factor, point) for factor in factors)
        case Quotient(above, below):
            return _value(above, point) / _value(below, point)
        case Power(base, exponent):
            return mpmath.power(_value(base, point), _value(exponent, point))
        case Root(inside, index):
            return mpmath.root(_value(inside, point), index)
        case Call(name, inside):
            return FUNCTIONS[name](_value(inside, point))


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """Describes one way to write a tree.

    frac: the command, "short" for \\frac12, "over", or "/". times: what stands between factors. root: the command, "√",
    "sqrt" or "^". power: "braces", "bare", "unicode" or "**". commuted: sums and products the other way around.
    """

    frac: str = "\\frac"
    times: str = ""
    root: str = "\\sqrt"
    power: str = "bare"
    pi: str = "\\pi"
    function: str = "\\{}"
    commuted: bool = False


PLAIN = Style()
TYPED = Style(frac="/", times="*", root="sqrt", power="**", pi="pi", function="{}")
STYLES = {
    "as it stands": PLAIN,
    "dfrac": Style(frac="\\dfrac"),
    "tfrac": Style(frac="\\tfrac"),
    "short frac": Style(frac="short"),
    "slash": Style(frac="/"),
    "over": Style(frac="over"),
    "cdot": Style(times="\\cdot "),
    "times": Style(times="\\times "),
    "braces": Style(power="braces"),
    "unicode": Style(root="√", power="unicode", pi="π"),
    "unicode and slash": Style(frac="/", root="√", power="unicode", pi="π"),
    "power of a half": Style(root="^"),
    "commuted": Style(commuted=True),
    "commuted, cdot": Style(commuted=True, times="\\cdot "),
    "operatorname": Style(function="\\operatorname{{{}}}"),
    "typed": replace(TYPED, power="bare"),
}


def write(tree: Tree, style: Style = PLAIN) -> str:
    return _write(tree, style)[0]


def spellings(tree: Tree) -> list[tuple[str, str]]:
    """Return (rule, text) of each style that writes something of its own."""
    found: dict[str, str] = {}
    for rule, style in STYLES.items():
        found.setdefault(write(tree, style), rule)
    return [(rule, text) for text, rule in found.items()]


def _write(tree: Tree, style: Style) -> tuple[str, int]:
    match tree:
        case Num(number) if number.denominator == 1:
            return str(number.numerator), _ATOM if number >= 0 else _SUM
        case Num(number):
            return _write(fraction(number), style)
        case Name(latex):
            return (style.pi if latex == "\\pi" else latex), _ATOM
        case Sum(terms):
            return _write_sum(terms[::-1] if style.commuted else terms, style), _SUM
        case Product(factors):
            return _write_product(factors, style)
        case Quotient(above, below):
            return _write_quotient(above, below, style)
        case Power(base, exponent):
            return _write_power(_bracketed(base, _ATOM, style), exponent, style), _POWER
        case Root(inside, index):
            return _write_root(inside, index, style)
        case Call(name, inside):
            return f"{style.function.format(name)}({write(inside, style)})", _POWER


def _bracketed(tree: Tree, at_least: int, style: Style) -> str:
    text, level = _write(tree, style)
    return text if level >= at_least else f"({text})"


def _write_sum(terms: tuple[Tree, ...], style: Style) -> str:
    texts = [write(term, style) for term in terms]
    return texts[0] + "".join(text if text.startswith("-") else f"+{text}" for text in texts[1:])


def _write_product(factors: tuple[Tree, ...], style: Style) -> tuple[str, int]:
    first = factors[0]
    if first == num(-1) and len(factors) > 1:
        rest = factors[1] if len(factors) == 2 else Product(factors[1:])
        return f"-{_bracketed(rest, _SLASH, style)}", _SUM
    if style.commuted and not (isinstance(first, Num) and first.value < 0):
        factors = factors[::-1]
    text, level = _write(factors[0], style)
    is_negative = text.startswith("-")
    if level < _PRODUCT and not (isinstance(factors[0], Num) and is_negative):
        text, is_negative = f"({text})", False
    for factor in factors[1:]:
        following = _bracketed(factor, _PRODUCT, style)
        text += _between(text, following, style) + following
    return text, _SUM if is_negative else _PRODUCT


def _between(left: str, right: str, style: Style) -> str:
    if style.times:
        return style.times
    if right[0].isdigit() or (left[-1].isdigit() and right.startswith("\\frac")):
        return "\\cdot "
    return " " if re.search(r"\\[a-zA-Z]+$", left) and right[0].isalpha() else ""


def _write_quotient(above: Tree, below: Tree, style: Style) -> tuple[str, int]:
    if style.frac == "/":
        return f"{_bracketed(above, _PRODUCT, style)}/{_bracketed(below, _POWER, style)}", _SLASH
    texts = write(above, style), write(below, style)
    if style.frac == "over":
        return f"{{{texts[0]} \\over {texts[1]}}}", _POWER
    if style.frac == "short" and all(re.fullmatch(r"\d", text) for text in texts):
        return f"\\frac{texts[0]}{texts[1]}", _POWER
    command = "\\frac" if style.frac == "short" else style.frac
    return f"{command}{{{texts[0]}}}{{{texts[1]}}}", _POWER


def _write_power(base: str, exponent: Tree, style: Style) -> str:
    text = write(exponent, style)
    if style.power == "**":
        return f"{base}**({text})"
    if style.power == "unicode" and re.fullmatch(r"-?\d+", text):
        return base + text.translate(_SUPERSCRIPTS)
    if style.root == "sqrt":
        return f"{base}^({text})" if len(text) > 1 else f"{base}^{text}"
    return f"{base}^{text}" if style.power == "bare" and len(text) == 1 else f"{base}^{{{text}}}"


def _write_root(inside: Tree, index: int, style: Style) -> tuple[str, int]:
    if style.root == "^" or (index != 2 and style.root != "\\sqrt"):
        base = _bracketed(inside, _ATOM, style)
        return _write_power(base, Num(Fraction(1, index)), replace(style, frac="/")), _POWER
    text = write(inside, style)
    if style.root == "√":
        return (f"√{text}" if re.fullmatch(r"\d+|[a-z]", text) else f"√({text})"), _POWER
    if style.root == "sqrt":
        return f"sqrt({text})", _POWER
    return f"\\sqrt{'' if index == 2 else f'[{index}]'}{{{text}}}", _ATOM


def changed(tree: Tree, rng: random.Random) -> Iterator[tuple[str, Tree]]:
    """Yield (rule, tree) with one thing changed. Some have the same value; `differ` finds out."""
    yield from _changed(tree, rng)
    yield "the sign of all", negative(tree)
    yield "one more", Sum((tree, num(1)))
    yield "a third", Quotient(tree, num(3))
    yield "twice", Product((num(2), tree)) if not isinstance(tree, Num) else Num(tree.value * 2)
    # Behind a number alone some letters may be a unit.
    extra = rng.choice([letter for letter in ("xyztdkhbw" if letters(tree) else "xynk") if letter not in letters(tree)])
    yield "a trailing letter", Product((tree, Name(extra)))
    if isinstance(tree, Sum):
        yield "a letter behind the last term", Sum((*tree.terms[:-1], Product((tree.terms[-1], Name(extra)))))


def _changed(tree: Tree, rng: random.Random) -> Iterator[tuple[str, Tree]]:
    match tree:
        case Num(number):
            yield "a number", Num(number + 1)
            yield "a number", Num(number - 1)
            yield "a sign", Num(-number)
        case Name(latex) if latex in CONSTANTS:
            yield "a constant", Name("e" if latex == "\\pi" else "\\pi")
        case Name(latex):
            yield "a letter", Name(rng.choice([letter for letter in "abcdhkmnprstuvwxyz" if letter != latex]))
        case Sum(parts) | Product(parts):
            for n, part in enumerate(parts):
                others = parts[:n] + parts[n + 1 :]
                if part != num(-1):
                    what = "a dropped term" if isinstance(tree, Sum) else "a dropped factor"
                    yield what, others[0] if len(others) == 1 else type(tree)(others)
                if isinstance(tree, Sum):
                    yield "a sign", Sum((*parts[:n], negative(part), *parts[n + 1 :]))
                for rule, other in _changed(part, rng):
                    yield rule, type(tree)((*parts[:n], other, *parts[n + 1 :]))
        case Quotient(above, below):
            yield "upside down", Quotient(below, above)
            yield from ((rule, Quotient(other, below)) for rule, other in _changed(above, rng))
            yield from ((rule, Quotient(above, other)) for rule, other in _changed(below, rng) if other != num(0))
        case Power(base, exponent):
            yield "a dropped exponent", base
            yield from (("an exponent", Power(base, other)) for _, other in _changed(exponent, rng) if other != num(0))
            yield from ((rule, Power(other, exponent)) for rule, other in _changed(base, rng))
        case Root(inside, index):
            yield "a dropped root", inside
            yield "the index of a root", Root(inside, index + 1)
            yield from ((rule, Root(other, index)) for rule, other in _changed(inside, rng) if other != num(-1))
        case Call(name, inside):
            yield "another function", Call(_OTHER_FUNCTION[name], inside)
            yield from ((rule, Call(name, other)) for rule, other in _changed(inside, rng))


def _children(tree: Tree) -> tuple[Tree, ...]:
    match tree:
        case Num() | Name():
            return ()
        case Sum(parts) | Product(parts):
            return parts
        case Quotient(first, second) | Power(first, second):
            return first, second
        case Root(inside) | Call(_, inside):
            return (inside,)
