"""Makes reference answers that are one number."""

import random
from fractions import Fraction
from math import comb, factorial, gcd

from metamorphic.gold import (
    RAISED,
    VULGAR,
    WIDE,
    Gold,
    Texts,
    equal_trees,
    grouped,
    other_digit,
    other_trees,
    sixteen_digits,
    wide,
    written_out,
)
from metamorphic.trees import Call, Name, Num, Power, Product, Quotient, Root, Sum, Tree, fraction, negative, num, write


def integer(rng: random.Random) -> Gold:
    whole = rng.choice([rng.randint(2, 99), rng.randint(100, 999), -rng.randint(2, 99), rng.randint(1000, 9_999_999)])
    text, part = str(whole), rng.randint(2, 40)
    ways = [
        ("as it stands", text),
        ("one decimal", f"{whole}.0"),
        ("brackets", f"({text})"),
        ("text", f"\\text{{{text}}}"),
        ("mathbf", f"\\mathbf{{{text}}}"),
        ("a sum that ends in it", f"m+n = {text}"),
        ("a sum of numbers that ends in it", f"{part}+{whole - part} = {text}".replace("+-", "-")),
        ("a product that ends in it", f"3 \\times {whole * 3}/9 = {text}"),
        ("a chain", f"x = {whole - part}+{part} = {text}"),
        ("a named function", f"f({part}) = {text}"),
        ("a counter", f"{text}个"),
        ("a difference", f"{whole + part}-{part}"),
        *grouped(whole),
        *wide(text),
    ]
    mutations = [
        ("a digit", str(whole + rng.choice((1, -1, 10, -10)))),
        ("a digit", other_digit(text, rng)),
        ("one digit more", text + "0"),
        ("a sign", str(-whole)),
        ("a decimal point", f"{text[:-1]}.{text[-1]}" if abs(whole) > 9 else f"{text}.5"),
        ("a comma that splits it", f"{text[:-1]},{text[-1]}" if abs(whole) > 9 else f"{text},{text}1"),
        ("a factorial", f"{abs(whole) % 50 + 60}!"),
        ("a square", f"({text})^2"),
        ("a root", f"\\sqrt{{{abs(whole) + 5}}}" if abs(whole) != 5 else "\\sqrt{3}"),
        ("an exponent", f"10^{{{abs(whole) % 50 + 9}}}"),
        ("a chain that ends elsewhere", f"{text} = {whole + 1}"),
        ("a sum that ends elsewhere", f"m+n = {whole + part}"),
        *(("a trailing letter", text + letter) for letter in "xynk"),
        ("an imaginary number", f"{text}\\mathrm{{i}}"),
        ("a vector", f"{text}\\mathbf{{k}}"),
        ("a scale word", f"{text}\\text{{ million}}"),
        *other_trees(num(whole), rng),
    ]
    return Gold(kind="integer", text=text, ways=ways, mutations=mutations, other=str(whole + part), name="x")


def decimal(rng: random.Random) -> Gold:
    places = rng.randint(1, 3)
    exact = Fraction(rng.choice([n for n in range(-9999, 99999, 7) if n % 10]), 10**places)
    text = f"{float(exact):.{places}f}"
    assert Fraction(text) == exact
    ways = [
        ("as it stands", text),
        ("a zero more", text + "0"),
        ("brackets", f"({text})"),
        ("text", f"\\text{{{text}}}"),
        ("no zero in front", text.replace("0.", ".", 1) if abs(exact) < 1 else text),
        ("a power of ten", f"{float(exact * 10):.{places - 1}f} \\times 10^{{-1}}".replace(". ", " ")),
        ("a chain", f"{write(fraction(exact))} = {text}"),
        ("a sum", f"{float(exact - 1):.{places}f}+1"),
        *equal_trees([("fraction", fraction(exact))]),
        *_mixed(exact),
        *wide(text),
    ]
    mutations = [
        *(("a digit", other_digit(text, rng)) for _ in range(4)),
        ("a digit more", text + "3"),
        ("the point moved", f"{float(exact * 10):.{places}f}"),
        ("the point moved", f"{float(exact / 10):.{places + 1}f}"),
        ("the point lost", text.replace(".", "")),
        ("a comma for the point, and three digits", f"{abs(int(exact)) + 1},{rng.randint(100, 999)}"),
        ("an exponent", f"{text} \\times 10^{{2}}"),
        *(("a trailing letter", text + letter) for letter in "xynk"),
        *other_trees(fraction(exact), rng),
    ]
    return Gold(kind="decimal", text=text, ways=ways, mutations=mutations, other=other_digit(text, rng), name="x")


