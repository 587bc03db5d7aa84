"""Makes reference answers that were measured or counted: angles, values with units, numbers of science."""

import random
from fractions import Fraction

from metamorphic.gold import WIDE, Gold, other_digit, shown_plainly
from metamorphic.trees import fraction, write


def angle(rng: random.Random) -> Gold:
    degrees = rng.choice([10, 15, 22.5, 30, 36, 40, 45, 52, 60, 72, 75, 84, 105, 110, 120, 127, 135, 145, 150])
    shown = f"{degrees:g}"
    ways = [
        *(("sign", shown + sign) for sign in ("^\\circ", "^{\\circ}", "^ \\circ", "°", "\\degree")),
        ("word", f"{shown}\\text{{ degrees}}"),
        ("plain word", f"{shown} degrees"),
        ("deg", f"{shown}\\text{{ deg}}"),
        ("Chinese", f"{shown}度"),
        ("one decimal", f"{degrees:.1f}^\\circ" if degrees != 22.5 else "22.50^\\circ"),
        ("named", f"\\angle ABC = {shown}^\\circ"),
        ("named by a letter", f"\\theta = {shown}°"),
        ("brackets", f"({shown}^\\circ)"),
        ("a chain", f"180^\\circ - {180 - degrees:g}^\\circ = {shown}^\\circ"),
        ("full width", f"{shown.translate(WIDE)}°"),
        ("text", f"\\text{{{shown}°}}"),
    ]
    mutations = [
        *(("a number", f"{degrees + by:g}^\\circ") for by in (1, -1, 10, 0.5)),
        ("what is left of 180", f"{180 - degrees + 3:g}^\\circ"),
        ("a digit", f"{other_digit(shown, rng)}^\\circ"),
        ("a sign", f"-{shown}^\\circ"),
        ("radians", f"{shown}\\text{{ rad}}"),
        ("radians, plain", f"{shown} rad"),
        ("radians, word", f"{shown}\\text{{ radians}}"),
        ("minutes", f"{shown}'"),
        ("Celsius", f"{shown}^\\circ\\text{{C}}"),
        ("a length", f"{shown}\\text{{ cm}}"),
        ("percent", f"{shown}\\%"),
        ("multiple of pi", f"{shown}\\pi"),
        ("radians by value", f"\\frac{{\\pi}}{{{round(180 / degrees) + 1}}}"),
        ("a letter", f"{shown}x^\\circ"),
        ("sine", f"\\sin {shown}^\\circ"),
    ]
    return Gold(
        kind="angle",
        text=f"{shown}^\\circ",
        ways=ways,
        mutations=mutations,
        other=f"{degrees + 20:g}^\\circ",
        name="\\alpha",
    )


# Symbol, its word, and what the prefixes that it is met with are worth.
_PREFIX = {"": 0, "k": 3, "M": 6, "m": -3, "c": -2, "n": -9, "G": 9}


_PREFIX_WORD = {"": "", "k": "kilo", "M": "mega", "m": "milli", "c": "centi", "n": "nano", "G": "giga"}


_UNITS = {
    "m": ("meter", ("", "k", "c", "m", "n")),
    "g": ("gram", ("", "k", "m")),
    "J": ("joule", ("", "k", "M", "m")),
    "W": ("watt", ("", "k", "M", "m")),
    "N": ("newton", ("", "k", "m")),
    "Pa": ("pascal", ("", "k", "M")),
    "V": ("volt", ("", "k", "m")),
    "Hz": ("hertz", ("", "k", "M", "G")),
    "eV": ("electronvolt", ("", "k", "M", "G")),
    "L": ("liter", ("", "m")),
    "s": ("second", ("", "m", "n")),
    "mol": ("mole", ("", "m")),
}


def quantity(rng: random.Random) -> Gold:
    return _quantity(rng, "quantity", "math")


def science_quantity(rng: random.Random) -> Gold:
    return _quantity(rng, "science: quantity", "stem")


