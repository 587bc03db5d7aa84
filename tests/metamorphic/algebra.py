"""Makes reference answers in letters: polynomials, formulas, equations."""

import random
from fractions import Fraction

from metamorphic.gold import Gold, equal_trees, other_trees, wide
from metamorphic.trees import Call, Name, Num, Power, Product, Quotient, Root, Sum, Tree, letters, negative, num, write


def polynomial(rng: random.Random) -> Gold:
    letter = rng.choice("xtny")
    x = Name(letter)
    roots = [Fraction(n) for n in rng.sample([n for n in range(-6, 7) if n], rng.choice([2, 2, 3]))]
    lead = rng.choice([1, 1, 2, 3, -2])
    coefficients = [Fraction(lead)]
    for zero in roots:
        coefficients = [a - zero * b for a, b in zip([*coefficients, 0], [0, *coefficients], strict=True)]
    tree = Sum(tuple(_monomial(c, x, len(roots) - n) for n, c in enumerate(coefficients) if c))
    factors: tuple[Tree, ...] = tuple(Sum((x, num(-zero))) for zero in roots)
    if lead != 1:
        factors = (num(lead), *factors)
    horner: Tree = num(coefficients[0])
    for coefficient in coefficients[1:]:
        step: Tree = x if horner == num(1) else Product((x, horner) if isinstance(horner, Sum) else (horner, x))
        horner = Sum((step, Num(coefficient))) if coefficient else step
    partly = Product((factors[-1], _quotient(coefficients, roots[-1], x)))
    equal = [
        ("", tree),
        ("factored", Product(factors)),
        ("factors the other way", Product((*factors[:-2], factors[-1], factors[-2]))),
        ("Horner", horner),
        ("one factor out", partly),
    ]
    text = write(tree)
    ways = [
        *equal_trees(equal),
        ("a function", f"f({letter}) = {text}"),
        ("y", f"{'y' if letter != 'y' else 'z'} = {text}"),
    ]
    ways += [
        ("a chain", f"{write(Product(factors))} = {text}"),
        *((rule, t) for rule, t in wide(text) if rule != "full width"),
    ]
    other = write(Sum((*tree.terms[:-1], Num(coefficients[-1] + 17))))
    mutations = [*other_trees(tree, rng, 1e-9), *other_trees(Product(factors), rng, 1e-9)]
    rng.shuffle(mutations)
    return Gold(kind="polynomial", text=text, ways=ways, mutations=mutations, other=other)


def _monomial(coefficient: Fraction, x: Tree, exponent: int) -> Tree:
    power = x if exponent == 1 else Power(x, num(exponent))
    if exponent == 0:
        return Num(coefficient)
    if coefficient == 1:
        return power
    return Product((Num(coefficient), power))


def _quotient(coefficients: list[Fraction], zero: Fraction, x: Tree) -> Tree:
    """Return the polynomial divided by (x - zero), which leaves no remainder."""
    found = [coefficients[0]]
    for coefficient in coefficients[1:-1]:
        found.append(coefficient + zero * found[-1])
    return Sum(tuple(_monomial(c, x, len(found) - 1 - n) for n, c in enumerate(found) if c))


def formula(rng: random.Random) -> Gold:
    a, b, c = (Name(letter) for letter in rng.sample("abcdhkmnpqrstuvwxyz", 3))
    p, q = (Name(letter) for letter in rng.choice(["xy", "ab", "pq", "uv", "mn", "rs"]))
    k, n = num(rng.randint(2, 9)), num(rng.choice([2, 3, 4]))
    pi, half = Name("\\pi"), Quotient(num(1), num(2))
    equal: list[tuple[str, Tree]] = rng.choice(
        [
            [("", Product((p, q))), ("letters swapped", Product((q, p)))],
            [
                ("", Product((k, pi, Power(a, num(2)), b))),
                ("letters moved", Product((k, b, pi, Power(a, num(2))))),
                ("a square apart", Product((k, pi, a, a, b))),
            ],
            [
                ("", Quotient(Product((k, a, b)), Sum((a, b)))),
                ("over one letter", Quotient(Product((k, b)), Sum((num(1), Quotient(b, a))))),
            ],
            [
                ("", Root(Sum((Power(a, num(2)), Power(b, num(2)))))),
                ("terms swapped", Root(Sum((Power(b, num(2)), Power(a, num(2)))))),
            ],
            [("", Sum((a, Product((Sum((b, num(-1))), c))))), ("expanded", Sum((a, Product((b, c)), negative(c))))],
            [
                ("", Sum((Product((a, b)), Product((half, c, Power(b, num(2))))))),
                ("factored", Product((b, Sum((a, Quotient(Product((c, b)), num(2))))))),
            ],
            [
                ("", Quotient(Product((b, Sum((b, num(1))))), num(2))),
                ("expanded", Quotient(Sum((Power(b, num(2)), b)), num(2))),
                ("a half in front", Product((half, b, Sum((b, num(1)))))),
            ],
            [
                ("", Quotient(Product((k, a)), Product((b, c)))),
                ("two fractions", Product((Quotient(Product((k, a)), b), Quotient(num(1), c)))),
                ("negative powers", Product((k, a, Power(b, num(-1)), Power(c, num(-1))))),
            ],
            [("", Sum((a, Product((k, b))))), ("swapped", Sum((Product((k, b)), a)))],
            [
                ("", Power(Sum((a, b)), num(2))),
                ("expanded", Sum((Power(a, num(2)), Product((num(2), a, b)), Power(b, num(2))))),
            ],
            [
                ("", Product((a, Power(Name("e"), Product((num(-1), k, b)))))),
                ("over", Quotient(a, Power(Name("e"), Product((k, b))))),
            ],
            [("", Sum((Product((k, Call("sin", a))), b))), ("swapped", Sum((b, Product((k, Call("sin", a))))))],
            [
                ("", Quotient(Product((num(2), Root(Product((a, b))))), c)),
                ("two roots", Quotient(Product((num(2), Root(a), Root(b))), c)),
            ],
            [("", Sum((Power(num(2), b), num(-1)))), ("swapped", Sum((num(-1), Power(num(2), b))))],
            [("", Product((k, Power(a, n), b))), ("a factor apart", Product((k, a, Power(a, Num(n.value - 1)), b)))],
        ]
    )
    tree = equal[0][1]
    text, used = write(tree), letters(tree)
    name = next(letter for letter in "VESTL" if letter not in used)
    known = rng.choice(sorted(used))
    ways = [
        *equal_trees(equal),
        ("a function", f"f({known}) = {text}"),
        ("named twice", f"{name} = 1 \\cdot ({text}) = {text}"),
    ]
    ways += [
        ("brackets", f"({text})"),
        ("a zero more", f"{text}+0"),
        *((r, t) for r, t in wide(text) if r != "full width"),
    ]
    mutations = [pair for pair in other_trees(tree, rng, 1e-9) if pair[1] != text]
    mutations += [("a trailing letter", text + c) for c in "tdsh" if c not in used and text[-1] in ")}0123456789"]
    rng.shuffle(mutations)
    other = write(Product((num(7), tree)))
    return Gold(kind="formula", text=text, ways=ways, mutations=mutations, other=other, name=name)