def _mixed(exact: Fraction) -> Texts:
    whole, part = divmod(abs(exact), 1)
    if not whole or not part:
        return []
    sign = "-" if exact < 0 else ""
    texts = [("mixed", f"{sign}{whole}\\frac{{{part.numerator}}}{{{part.denominator}}}")]
    if f"{part}" in VULGAR:
        texts.append(("mixed, one character", f"{sign}{whole}{VULGAR[str(part)]}"))
    return texts


def a_fraction(rng: random.Random) -> Gold:
    exact = Fraction(
        rng.choice([1, 2, 3, 5, 7, 9, 13, 17, 41, 270, -3, -11]), rng.choice([2, 3, 4, 5, 7, 8, 12, 19, 125])
    )
    if exact.denominator == 1:
        exact += Fraction(1, 6)
    text, above, below = write(fraction(exact)), abs(exact.numerator), exact.denominator
    sign = "-" if exact < 0 else ""
    finite = below in (2, 4, 5, 8, 125, 25)
    ways = [
        *equal_trees([("", fraction(exact)), ("inverse", Product((num(exact.numerator), Power(num(below), num(-1)))))]),
        ("slash with spaces", f"{sign}{above} / {below}"),
        ("brackets", f"({sign}{above}/{below})"),
        ("division sign", f"{sign}{above} \\div {below}"),
        ("fraction slash", f"{sign}{above}⁄{below}"),
        ("sfrac", f"{sign}\\sfrac{{{above}}}{{{below}}}"),
        ("a sign inside", f"\\frac{{{exact.numerator}}}{{{below}}}"),
        ("a probability", f"P(A) = {text}"),
        ("a chain", f"\\frac{{{3 * exact.numerator}}}{{{3 * below}}} = {text}"),
        *([("decimal", str(float(exact))), ("a chain to a decimal", f"{text} = {float(exact)}")] if finite else []),
        *sixteen_digits(fraction(exact)),
        *_mixed(exact),
        *([("one character", VULGAR[str(exact)])] if str(exact) in VULGAR else []),
        *wide(f"{exact}"),
    ]
    mutations = [
        *other_trees(fraction(exact), rng),
        ("a ratio of more", f"{above}:{below}:1"),
        ("a point for the slash", f"{sign}{above}.{below}"),
        ("a comma for the slash", f"{sign}{above},{below}"),
        ("three digits", f"{float(exact) + 0.01:.3f}"),
        ("a chain that ends elsewhere", f"{text} = {write(fraction(exact + 1))}"),
        *(("a trailing letter", text + letter) for letter in "xynk"),
        ("a factor", f"{text}\\pi"),
        ("a formula", f"{text}gt^2"),
    ]
    other = write(fraction(exact + Fraction(1, below + 1)))
    return Gold(kind="fraction", text=text, ways=ways, mutations=mutations, other=other, name="x")


def root(rng: random.Random) -> Gold:
    outside, inside = rng.randint(2, 12), rng.choice([2, 3, 5, 6, 7, 10, 11, 13, 15])
    below = rng.choice([n for n in (1, 1, 2, 3, 4, 5, 7) if gcd(n, outside) == 1])
    surd = Root(num(inside))
    over = (lambda tree: tree) if below == 1 else (lambda tree: Quotient(tree, num(below)))
    tree = over(Product((num(outside), surd)))
    equal = [
        ("", tree),
        ("one root", over(Root(num(inside * outside**2)))),
        ("the factor behind", over(Product((surd, num(outside))))),
        ("rational denominator", Quotient(num(outside * inside), Product((num(below), surd)))),
        ("factor in front", Product((fraction(Fraction(outside, below)), surd))),
    ]
    text = write(tree)
    ways = [
        *equal_trees(equal),
        *sixteen_digits(tree),
        ("a chain", f"\\sqrt{{{inside * outside**2}}}/{below} = {text}"),
    ]
    ways += [("without braces", f"{outside}\\sqrt{inside}")] if inside < 10 and below == 1 else []
    mutations = [*other_trees(tree, rng), *(("a trailing letter", text + c) for c in "xtd")]
    other = write(Sum((tree, num(1))))
    return Gold(kind="root", text=text, ways=ways, mutations=mutations, other=other, name="d")


