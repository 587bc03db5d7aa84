"""Makes reference answers with parts: tuples, sets, lists, intervals, matrices, ratios."""

import random
from collections.abc import Sequence
from fractions import Fraction
from math import gcd

from metamorphic.gold import WIDE, Gold, wide
from metamorphic.trees import fraction, write


def _entries(rng: random.Random, count: int) -> list[Fraction]:
    pool = [*range(-9, 10), 12, 25, 100, 200, 500]
    return [Fraction(n) for n in rng.sample(pool, count - 1)] + [
        Fraction(rng.choice([1, 3, 5, 7]), rng.choice([1, 2, 4, 8]))
    ]


def _plainly(entries: Sequence[Fraction], between: str = ",") -> str:
    return between.join(write(fraction(entry)) for entry in entries)


def _decimals(entries: Sequence[Fraction], between: str = ",") -> str:
    return between.join(f"{float(entry):g}" for entry in entries)


def _other_entries(entries: list[Fraction], rng: random.Random) -> list[tuple[str, list[Fraction]]]:
    """Return lists with an entry changed, left out or added. None only puts the same entries in another order."""
    place = rng.randrange(len(entries))
    larger = max(entries) + 1

    def with_entry(entry: Fraction) -> list[Fraction]:
        return [*entries[:place], entry, *entries[place + 1 :]]

    found = [
        ("a number", with_entry(larger)),
        ("a number", with_entry(larger + 11)),
        ("a half more", with_entry(entries[place] + Fraction(1, 16))),
        ("a sign", with_entry(-entries[place])),
        ("one less", entries[:place] + entries[place + 1 :]),
        ("one more", [*entries, larger]),
        ("one more in front", [larger, *entries]),
        ("all signs", [-entry for entry in entries]),
    ]
    return [
        (rule, other) for rule, other in found if sorted(other) != sorted(entries) and len(set(other)) == len(other)
    ]


def ordered_tuple(rng: random.Random) -> Gold:
    entries = _entries(rng, rng.choice([2, 3, 3]))
    while len(set(entries)) < len(entries):
        entries = _entries(rng, len(entries))
    inside, count = _plainly(entries), len(entries)
    names = ("x", "y", "z")[:count]
    column, backwards = (_plainly(side, " \\\\ ") for side in (entries, entries[::-1]))
    thin = _plainly(entries, ",\\,")
    ways = [
        ("as it stands", f"({inside})"),
        ("spaces", f"({_plainly(entries, ', ')})"),
        ("wide spaces", f"( {_plainly(entries, ' , ')} )"),
        ("left right", f"\\left({inside}\\right)"),
        ("thin spaces", f"({thin})"),
        ("big brackets", f"\\bigl({inside}\\bigr)"),
        ("decimals", f"({_decimals(entries)})"),
        ("short fractions", f"({inside})".replace("\\frac", "\\tfrac")),
        ("named", f"({','.join(names)}) = ({inside})"),
        ("each named", ", ".join(f"{n}={write(fraction(e))}" for n, e in zip(names, entries, strict=True))),
        ("angle brackets", f"\\langle {inside}\\rangle"),
        ("a column", f"\\begin{{pmatrix}} {column} \\end{{pmatrix}}"),
        ("a column in square brackets", f"\\begin{{bmatrix}} {column} \\end{{bmatrix}}"),
        ("full-width brackets", f"（{inside}）"),
        ("full-width comma", f"（{inside.replace(',', '，')}）"),
        ("full width", f"({_decimals(entries)})".translate(WIDE)),
        *wide(f"({_decimals(entries)})")[1:],
    ]
    swapped = [entries[1], entries[0], *entries[2:]]
    mutations = [
        *((rule, f"({_plainly(other)})") for rule, other in _other_entries(entries, rng) if len(other) > 1),
        ("the first two swapped", f"({_plainly(swapped)})"),
        ("the first two swapped, spaces", f"({_plainly(swapped, ', ')})"),
        ("backwards", f"({_plainly(entries[::-1])})"),
        ("a set", f"\\{{{inside}\\}}"),
        *([("closed", f"[{inside}]"), ("half open", f"({inside}]")] if count == 2 else []),
        ("digits joined", "".join(str(abs(e.numerator)) for e in entries)),
        ("one entry alone", write(fraction(entries[-1]))),
        ("the first alone", write(fraction(entries[0]))),
        ("a trailing letter inside", f"({inside}t)"),
        ("letters inside", f"({write(fraction(entries[0]))}+2t,{_plainly(entries[1:])})"),
        ("twice", f"2({inside})"),
        ("a nested pair", f"(({inside}),{write(fraction(entries[0]))})"),
        ("a column backwards", f"\\begin{{pmatrix}} {backwards} \\end{{pmatrix}}"),
    ]
    mutations = [(rule, text) for rule, text in mutations if text != f"({inside})"]
    return Gold(
        kind="tuple",
        text=f"({inside})",
        ways=ways,
        mutations=mutations,
        other=f"({_plainly([e + 1 for e in entries])})",
        name=f"({','.join('abc'[:count])})",
    )