def equation(rng: random.Random) -> Gold:
    x, y = (Name(letter) for letter in rng.choice([("x", "y"), ("a", "b"), ("s", "t"), ("u", "v")]))
    a, b, c = (rng.choice([n for n in range(-9, 10) if abs(n) > 1]) for _ in range(3))
    square = rng.random() < 0.4
    first = Power(x, num(2)) if square else x

    def side(first_by: int, second_by: int, plus: int) -> Tree:
        terms = [Product((num(by), of)) if by != 1 else of for by, of in ((first_by, first), (second_by, y)) if by]
        terms += [num(plus)] if plus else []
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def written(left: Tree, right: Tree, spaced: bool = False) -> str:
        return f"{write(left)}{' = ' if spaced else '='}{write(right)}"

    text = written(side(a, b, 0), num(c))
    k = rng.randint(2, 5)
    ways = [
        ("as it stands", text),
        ("spaces", written(side(a, b, 0), num(c), spaced=True)),
        ("sides swapped", written(num(c), side(a, b, 0))),
        ("all on one side", written(side(a, b, -c), num(0))),
        ("all on the other side", written(num(0), side(a, b, -c))),
        ("one term over", written(side(a, 0, 0), side(0, -b, c))),
        ("the other term over", written(side(0, b, 0), side(-a, 0, c))),
        ("a multiple", written(side(k * a, k * b, 0), num(k * c))),
        ("a multiple on one side", written(side(k * a, k * b, -k * c), num(0))),
        ("the opposite", written(side(-a, -b, 0), num(-c))),
        ("one more on both sides", written(side(a, b, 1), num(c + 1))),
        ("terms swapped", f"{write(side(0, b, 0))}{'+' if a > 0 else ''}{write(side(a, 0, 0))}={c}"),
        ("a half", f"\\frac{{{write(side(a, b, 0))}}}{{2}}=\\frac{{{c}}}{{2}}"),
        ("solved", f"{y.latex}=\\frac{{{c}-({write(side(a, 0, 0))})}}{{{b}}}"),
        ("cdot", text.replace(x.latex, f"\\cdot {x.latex}", 1)),
        ("raised digits", text.replace("^2", "²")),
        ("full-width sign", text.replace("=", "＝")),
        *((rule, t) for rule, t in wide(text) if rule != "full width"),
    ]
    mutations = [
        *(("a coefficient", written(side(a + by, b, 0), num(c))) for by in (1, -1, 3) if a + by),
        *(("another coefficient", written(side(a, b + by, 0), num(c))) for by in (1, -1) if b + by),
        *(("a number", written(side(a, b, 0), num(c + by))) for by in (1, -1, 10)),
        ("a sign", written(side(-a, b, 0), num(c))),
        ("another sign", written(side(a, -b, 0), num(c))),
        ("the sign of the number", written(side(a, b, 0), num(-c))),
        ("coefficients swapped", written(side(b, a, 0), num(c)))
        if a != b
        else ("a term lost", written(side(a, 0, 0), num(c))),
        ("a term lost", written(side(a, 0, 0), num(c))),
        ("a term lost on one side", written(side(a, b, 0), num(0))),
        ("the left side alone", write(side(a, b, 0))),
        ("the right side alone", str(c)),
        ("a letter", text.replace(y.latex, "w")),
        ("a letter at the end", f"{text}n"),
        ("an exponent", text.replace(y.latex, f"{y.latex}^3")),
        ("less", text.replace("=", "<")),
        ("at most", text.replace("=", "\\le ")),
        ("a multiple of one side", written(side(k * a, k * b, 0), num(c))),
        ("letters swapped", text.translate(str.maketrans({x.latex: y.latex, y.latex: x.latex})))
        if a != b or square
        else ("a number", written(side(a, b, 0), num(c + 2))),
    ]
    other = written(side(a + 11, b, 0), num(c))
    return Gold(kind="equation", text=text, ways=ways, mutations=mutations, other=other)