def sum_with_root(rng: random.Random) -> Gold:
    first, outside, below = rng.randint(1, 9), rng.randint(1, 6), rng.choice([1, 2, 3, 5])
    inside = rng.choice([2, 3, 5, 7, 13])
    sign = rng.choice((1, -1))
    surd = Root(num(inside)) if outside == 1 else Product((num(outside), Root(num(inside))))
    signed = surd if sign == 1 else negative(surd)
    tree: Tree = Sum((num(first), signed))

    def signed_by(term: Tree) -> Tree:
        return term if sign == 1 else negative(term)

    over = (lambda tree: tree) if below == 1 else (lambda tree: Quotient(tree, num(below)))
    equal = [
        ("", over(tree)),
        ("one root", over(Sum((num(first), signed_by(Root(num(inside * outside**2))))))),
        ("the other way", over(Sum((signed_by(surd), num(first))))),
    ]
    if below > 1:
        apart = Sum((Quotient(num(first), num(below)), signed_by(Quotient(surd, num(below)))))
        equal += [("two fractions", apart), ("a factor in front", Product((Quotient(num(1), num(below)), tree)))]
    whole = equal[0][1]
    mutations = [*other_trees(whole, rng), ("both signs", write(whole).replace("+" if sign == 1 else "-", "\\pm ", 1))]
    ways = equal_trees(equal)
    return Gold(
        kind="sum with a root",
        text=write(whole),
        ways=[*ways, *sixteen_digits(whole)],
        mutations=mutations,
        other=write(Sum((whole, num(2)))),
        name="x",
    )


def multiple_of_pi(rng: random.Random) -> Gold:
    times = Fraction(rng.choice([2, 3, 5, 7, 9, 25, 36, 128]), rng.choice([1, 1, 2, 3, 4, 5]))
    pi = Name("\\pi")
    tree: Tree = Product((Num(times), pi))
    if times.denominator > 1:
        above = pi if times.numerator == 1 else Product((num(times.numerator), pi))
        tree = Quotient(above, num(times.denominator))
    radius = rng.randint(2, 7)
    text = write(tree)
    equal = [
        ("", tree),
        ("factor in front", Product((fraction(times), pi))),
        ("factor behind", Product((pi, fraction(times)))),
    ]
    ways = [
        *equal_trees(equal),
        *([("decimal factor", f"{float(times)}\\pi")] if times.denominator in (2, 4, 5) else []),
        ("a formula that ends in it", f"A = \\pi r^2 = {text}"),
        ("a chain", f"\\frac{{{times.numerator * radius}\\pi}}{{{times.denominator * radius}}} = {text}"),
    ]
    mutations = [*other_trees(tree, rng), *(("a trailing letter", text + " " * text.endswith("pi") + c) for c in "rbx")]
    mutations += [("a dropped constant", write(fraction(times))), ("two digits of it", f"{float(times) * 3.1:.2f}")]
    other = write(Product((fraction(times + 1), pi)))
    return Gold(kind="multiple of pi", text=text, ways=ways, mutations=mutations, other=other, name="A")