def _shuffled(entries: list[Fraction], rng: random.Random) -> list[Fraction]:
    return rng.sample(entries, len(entries))


def a_set(rng: random.Random) -> Gold:
    entries = sorted(set(_entries(rng, rng.choice([2, 3, 4]))))
    while len(entries) < 2:
        entries = sorted(set(_entries(rng, 3)))
    inside = _plainly(entries)
    ways = [
        ("as it stands", f"\\{{{inside}\\}}"),
        ("spaces", f"\\{{ {_plainly(entries, ', ')} \\}}"),
        ("left right", f"\\left\\{{{inside}\\right\\}}"),
        ("lbrace", f"\\lbrace {inside} \\rbrace"),
        ("decimals", f"\\{{{_decimals(entries)}\\}}"),
        *(("another order", f"\\{{{_plainly(_shuffled(entries, rng))}\\}}") for _ in range(3)),
        ("backwards", f"\\{{{_plainly(entries[::-1], ', ')}\\}}"),
        ("a list", _plainly(entries, ", ")),
        ("a list backwards", _plainly(entries[::-1], ", ")),
        ("a membership", f"x \\in \\{{{inside}\\}}"),
        ("named", f"S = \\{{{inside}\\}}"),
        ("full-width braces", f"｛{inside.replace(',', '，')}｝"),
        ("Chinese commas", _decimals(entries, "、")),
        *((rule, f"\\{{{text}\\}}") for rule, text in wide(inside) if rule != "full width"),
    ]
    mutations = [
        *((rule, f"\\{{{_plainly(other)}\\}}") for rule, other in _other_entries(entries, rng)),
        *((f"{rule}, a list", _plainly(other, ", ")) for rule, other in _other_entries(entries, rng) if len(other) > 1),
        ("a tuple", f"({inside})"),
        ("an interval", f"[{_plainly([entries[0], entries[-1]])}]"),
        ("the empty set", "\\emptyset"),
        ("one element", write(fraction(entries[0]))),
        ("digits joined", "".join(str(abs(e.numerator)) for e in entries)),
        ("a sum", "+".join(f"({write(fraction(e))})" for e in entries)),
        ("a trailing letter", f"\\{{{inside}x\\}}"),
        ("a nested set", f"\\{{\\{{{inside}\\}},7\\}}"),
    ]
    return Gold(
        kind="set",
        text=f"\\{{{inside}\\}}",
        ways=ways,
        mutations=mutations,
        other=f"\\{{{_plainly([e + 1 for e in entries])}\\}}",
    )