def _quantity(rng: random.Random, kind: str, reward: str) -> Gold:
    """Make a value with an SI unit."""
    symbol = rng.choice(list(_UNITS))
    word, prefixes = _UNITS[symbol]
    prefix, other_prefix = rng.sample(prefixes, 2)
    number = Fraction(rng.choice([12, 15, 24, 25, 36, 48, 64, 85, 250, 320]), rng.choice([1, 10]))
    unit, plain = prefix + symbol, shown_plainly(number)
    moved = number * Fraction(10) ** (_PREFIX[prefix] - _PREFIX[other_prefix])
    power = _PREFIX[prefix] - _PREFIX[other_prefix]
    plural = "" if symbol == "Hz" else "s"
    ways = [
        *(
            (f"unit {rule}", f"{plain}{text}")
            for rule, text in (
                ("plain", f" {unit}"),
                ("text", f"\\text{{ {unit}}}"),
                ("mathrm", f"\\,\\mathrm{{{unit}}}"),
                ("mathrm, tilde", f"~\\mathrm{{{unit}}}"),
                ("text, space", f"\\ \\text{{{unit}}}"),
                ("mathrm, no space", f"\\mathrm{{{unit}}}"),
                ("textrm", f" \\textrm{{ {unit}}}"),
            )
        ),
        ("unit in words", f"{plain} {_PREFIX_WORD[prefix]}{word}{plural}"),
        ("unit in words, text", f"{plain}\\text{{ {_PREFIX_WORD[prefix]}{word}{plural}}}"),
        ("another prefix", f"{shown_plainly(moved)} {other_prefix}{symbol}"),
        ("another prefix, mathrm", f"{shown_plainly(moved)}\\,\\mathrm{{{other_prefix}{symbol}}}"),
        ("another prefix, power of ten", f"{plain} \\times 10^{{{power}}}\\text{{ {other_prefix}{symbol}}}"),
        ("a power of ten", f"{shown_plainly(number * 10)} \\times 10^{{-1}} \\text{{ {unit}}}"),
        ("one zero more", f"{plain}{'0' if '.' in plain else '.0'} \\text{{ {unit}}}"),
        ("a fraction", f"\\frac{{{shown_plainly(number * 2)}}}{{2}}\\text{{ {unit}}}"),
        ("a chain", f"x = {shown_plainly(moved)}\\text{{ {other_prefix}{symbol}}} = {plain}\\text{{ {unit}}}"),
        ("full-width digits", f"{plain.translate(WIDE)} {unit}"),
    ]
    stranger = rng.choice([other for other in _UNITS if other != symbol])
    two = rng.sample([other for other in _UNITS if other != symbol], 2)
    values = [number * 2, number * 10, number / 10, number + number / 2, number / 3 * 2]
    if reward == "math":  # science takes 5 %
        values += [number + Fraction(1, 10), number + 1]
    mutations = [
        *(("a number", f"{shown_plainly(v)} {unit}") for v in values if v.denominator in (1, 2, 5, 10, 20, 50, 100)),
        ("a sign", f"-{plain} {unit}"),
        ("a prefix", f"{plain} {other_prefix}{symbol}"),
        ("a prefix, text", f"{plain}\\text{{ {other_prefix}{symbol}}}"),
        ("a prefix, mathrm", f"{plain}\\,\\mathrm{{{other_prefix}{symbol}}}"),
        ("a prefix in words", f"{plain} {_PREFIX_WORD[other_prefix]}{word}{plural}"),
        ("a unit", f"{plain} {prefix if prefix in _UNITS[stranger][1] else ''}{stranger}"),
        *(("a unit, text", f"{plain}\\text{{ {other}}}") for other in two),
        ("the square of a unit", f"{plain}\\text{{ {unit}}}^2"),
        ("the square of a unit, sign", f"{plain} {unit}²"),
        ("per unit", f"{plain}\\text{{ {unit}}}^{{-1}}"),
        ("a unit per another", f"{plain}\\text{{ {unit}/{stranger}}}"),
        ("moved the wrong way", f"{shown_plainly(number * Fraction(10) ** -power)} {other_prefix}{symbol}"),
        ("an exponent", f"{plain} \\times 10^{{2}}\\text{{ {unit}}}"),
        ("a scale word", f"{plain}\\text{{ million {unit}}}"),
    ]
    other = f"{shown_plainly(number * 3)} {unit}"
    return Gold(
        kind=kind,
        text=f"{plain}\\text{{ {unit}}}",
        ways=ways,
        mutations=mutations,
        other=other,
        name="E",
        reward=reward,
    )