def percentage(rng: random.Random) -> Gold:
    exact = Fraction(rng.choice([5, 12, 15, 25, 30, 65, 75, 80, 120, 250]) * 10 + rng.choice((0, 0, 5)), 10)
    plain = str(exact.numerator) if exact.denominator == 1 else str(float(exact))
    share = exact / 100
    ways = [
        *(("sign", plain + sign) for sign in ("\\%", " \\%", "%", " %", "％", "\\,\\%")),
        ("word", f"{plain}\\text{{ percent}}"),
        ("plain word", f"{plain} percent"),
        ("a zero more", f"{plain}{'0' if '.' in plain else '.0'}\\%"),
        ("decimal", str(float(share))),
        ("brackets", f"({plain}\\%)"),
        ("text", f"\\text{{{plain}\\%}}"),
        ("full width", f"{plain}%".translate(WIDE)),
        ("a chain", f"{write(fraction(share))} = {plain}\\%"),
        ("a chain from a decimal", f"{float(share)} = {plain}\\%"),
        ("a probability", f"P(A) = {plain}\\%"),
        *equal_trees([("fraction", fraction(share))]),
    ]
    mutations = [
        *(("a digit", other_digit(plain, rng) + "\\%") for _ in range(3)),
        ("a sign", f"-{plain}\\%"),
        ("the point moved", f"{float(exact / 10)}\\%"),
        ("the point moved", f"{float(exact * 10):g}\\%"),
        ("a hundredth", f"{float(share)}\\%"),
        ("a hundredth of the fraction", written_out(share / 100)),
        ("per mille", f"{plain}‰"),
        ("what is left of 100", f"{float(400 - exact):g}\\%"),
        ("a letter", f"{plain}x\\%"),
        *((f"{rule} of the fraction", text) for rule, text in other_trees(fraction(share), rng) if text != plain),
    ]
    return Gold(
        kind="percentage",
        text=f"{plain}\\%",
        ways=ways,
        mutations=mutations,
        other=f"{float(exact + 7):g}\\%",
        name="p",
    )


def scientific(rng: random.Random) -> Gold:
    mantissa = Fraction(rng.choice([n for n in range(101, 999) if n % 10]), 100)
    exponent = rng.choice([-9, -6, -5, -4, -3, 4, 5, 6, 8, 11, 23])
    shown = str(float(mantissa))
    number = mantissa * Fraction(10) ** exponent
    moved = str(float(mantissa * 10))
    upper = str(exponent).translate(RAISED)
    ways = [
        *((f"times {sign}", f"{shown} {sign} 10^{{{exponent}}}") for sign in ("\\times", "\\cdot", "×", "*", "x")),
        ("no spaces", f"{shown}\\times10^{{{exponent}}}"),
        ("e", f"{shown}e{exponent}"),
        ("E", f"{shown}E{exponent}"),
        ("e+", f"{shown}e{exponent:+03d}"),
        ("raised digits", f"{shown}×10{upper}"),
        ("raised digits, spaces", f"{shown} × 10{upper}"),
        ("the point moved", f"{moved} \\times 10^{{{exponent - 1}}}"),
        ("a zero more", f"{shown}0 \\times 10^{{{exponent}}}"),
        ("brackets", f"({shown} \\times 10^{{{exponent}}})"),
        ("a caret", f"{shown}*10^({exponent})"),
        ("full width", f"{shown}×10".translate(WIDE) + f"^{{{exponent}}}"),
        ("written out", written_out(number)),
        *(grouped(int(number)) if number.denominator == 1 and number < 10**12 else []),
        ("no mantissa", f"10^{{{exponent}}} \\times {shown}"),
    ]
    mutations = [
        *(("a digit", f"{other_digit(shown, rng)} \\times 10^{{{exponent}}}") for _ in range(4)),
        *(("an exponent", f"{shown} \\times 10^{{{exponent + by}}}") for by in (1, -1, 2, -2)),
        ("the sign of the exponent", f"{shown} \\times 10^{{{-exponent}}}"),
        ("a sign", f"-{shown} \\times 10^{{{exponent}}}"),
        ("the point moved", f"{moved} \\times 10^{{{exponent}}}"),
        ("the mantissa", shown),
        ("another base", f"{shown} \\times 2^{{{exponent}}}"),
        ("e", f"{shown}e{exponent + 1}"),
        ("raised digits", f"{shown}×10{str(exponent + 1).translate(RAISED)}"),
        ("written out", written_out(number * 10)),
        ("written out", written_out(number / 10)),
        ("a sum", f"{shown} + 10^{{{exponent}}}"),
        ("a letter", f"{shown}x \\times 10^{{{exponent}}}"),
        ("a trailing letter", f"{shown} \\times 10^{{{exponent}}}n"),
    ]
    other = f"{float(mantissa + 1)} \\times 10^{{{exponent}}}"
    text = f"{shown} \\times 10^{{{exponent}}}"
    return Gold(kind="scientific", text=text, ways=ways, mutations=mutations, other=other, name="x")