def a_list(rng: random.Random) -> Gold:
    entries = sorted(set(_entries(rng, rng.choice([2, 2, 3]))))
    while len(entries) < 2:
        entries = sorted(set(_entries(rng, 3)))
    texts = [write(fraction(entry)) for entry in entries]
    back = texts[::-1]
    ways = [
        ("as it stands", ", ".join(texts)),
        ("another order", ", ".join([*texts[1:], texts[0]])),
        *([("no spaces", ",".join(back))] if entries[-1] < 100 else []),  # 2,100 may be one number
        ("backwards", ", ".join(back)),
        ("and", f"{', '.join(texts[:-1])} \\text{{ and }} {texts[-1]}"),
        ("or", f"{', '.join(texts[:-1])} \\text{{ or }} {texts[-1]}"),
        ("plain and", f"{', '.join(texts[:-1])} and {texts[-1]}"),
        ("a set", f"\\{{{', '.join(texts)}\\}}"),
        ("semicolons", "; ".join(texts)),
        ("each named", ", ".join(f"x={text}" for text in texts)),
        ("each named, or", " \\text{ or } ".join(f"x = {text}" for text in texts)),
        ("numbered names", ", ".join(f"x_{n} = {text}" for n, text in enumerate(texts, 1))),
        ("one name", f"x = {', '.join(texts)}"),
        ("Chinese comma", "、".join(texts)),
        ("Chinese or", "或".join(texts)),
        ("Chinese or, named", "或".join(f"x={text}" for text in texts)),
        ("full-width comma", "，".join(texts)),
        ("thin spaces", ",\\,".join(texts)),
        ("decimals", _decimals(entries, ", ")),
        ("quad", ",\\quad ".join(texts)),
    ]
    mutations = [
        *((rule, _plainly(other, ", ")) for rule, other in _other_entries(entries, rng)),
        *(
            (f"{rule}, and", _plainly(other, " \\text{ and } "))
            for rule, other in _other_entries(entries, rng)
            if len(other) > 1
        ),
        ("digits joined", "".join(str(abs(e.numerator)) for e in entries)),
        ("the first alone", texts[0]),
        ("the last alone", texts[-1]),
        ("a sum", "+".join(f"({text})" for text in texts)),
        ("a trailing letter", f"{', '.join(texts)}x"),
        ("closed interval", f"[{texts[0]}, {texts[-1]}]"),
    ]
    return Gold(
        kind="list",
        text=", ".join(texts),
        ways=ways,
        mutations=mutations,
        other=_plainly([e + 1 for e in entries], ", "),
    )


_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


_OTHER_STRICTNESS = {"<": "\\le", "\\le": "<"}