# (unit as LaTeX inside \mathrm, spellings, the same in other units by a factor, other units)
_COMPOUND = [
    (
        "m/s",
        ["m s^{-1}", "m\\cdot s^{-1}"],
        [("km/h", Fraction(18, 5)), ("cm/s", Fraction(100))],
        ["m/s^2", "m\\cdot s", "s/m", "m/min", "m"],
    ),
    (
        "kg/m^3",
        ["kg\\,m^{-3}", "kg\\cdot m^{-3}"],
        [("g/cm^3", Fraction(1, 1000)), ("g/L", Fraction(1))],
        ["kg/m^2", "g/m^3", "kg/cm^3", "kg", "m^3/kg"],
    ),
    (
        "m/s^2",
        ["m s^{-2}", "m\\cdot s^{-2}"],
        [("cm/s^2", Fraction(100)), ("km/s^2", Fraction(1, 1000))],
        ["m/s", "m/s^3", "km/s", "m", "s^2/m"],
    ),
    (
        "J/mol",
        ["J\\,mol^{-1}", "J\\cdot mol^{-1}"],
        [("kJ/mol", Fraction(1, 1000))],
        ["J/kg", "J", "mol/J", "J\\cdot mol", "eV/mol"],
    ),
    (
        "mol/L",
        ["mol\\,L^{-1}", "mol\\cdot L^{-1}"],
        [("mmol/L", Fraction(1000)), ("mmol/mL", Fraction(1))],
        ["mol", "L/mol", "g/L", "mol/mL", "mol/kg"],
    ),
    (
        "N/m",
        ["N\\,m^{-1}", "N\\cdot m^{-1}"],
        [("N/cm", Fraction(1, 100)), ("mN/m", Fraction(1000))],
        ["N\\cdot m", "N", "N/m^2", "m/N", "N/s"],
    ),
    (
        "W/m^2",
        ["W\\,m^{-2}", "W\\cdot m^{-2}"],
        [("W/cm^2", Fraction(1, 10000)), ("kW/m^2", Fraction(1, 1000))],
        ["W/m", "W", "J/m^2", "W\\cdot m^2", "W/m^3"],
    ),
    ("m^2", ["square\\ meters"], [("cm^2", Fraction(10000))], ["m", "m^3", "cm^3", "mm", "kg^2"]),
    (
        "cm^3",
        ["cubic\\ centimeters"],
        [("mL", Fraction(1)), ("L", Fraction(1, 1000))],
        ["cm^2", "cm", "m^3", "mm^3", "g"],
    ),
    (
        "N\\cdot m",
        ["N\\,m", "m\\cdot N"],
        [("kN\\cdot m", Fraction(1, 1000)), ("N\\cdot cm", Fraction(100))],
        ["N/m", "N", "N\\cdot m^2", "N\\cdot s", "W"],
    ),
]


def compound_quantity(rng: random.Random) -> Gold:
    return _compound_quantity(rng, "compound quantity", "math")


def science_compound_quantity(rng: random.Random) -> Gold:
    return _compound_quantity(rng, "science: compound quantity", "stem")


