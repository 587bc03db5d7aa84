"""Units behind a value: they may be left out, and must not be another one."""

import re

# Spellings of one unit. A unit that is not here is never held against an answer.
_SPELLINGS = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams gm",
    "kg": "kilogram kilograms",
    "ton": "tons tonne tonnes",
    "lb": "pound pounds lbs",
    "s": "second seconds sec secs",
    "min": "minute minutes mins",
    "h": "hour hours hr hrs",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "mL": "ml milliliter milliliters",
    "L": "l liter liters litre litres",
    "cent": "cents",
    "dollar": "dollars usd",
    "degree": "degrees deg",
    "rad": "radian radians",
    "mph": "",
    "am": "",
    "pm": "",
    "J": "joule joules",
    "kJ": "kilojoule kilojoules",
    "N": "newton newtons",
    "W": "watt watts",
    "Pa": "",
    "kPa": "",
    "atm": "",
    "K": "kelvin",
    "mol": "mole moles",
    "Hz": "hertz",
    "kHz": "",
    "MHz": "",
    "GHz": "",
    "V": "volt volts",
    "A": "ampere amperes amp amps",
    "eV": "",
    "MeV": "",
    "nm": "nanometer nanometers",
}
_CANONICAL = {word: unit for unit, others in _SPELLINGS.items() for word in (unit, *others.split())}
_POWER = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_MARKED = rf"\\text\s*\{{[^{{}}]*\}}{_POWER}"
_BARE = "|".join(sorted((re.escape(word) for word in _CANONICAL), key=len, reverse=True))
# Bare letters are a unit only right after a digit and only where no product is meant: 5 cm, but not 5 x.
_BARE = rf"(?<=[\d}})%])\s*(?:square |cubic |sq\.? )?(?:{_BARE})(?:{_POWER})(?:\s*/\s*(?:{_BARE}){_POWER})?"
_UNIT = re.compile(
    rf"(?P<value>.*[\d}})!]|.*\\pi|.*\\infty)\s*(?P<unit>{_MARKED}(?:\s*(?:/|\\cdot|\s|per)?\s*{_MARKED})*|{_BARE})",
    re.DOTALL,
)
_BASE = re.compile(r"(?P<value>[-+]?\d+)_\s*\{?\s*(?:\\text\s*\{)?(?P<base>\d+|[a-z]+)\}?\}?")
# Words that add to a value, or take it back, are no unit: 12 (not 13), 3 metres and 4 feet.
_NO_UNIT = re.compile(r"\\text\s*\{[^{}]*(?:\d|\b(?:and|or|not|if|for|to|where|than|but)\b)", re.IGNORECASE)
_LETTER_UNITS = {"m", "g", "s", "h", "l", "L", "J", "N", "W", "K", "V", "A"}


def split_unit(answer: str) -> tuple[str, str]:
    """(value, unit), the unit empty where there is none. The base of a numeral (204_5) counts as its unit."""
    base = _BASE.fullmatch(answer)
    if base:
        return base["value"], "base " + base["base"]
    match = _UNIT.fullmatch(answer)
    if not match or _NO_UNIT.search(match["unit"]):
        return answer, ""
    unit = match["unit"].strip()
    # 5m is a product as often as five metres; only a power or a slash tells.
    if unit in _LETTER_UNITS:
        return answer, ""
    return match["value"].strip(), unit


def same_unit(gold: str, answer: str) -> bool:
    """False only where both have a unit that is known here and they differ, or numerals of different bases."""
    units = canonical_unit(split_unit(gold)[1]), canonical_unit(split_unit(answer)[1])
    return not all(units) or units[0] == units[1]


def canonical_unit(unit: str) -> str:
    """One spelling, or "" when it has a part that is unknown."""
    if unit.startswith("base "):
        return unit
    plain = re.sub(r"\\text\s*\{([^{}]*)\}|\\cdot", lambda match: f" {match[1] or ''} ", unit)
    plain = re.sub(r"\b(?:square|sq\.?)\s+(\w+)", r"\1^2", re.sub(r"\bcubic\s+(\w+)", r"\1^3", plain))
    plain = re.sub(r"[{}\s]", " ", plain.replace("per", "/").replace(".", ""))
    parts = re.findall(r"[A-Za-z]+|[-/^\d]+", plain)
    known = [_CANONICAL.get(part, _CANONICAL.get(part.lower())) if part.isalpha() else part for part in parts]
    return " ".join(part for part in known if part) if all(known) else ""