def interval(rng: random.Random) -> Gold:
    low = Fraction(rng.randint(-9, 3), rng.choice([1, 1, 2]))
    high = low + rng.randint(2, 120)
    left, right = rng.choice("[("), rng.choice("])")
    shape = rng.choice(["bounded", "below", "above", "outside"])
    a, b = write(fraction(low)), write(fraction(high))

    def written(low: str, high: str, left: str, right: str, spaced: bool = False) -> str:
        comma = ", " if spaced else ","
        parts = {
            "bounded": f"{left}{low}{comma}{high}{right}",
            "below": f"(-\\infty{comma}{high}{right}",
            "above": f"{left}{low}{comma}\\infty)",
            "outside": f"(-\\infty{comma}{low}{']' if right == ']' else ')'}\\cup{left}{high}{comma}\\infty)",
        }
        return parts[shape]

    less, up = "\\le" if left == "[" else "<", "\\le" if right == "]" else "<"

    def said(low: str, high: str, less: str = less, up: str = up) -> str:
        more = _TURNED[less]
        return {
            "bounded": f"{low} {less} x {up} {high}",
            "below": f"x {up} {high}",
            "above": f"x {more} {low}",
            "outside": f"x {up} {low} \\text{{ or }} x {more} {high}",
        }[shape]

    more, down = _TURNED[less], _TURNED[up]
    inequality = said(a, b)
    turned = {
        "bounded": f"{b} {down} x {more} {a}",
        "below": f"{b} {down} x",
        "above": f"{a} {less} x",
        "outside": f"x {more} {b} \\text{{ or }} x {up} {a}",
    }[shape]
    text = written(a, b, left, right)
    signs = inequality.replace("\\le", "≤").replace("\\ge", "≥")
    ways = [
        ("as it stands", text),
        ("spaces", written(a, b, left, right, spaced=True)),
        ("inequality", inequality),
        ("inequality, leq", inequality.replace("\\le", "\\leq").replace("\\ge", "\\geq")),
        ("inequality, leqslant", inequality.replace("\\le", "\\leqslant").replace("\\ge", "\\geqslant")),
        ("inequality, typed", inequality.replace("\\le", "<=").replace("\\ge", ">=").replace("\\text{ or }", "or")),
        ("inequality, signs", signs),
        ("inequality turned", turned),
        ("membership", f"x \\in {text}"),
        ("membership, sign", f"x∈{text}"),
        ("set of", f"\\{{x \\mid {inequality}\\}}"),
        ("set of, bar", f"\\{{x | {inequality}\\}}"),
        ("set of, colon", f"\\{{x : {inequality}\\}}"),
        ("signs", text.replace("\\infty", "∞").replace("\\cup", "∪")),
        ("left right", _left_right(text)),
        ("plus infinity", text.replace(",\\infty", ",+\\infty")),
        ("Chinese or", signs.replace("\\text{ or }", "或").replace(">", "＞").replace("<", "＜")),
        ("full-width comma", text.replace(",", "，")),
        *((rule, text.replace("-", sign)) for rule, sign in (("minus sign", "−"), ("en dash", "–"))),
    ]
    flip = {"[": "(", "(": "[", "]": ")", ")": "]"}
    outside = {"bounded": high + 500, "below": high + 500, "above": low - 500, "outside": (low + high) / 2}[shape]
    mutations = [
        *(
            (rule, other)
            for rule, other in (
                ("the left bracket", written(a, b, flip[left], right)),
                ("the right bracket", written(a, b, left, flip[right])),
                ("both brackets", written(a, b, flip[left], flip[right])),
                ("an end", written(write(fraction(low - 1)), b, left, right)),
                ("an end", written(write(fraction(low - Fraction(1, 3))), b, left, right)),
                ("an end", written(a, write(fraction(high + 1)), left, right)),
                ("both ends", written(write(fraction(low - 2)), write(fraction(high + 2)), left, right)),
            )
            if other != text
        ),
        ("the direction", " ".join(_TURNED.get(part, part) for part in inequality.split(" "))),
        ("an end of the inequality", said(write(fraction(low - 1)), write(fraction(high + 1)))),
        ("strictness", said(a, b, _OTHER_STRICTNESS[less], _OTHER_STRICTNESS[up])),
        ("one end", a if shape != "below" else b),
        ("an equation", f"x = {a if shape != 'below' else b}"),
        ("all numbers", "\\mathbb{R}"),
        ("a set", f"\\{{{a},{b}\\}}"),
        ("empty", "\\emptyset"),
        ("a part more", f"{text}\\cup\\{{{write(fraction(outside))}\\}}"),
        ("another letter on one side", f"{text}t"),
        ("not", f"x \\notin {text}"),
    ]
    return Gold(
        kind="interval",
        text=text,
        ways=ways,
        mutations=[pair for pair in mutations if pair[1] not in (text, inequality)],
        # No point of it is in the right one, so both together are neither.
        other=f"({write(fraction(outside))},{write(fraction(outside + Fraction(1, 4)))})",
    )


def _left_right(text: str) -> str:
    for character in "([":
        text = text.replace(character, f"\\left{character}")
    for character in ")]":
        text = text.replace(character, f"\\right{character}")
    return text