def counted(rng: random.Random) -> Gold:
    """Make a power, a factorial or a binomial coefficient."""
    n, k, base, exponent = rng.randint(5, 12), rng.randint(2, 4), rng.choice([2, 3, 5, 7]), rng.randint(5, 12)
    text, number, ways, mutations = rng.choice(
        [
            (
                f"{base}^{{{exponent}}}",
                base**exponent,
                [
                    ("a product", f"{base} \\cdot {base}^{{{exponent - 1}}}"),
                    ("raised digits", f"{base}{str(exponent).translate(RAISED)}"),
                ],
                [
                    ("an exponent", f"{base}^{{{exponent + 1}}}"),
                    ("a base", f"{base + 1}^{{{exponent}}}"),
                    ("a product for a power", f"{base} \\cdot {exponent}"),
                ],
            ),
            (
                f"{n}!",
                factorial(n),
                [("a product", f"{n} \\cdot {n - 1}!"), ("a quotient", f"\\frac{{{n + 1}!}}{{{n + 1}}}")],
                [("a number", f"{n + 1}!"), ("a dropped factorial", str(n)), ("a power", f"{n}^2")],
            ),
            (
                f"\\binom{{{n}}}{{{k}}}",
                comb(n, k),
                [
                    ("dbinom", f"\\dbinom{{{n}}}{{{k}}}"),
                    ("the other side", f"\\binom{{{n}}}{{{n - k}}}"),
                    ("choose", f"{{{n} \\choose {k}}}"),
                    ("factorials", f"\\frac{{{n}!}}{{{k}!{n - k}!}}"),
                    ("C with indices", f"C_{{{n}}}^{{{k}}}"),
                ],
                [
                    ("a number", f"\\binom{{{n + 1}}}{{{k}}}"),
                    ("a fraction", f"\\frac{{{n}}}{{{k}}}"),
                    ("ordered", f"\\frac{{{n}!}}{{{n - k}!}}"),
                    ("a pair", f"({n},{k})"),
                ],
            ),
        ]
    )
    ways = [
        ("as it stands", text),
        ("computed", str(number)),
        ("one decimal", f"{number}.0"),
        ("an equation that ends in it", f"{text} = {number}"),
        ("a sum that ends in it", f"{number - 3}+3 = {number}"),
        ("a named sum", f"m+n = {number}"),
        ("a difference", f"{number + 3}-3"),
        ("brackets", f"({text})"),
        ("a factor", f"2 \\cdot \\frac{{{number}}}{{2}}"),
        *grouped(number),
        *wide(str(number)),
        *ways,
    ]
    mutations = [
        *(("a digit", str(number + by)) for by in (1, -1, 10, -10)),
        ("an equation that ends elsewhere", f"{text} = {number + 1}"),
        ("a minus", f"-{text}"),
        ("one more", f"{text}+1"),
        ("one less", f"{text}-1"),
        ("a third", f"\\frac{{{text}}}{{3}}"),
        ("a square", f"({text})^2"),
        ("a trailing letter", f"{text}x"),
        ("a trailing letter", f"{number}n"),
        ("one digit more", f"{number}0"),
        ("twice", f"2 \\cdot {text}"),
        *mutations,
    ]
    return Gold(kind="counted", text=text, ways=ways, mutations=mutations, other=str(number + 12), name="N")