def _compound_quantity(rng: random.Random, kind: str, reward: str) -> Gold:
    unit, spelled, equal, others = rng.choice(_COMPOUND)
    number = Fraction(rng.choice([12, 15, 24, 25, 36, 48, 75, 90, 120]), rng.choice([1, 10]))
    plain = shown_plainly(number)
    signs = unit.replace("^2", "²").replace("^3", "³").replace("\\cdot ", "·")
    ways = [
        ("mathrm", f"{plain}\\,\\mathrm{{{unit}}}"),
        ("mathrm, space", f"{plain} \\mathrm{{{unit}}}"),
        ("mathrm, tilde", f"{plain}~\\mathrm{{{unit}}}"),
        ("parts", f"{plain} " + _in_parts(unit)),
        ("parts, thin space", f"{plain}\\," + _in_parts(unit)),
        ("signs", f"{plain} {signs}"),
        ("signs, text", f"{plain}\\text{{ {signs}}}"),
        ("full-width digits", f"{plain.translate(WIDE)} {signs}"),
        ("a chain", f"x = \\frac{{{shown_plainly(number * 2)}}}{{2}} = {plain}\\,\\mathrm{{{unit}}}"),
        ("one zero more", f"{plain}{'0' if '.' in plain else '.0'}\\,\\mathrm{{{unit}}}"),
        *(("plain", f"{plain} {unit}") for _ in range(1) if "\\" not in unit),
        *(("text", f"{plain}\\text{{ {unit}}}") for _ in range(1) if "\\" not in unit and "^" not in unit),
        *(("negative exponents", f"{plain}\\,\\mathrm{{{text}}}") for text in spelled),
        *(("another unit", f"{shown_plainly(number * by)}\\,\\mathrm{{{text}}}") for text, by in equal),
        *(("another unit, parts", f"{shown_plainly(number * by)} {_in_parts(text)}") for text, by in equal),
        *(
            ("a fraction of units", f"{plain}\\,\\frac{{\\mathrm{{{a}}}}}{{\\mathrm{{{b}}}}}")
            for a, _, b in [unit.partition("/")]
            if b
        ),
    ]
    values = [number * 2, number * 10, number / 10, number + number / 2]
    if reward == "math":  # science takes 5 %
        values += [number + Fraction(1, 10), number + 1]
    mutations = [
        *(("a number", f"{shown_plainly(v)}\\,\\mathrm{{{unit}}}") for v in values),
        ("a sign", f"-{plain}\\,\\mathrm{{{unit}}}"),
        *(("another unit", f"{plain}\\,\\mathrm{{{other}}}") for other in others),
        *(("another unit, parts", f"{plain} {_in_parts(other)}") for other in others),
        *((f"{text} without converting", f"{plain}\\,\\mathrm{{{text}}}") for text, by in equal if by != 1),
        *(
            ("converted the wrong way", f"{shown_plainly(number / by)}\\,\\mathrm{{{text}}}")
            for text, by in equal
            if by not in (1, Fraction(18, 5))
        ),
        ("an exponent", f"{plain} \\times 10^{{2}}\\,\\mathrm{{{unit}}}"),
    ]
    text = f"{plain}\\,\\mathrm{{{unit}}}"
    other = f"{shown_plainly(number * 3)}\\,\\mathrm{{{unit}}}"
    return Gold(kind=kind, text=text, ways=ways, mutations=mutations, other=other, name="x", reward=reward)


def _in_parts(unit: str) -> str:
    """Return a unit with each symbol in \\text: `\\text{m}/\\text{s}^2` for `m/s^2`."""
    text, word = "", ""
    for character in [*unit.replace("\\cdot ", "·"), ""]:
        if character.isalpha():
            word += character
            continue
        text += (f"\\text{{{word}}}" if word else "") + character.replace("·", "\\cdot ")
        word = ""
    return text