def matrix(rng: random.Random) -> Gold:
    rows = [[Fraction(rng.choice([-3, -2, -1, 0, 1, 2, 4, 5, 7, 10])) for _ in range(2)] for _ in range(2)]
    rows[0][1] = rows[1][0] + 3 + rng.randint(0, 5)  # never symmetric
    rows[1][1] = Fraction(rng.choice([1, 3, 5]), 2)

    def written(rows: list[list[Fraction]], kind: str = "pmatrix", joined: tuple[str, str] = (" & ", " \\\\ ")) -> str:
        body = joined[1].join(_plainly(row, joined[0]) for row in rows)
        return f"\\begin{{{kind}}} {body} \\end{{{kind}}}"

    text = written(rows)
    body = " \\\\ ".join(_plainly(row, " & ") for row in rows)
    decimal_body = " \\\\ ".join(_decimals(row, " & ") for row in rows)
    ways = [
        ("as it stands", text),
        ("square brackets", written(rows, "bmatrix")),
        ("no spaces", written(rows, joined=("&", "\\\\"))),
        ("lines", written(rows, joined=(" & ", " \\\\\n"))),
        ("array", f"\\left(\\begin{{array}}{{cc}} {body} \\end{{array}}\\right)"),
        ("array in square brackets", f"\\left[\\begin{{array}}{{cc}} {body} \\end{{array}}\\right]"),
        ("matrix in brackets", f"\\left(\\begin{{matrix}} {body} \\end{{matrix}}\\right)"),
        ("decimals", f"\\begin{{pmatrix}} {decimal_body} \\end{{pmatrix}}"),
        ("dfrac", text.replace("\\frac", "\\dfrac")),
        ("short fractions", text.replace("\\frac{1}{2}", "\\frac12").replace("{3}{2}", "32").replace("{5}{2}", "52")),
        ("a row break at the end", f"\\begin{{pmatrix}} {body} \\\\ \\end{{pmatrix}}"),
        ("a factor in front", f"\\frac{{1}}{{2}}{written([[2 * cell for cell in row] for row in rows])}"),
        ("a factor behind", f"{written([[2 * cell for cell in row] for row in rows])}\\cdot \\frac{{1}}{{2}}"),
        *((rule, text.replace("-", sign)) for rule, sign in (("minus sign", "−"), ("en dash", "–")) if "-" in text),
    ]
    changes = []
    for row in range(2):
        for column in range(2):
            for rule, by in (("an entry", 1), ("an entry", -2), ("a half more", Fraction(1, 2))):
                other = [list(line) for line in rows]
                other[row][column] += by
                changes.append((rule, written(other, rng.choice(["pmatrix", "bmatrix"]))))
    mutations = [
        *rng.sample(changes, 8),
        ("transposed", written([list(column) for column in zip(*rows, strict=True)])),
        ("rows swapped", written(rows[::-1])),
        ("columns swapped", written([row[::-1] for row in rows])),
        ("signs", written([[-cell for cell in row] for row in rows])),
        ("one row", written(rows[:1])),
        ("one column", written([row[:1] for row in rows])),
        ("one row more", written([*rows, rows[0]])),
        ("twice", f"2{text}"),
        ("a trailing letter", f"{text}x"),
        ("a list", ", ".join(_plainly(row, ", ") for row in rows)),
    ]
    other = written([[cell + 2 for cell in row] for row in rows])
    return Gold(kind="matrix", text=text, ways=ways, mutations=mutations, other=other, name="A")


def ratio(rng: random.Random) -> Gold:
    parts = rng.sample([1, 2, 3, 4, 5, 7, 9, 11, 13], rng.choice([2, 2, 3]))
    while gcd(*parts) > 1:
        parts = rng.sample([1, 2, 3, 5, 7, 11], len(parts))
    text, spaced = ":".join(map(str, parts)), " : ".join(map(str, parts))
    names = "a:b:c"[: 2 * len(parts) - 1]
    ways = [
        ("as it stands", text),
        ("spaces", spaced),
        ("colon", text.replace(":", "\\colon ")),
        ("full-width colon", text.replace(":", "：")),
        ("ratio sign", text.replace(":", "∶")),
        ("full width", text.translate(WIDE)),
        ("text", f"\\text{{{text}}}"),
        ("brackets", f"({text})"),
        ("named", f"{names} = {text}"),
        ("named, spaces", f"{names} = {spaced}"),
        ("thin spaces", text.replace(":", "\\,:\\,")),
        ("braces", text.replace(":", "{:}")),
        ("names of lengths", f"{'AB:BC:CA'[: 3 * len(parts) - 1]} = {text}"),
        ("mathbf", f"\\mathbf{{{text}}}"),
    ]
    swapped = [parts[1], parts[0], *parts[2:]]
    place = rng.randrange(len(parts))
    mutations = [
        *(("a number", ":".join(str(p + by * (n == place)) for n, p in enumerate(parts))) for by in (1, 2, 14)),
        ("swapped", ":".join(map(str, swapped))),
        ("swapped, spaces", " : ".join(map(str, swapped))),
        ("one more", f"{text}:17"),
        ("one more in front", f"17:{text}"),
        ("a sign", f"-{text}"),
        ("a list", ",".join(map(str, parts))),
        ("a sum", "+".join(map(str, parts))),
        ("a product", "\\cdot ".join(map(str, [*parts, 19]))),
        ("digits joined", "".join(map(str, parts))),
        ("a decimal point", f"{parts[0]}.{parts[1]}"),
        ("one part", str(parts[0] + 20)),
        ("squares", ":".join(str((p + 1) ** 2) for p in parts)) if set(parts) != {1} else ("one more", f"{text}:3"),
        ("a letter", f"{text}x"),
        ("named elsewhere", f"{names} = {':'.join(map(str, swapped))}"),
        ("an inequality", text.replace(":", "<")),
    ]
    mutations = [pair for pair in mutations if pair[1] != text and not _same_ratio(pair[1], parts)]
    return Gold(kind="ratio", text=text, ways=ways, mutations=mutations, other=":".join(str(p + 3) for p in parts))