def logarithm(rng: random.Random) -> Gold:
    times, inside, more = rng.randint(2, 5), rng.choice([2, 3, 5, 7]), rng.randint(1, 9)
    ln, e = Call("ln", num(inside)), Name("e")
    equal: list[tuple[str, Tree]] = rng.choice(
        [
            [
                ("", Product((num(times), ln))),
                ("one logarithm", Call("ln", num(inside**times))),
                ("of a power", Call("ln", Power(num(inside), num(times)))),
                ("of the inverse", negative(Call("ln", Quotient(num(1), num(inside**times))))),
            ],
            [("", Sum((num(more), ln))), ("one logarithm", Call("ln", Product((num(inside), Power(e, num(more))))))],
            [
                ("", Sum((Power(e, num(times)), negative(num(more))))),
                ("a factor out", Product((e, Sum((Power(e, num(times - 1)), negative(Quotient(num(more), e))))))),
            ],
            [
                ("", Quotient(ln, num(times))),
                ("of a root", Call("ln", Root(num(inside), times))),
                ("factor in front", Product((Quotient(num(1), num(times)), ln))),
            ],
        ]
    )
    tree = equal[0][1]
    text = write(tree)
    ways = [*equal_trees(equal), ("without brackets", text.replace(f"({inside})", f" {inside}"))]
    ways.append(("log to base e", text.replace("\\ln(", "\\log_e(")))
    mutations = [*other_trees(tree, rng), ("another base", text.replace("\\ln(", "\\log_2("))]
    mutations = [pair for pair in mutations if pair[1] != text]
    return Gold(kind="logarithm", text=text, ways=ways, mutations=mutations, other=write(Sum((tree, num(3)))), name="x")


def complex_number(rng: random.Random) -> Gold:
    real, imaginary = rng.choice([n for n in range(-9, 10) if n]), rng.choice([n for n in range(-9, 10) if abs(n) > 1])
    part = Product((num(imaginary), Name("i")))
    tree = Sum((num(real), part))
    equal = [
        ("", tree),
        ("imaginary part first", Sum((part, num(real)))),
        ("i in front", Sum((num(real), Product((Name("i"), num(imaginary)))) if imaginary > 0 else (num(real), part))),
    ]
    equal.append(("a root for i", Sum((num(real), Product((num(imaginary), Root(num(-1))))))))
    text = write(tree)
    ways = [
        *equal_trees(equal),
        ("upright i", text.replace("i", "\\mathrm{i}")),
        ("spaces", text.replace("i", " i")),
        *wide(text),
    ]
    ways += [("a polynomial of i", f"{real - 1}+1{imaginary:+d}i"), ("brackets", f"({text})")]
    mutations = [
        *other_trees(tree, rng, 1e-9),
        ("conjugate", f"{real}{-imaginary:+d}i"),
        ("parts swapped", f"{imaginary}{real:+d}i" if real != imaginary else f"{imaginary}{real + 1:+d}i"),
        ("a letter for i", f"{real}{imaginary:+d}k"),
        ("no i", f"{real}{imaginary:+d}"),
        ("upright i lost", f"{real}{imaginary:+d}\\mathrm{{t}}"),
        ("a pair", f"({real},{imaginary})"),
        ("both signs", f"{real}\\pm {abs(imaginary)}i"),
        ("real part", str(real)),
        ("modulus", f"\\sqrt{{{real**2 + imaginary**2}}}"),
    ]
    other = f"{real + 1}{imaginary:+d}i"
    return Gold(kind="complex number", text=text, ways=ways, mutations=mutations, other=other, name="z")


_SCALES = {"thousand": 3, "million": 6, "billion": 9}