def science_number(rng: random.Random) -> Gold:
    """Make a measured value. Science accepts 5 % around it, and mutations are at least a quarter away."""
    exact = Fraction(rng.choice([n for n in range(101, 999) if n % 10]), rng.choice([10, 100, 1000]))
    text = shown_plainly(exact)
    near = f"{float(exact * Fraction(101, 100)):.3g}"
    ways = [
        ("as it stands", text),
        ("a zero more", f"{text}0"),
        ("rounded", f"{float(exact):.2g}" if abs(Fraction(f"{float(exact):.2g}") - exact) < exact / 30 else text),
        ("one percent more", near),
        ("one percent less", f"{float(exact * Fraction(99, 100)):.3g}"),
        ("scientific", f"{float(exact * 10)} \\times 10^{{-1}}"),
        ("about", f"\\approx {text}"),
        ("named", f"x = {text}"),
        ("named, about", f"x \\approx {near}"),
        ("fraction", write(fraction(exact))),
        ("slash", f"{exact}"),
        ("text", f"\\text{{{text}}}"),
        ("full width", text.translate(WIDE)),
        ("e", f"{float(exact * 1000):g}e-3"),
        ("a chain", f"x = \\frac{{{shown_plainly(exact * 2)}}}{{2}} = {text}"),
        ("a root", f"\\sqrt{{{shown_plainly(exact**2)}}}"),
    ]
    factors = [Fraction(n, 100) for n in (130, 150, 200, 300, 1000, 10000, 70, 50, 25, 10, 1)]
    mutations = [
        *((f"times {float(by):g}", shown_plainly(exact * by)) for by in factors),
        ("a sign", f"-{text}"),
        ("an exponent", f"{text} \\times 10^{{3}}"),
        ("an exponent", f"{text} \\times 10^{{-2}}"),
        ("a fraction upside down", f"\\frac{{1}}{{{shown_plainly(exact * 3)}}}")
        if not Fraction(1, 2) < exact**2 * 3 < 2
        else ("zero", "0"),
        ("a square", f"({shown_plainly(exact * 2)})^2") if not Fraction(1, 2) < exact * 4 < 2 else ("zero", "0"),
        ("a trailing letter", f"{text}x"),
        ("a range", f"{text} to {shown_plainly(exact * 2)}"),
        ("a range with a dash", f"{text}-{shown_plainly(exact * 2)}"),
        ("words", "\\text{increases}"),
    ]
    return Gold(
        kind="science: number",
        text=text,
        ways=ways,
        mutations=mutations,
        other=shown_plainly(exact * 2),
        name="x",
        reward="stem",
    )


def science_count(rng: random.Random) -> Gold:
    """Make a count or a year, which science compares exactly."""
    whole = rng.choice([rng.randint(2, 60), rng.randint(1850, 2020)])
    text = str(whole)
    ways = [
        ("as it stands", text),
        ("one decimal", f"{text}.0"),
        ("text", f"\\text{{{text}}}"),
        ("named", f"n = {text}"),
        ("brackets", f"({text})"),
        ("full width", text.translate(WIDE)),
        ("a sum", f"{whole - 1}+1"),
        ("a chain", f"n = {whole - 1}+1 = {text}"),
        ("bold", f"\\mathbf{{{text}}}"),
        ("about", f"\\approx {text}"),
    ]
    mutations = [
        *(("a digit", str(whole + by)) for by in (1, -1, 2, 10, 45)),
        ("a digit", other_digit(text, rng)),
        ("twice", str(whole * 2)),
        ("one digit more", f"{text}0"),
        ("a sign", f"-{text}"),
        ("a square", f"{whole + 2}^2"),
        ("a root", f"\\sqrt{{{whole + 1}}}"),
        ("a sum", f"{whole}+1"),
        ("a range", f"{whole} to {whole + 1}"),
        ("a range with a dash", f"{whole}-{whole + 1}"),
        ("an exponent", f"{text} \\times 10^{{2}}"),
        ("a trailing letter", f"{text}x"),
        ("a half more", f"{whole}.5"),
        ("named elsewhere", f"n = {whole + 1}"),
    ]
    return Gold(
        kind="science: count", text=text, ways=ways, mutations=mutations, other=str(whole + 3), name="n", reward="stem"
    )