def _same_ratio(text: str, parts: list[int]) -> bool:
    found = text.split(" = ")[-1].replace(" ", "").split(":")
    if len(found) != len(parts) or not all(part.isdigit() for part in found):
        return False
    return all(int(found[n]) * parts[0] == int(found[0]) * parts[n] for n in range(len(parts)))


def unit_vectors(rng: random.Random) -> Gold:
    """Make a sum of multiples of the unit vectors i, j and k."""
    numbers = rng.sample([-9, -7, -5, -4, -3, -2, 2, 3, 4, 5, 6, 8], rng.choice([2, 3]))
    letters = rng.sample("ijk", len(numbers))

    def written(numbers: list[int], letters: list[str], style: str = "\\mathbf{{{}}}", between: str = "") -> str:
        terms = (f"{number:+d}{between}{style.format(letter)}" for number, letter in zip(numbers, letters, strict=True))
        return "".join(terms).removeprefix("+")

    text = written(numbers, letters)
    missing = next((letter for letter in "ijk" if letter not in letters), "n")
    swapped = [letters[1], letters[0], *letters[2:]]
    ways = [
        ("as it stands", text),
        ("backwards", written(numbers[::-1], letters[::-1])),
        ("spaces", text.replace("+", " + ").replace("-", " - ").strip()),
        ("thin spaces", written(numbers, letters, between="\\,")),
        ("hats", written(numbers, letters, "\\hat{{{}}}")),
        ("bold hats", written(numbers, letters, "\\hat{{\\mathbf{{{}}}}}")),
        ("arrows", written(numbers, letters, "\\vec{{{}}}")),
        ("boldsymbol", written(numbers, letters, "\\boldsymbol{{{}}}")),
        ("no braces", written(numbers, letters, "\\mathbf {}")),
        ("cdot", written(numbers, letters, between="\\cdot ")),
        ("brackets", f"({text})"),
        ("named", f"\\mathbf{{v}} = {text}"),
        ("named with an arrow", f"\\vec{{v}} = {text}"),
        *((rule, text.replace("-", sign)) for rule, sign in (("minus sign", "−"), ("en dash", "–"))),
    ]
    mutations = [
        ("another letter", written(numbers, [*letters[:-1], missing])),
        ("another letter in front", written(numbers, [missing, *letters[1:]])),
        ("letters swapped", written(numbers, swapped)),
        ("letters swapped, arrows", written(numbers, swapped, "\\vec{{{}}}")),
        *(("a number", written([*numbers[:-1], numbers[-1] + by], letters)) for by in (10, 11, 20)),
        *(("a number in front", written([numbers[0] + by, *numbers[1:]], letters)) for by in (10, 11, 20)),
        ("a sign", written([*numbers[:-1], -numbers[-1]], letters)),
        ("a sign in front", written([-numbers[0], *numbers[1:]], letters)),
        ("all signs", written([-number for number in numbers], letters)),
        ("a term less", written(numbers[:-1], letters[:-1])),
        ("a term less in front", written(numbers[1:], letters[1:])),
        ("a letter less", text.rpartition("\\mathbf")[0]),
        ("numbers alone", written(numbers, letters, "").replace("{}", "")),
        ("a term more", f"{text}+7\\mathbf{{n}}"),
        ("one more", f"{text}+1"),
        ("twice", f"2({text})"),
        ("a third", f"\\frac{{{text}}}{{3}}"),
        ("a trailing letter", f"{text}t"),
        ("length", f"\\sqrt{{{sum(number**2 for number in numbers)}}}"),
    ]
    other = written([number + 20 for number in numbers], letters)
    return Gold(kind="unit vectors", text=text, ways=ways, mutations=mutations, other=other)