def scaled(rng: random.Random) -> Gold:
    """Make a number with a scale word."""
    word = rng.choice(list(_SCALES))
    power, mantissa = _SCALES[word], Fraction(rng.choice([12, 15, 25, 30, 48, 75, 120, 350]), 10)
    shown, whole = f"{float(mantissa):g}", int(mantissa * 10 ** _SCALES[word])
    strangers = [other for other in ("hundred", *_SCALES, "trillion") if other != word]
    ways = [
        ("as it stands", f"{shown}\\text{{ {word}}}"),
        ("plain word", f"{shown} {word}"),
        ("mathrm", f"{shown}~\\mathrm{{{word}}}"),
        ("written out", str(whole)),
        ("one decimal", f"{whole}.0"),
        ("scientific", f"{shown} \\times 10^{{{power}}}"),
        ("e", f"{shown}e{power}"),
        ("raised digits", f"{shown}×10{str(power).translate(RAISED)}"),
        ("a product", f"{shown} \\times {10**power}"),
        ("a chain", f"{shown}\\text{{ {word}}} = {whole}"),
        ("full width", str(whole).translate(WIDE)),
        *grouped(whole),
    ]
    mutations = [
        *(("another word", f"{shown}\\text{{ {other}}}") for other in strangers),
        *(("another word, plain", f"{shown} {other}") for other in strangers),
        *(("a digit", f"{other_digit(shown, rng)}\\text{{ {word}}}") for _ in range(3)),
        ("no word", shown),
        ("a sign", f"-{shown}\\text{{ {word}}}"),
        ("one digit more", f"{whole}0"),
        ("one digit less", str(whole // 10)),
        ("another exponent", f"{shown} \\times 10^{{{power + 1}}}"),
        ("written out and the word", f"{whole}\\text{{ {word}}}"),
        ("a third", f"\\frac{{{whole}}}{{3}}"),
        ("a trailing letter", f"{whole}x"),
    ]
    other = f"{float(mantissa + 1):g}\\text{{ {word}}}"
    return Gold(kind="scale word", text=ways[0][1], ways=ways, mutations=mutations, other=other, name="N")


def of_degrees(rng: random.Random) -> Gold:
    """Make a sine, cosine or tangent of an angle in degrees."""
    degrees = rng.choice([n for n in range(4, 87) if n % 15])
    name, co_name = rng.choice([("sin", "cos"), ("cos", "sin")])
    rest = 90 - degrees
    text = f"\\{name} {degrees}^\\circ"
    ways = [
        ("as it stands", text),
        ("brackets", f"\\{name}({degrees}^\\circ)"),
        ("left right", f"\\{name}\\left({degrees}^{{\\circ}}\\right)"),
        ("sign", f"\\{name} {degrees}°"),
        ("sign, brackets", f"\\{name}({degrees}°)"),
        ("degree", f"\\{name} {degrees}\\degree"),
        ("operatorname", f"\\operatorname{{{name}}} {degrees}^\\circ"),
        ("mathrm", f"\\mathrm{{{name}}}\\,{degrees}^\\circ"),
        ("the other function", f"\\{co_name} {rest}^\\circ"),
        ("the other function, brackets", f"\\{co_name}({rest}°)"),
        ("radians", f"\\{name}\\frac{{{degrees}\\pi}}{{180}}"),
        ("radians, brackets", f"\\{name}\\left(\\frac{{{degrees}\\pi}}{{180}}\\right)"),
        ("one decimal", f"\\{name} {degrees}.0^\\circ"),
        ("a factor", f"1 \\cdot \\{name} {degrees}^\\circ"),
        ("a chain", f"\\{co_name} {rest}^\\circ = {text}"),
    ]
    mutations = [
        ("radians", f"\\{name} {degrees}"),
        ("radians, brackets", f"\\{name}({degrees})"),
        ("another function", f"\\{co_name} {degrees}^\\circ"),
        ("a third function", f"\\tan {degrees}^\\circ"),
        *(("a number", f"\\{name} {degrees + by}^\\circ") for by in (1, -1, 3)),
        ("the other angle", f"\\{name} {rest}^\\circ"),
        ("a sign", f"-{text}"),
        ("twice", f"2{text}"),
        ("twice inside", f"\\{name} {2 * degrees}^\\circ"),
        ("a third", f"\\frac{{{text}}}{{3}}"),
        ("the angle", f"{degrees}^\\circ"),
        ("the number", str(degrees)),
        ("one more", f"{text}+1"),
        ("a power", f"\\{name}^2 {degrees}^\\circ"),
        ("a trailing letter", f"{text} x"),
        ("wrong radians", f"\\{name}\\frac{{{degrees}\\pi}}{{360}}"),
    ]
    other = f"\\{name} {degrees + 2}^\\circ"
    return Gold(kind="function of degrees", text=text, ways=ways, mutations=mutations, other=other, name="x")
