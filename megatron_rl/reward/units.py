"""Reads units of measurement: which texts are one, by their spelling, and how one is converted to another.

Whether a text *behind a value* is a unit is decided by `meaning.py`: a letter behind a number is a factor as often.
"""

import functools
import re
from dataclasses import dataclass, field
from fractions import Fraction

from megatron_rl.reward.latex import without_text_marks

# Each line: symbol; what it is in units of the lines above (nothing: a dimension of its own); other spellings.
# "+" in front: takes the SI prefixes, "+" in front of a spelling too.
_TABLE = """
+m;; +meter +metre 米
+g;; +gram gm 克
+s;; +second sec 秒
+A;; +ampere amp 安培 安
K;; kelvin kelvins 开尔文 开
+mol;; +mole 摩尔
cd;; candela
rad;; radian 弧度
degree;; deg ^\\circ 度
+bit;;
dollar;; $ usd buck
yuan;; ¥ rmb cny 元
euro;; € eur
pound_sterling;; £ gbp
dB;; decibel
cent;1/100 dollar;
degreeC;K; celsius ^\\circC ^\\circcelsius degreecelsius 摄氏度
degreeF;5/9 K; fahrenheit ^\\circF degreefahrenheit
arcminute;1/60 degree; arcmin '
arcsecond;1/3600 degree; arcsec ''
rev;360 degree; revolution
min;60 s; minute 分钟
h;3600 s; hour hr 小时
day;86400 s; 天
week;604800 s;
month;;
year;; yr 年
+Hz;1/s; +hertz 赫兹 赫
rpm;360 degree/min;
+N;1000 g m/s^2; +newton 牛顿 牛
+J;1 N m; +joule 焦耳 焦
+W;1 J/s; +watt 瓦特 瓦
+Pa;1 N/m^2; +pascal 帕斯卡 帕
+C;1 A s; +coulomb 库仑 库
+V;1 J/C; +volt 伏特 伏
+Ω;1 V/A; +ohm 欧姆 欧
+S;1 A/V; +siemens
+F;1 C/V; +farad
+T;1 V s/m^2; +tesla 特斯拉
gauss;1/10000 T; Gs
+Wb;1 V s; weber 韦伯
+H;1 V s/A; henry
+eV;1602176634/10000000000000000000000000000 J; +electronvolt
+cal;4184/1000 J; +calorie
+L;1/1000 m^3; +l +liter +litre 升
+M;1000 mol/m^3; molar
+Wh;3600 J;
+Ah;3600 C;
+Bq;1/s; becquerel
+Gy;1 J/kg; gray
+Sv;1 J/kg; sievert
lm;; lumen
lx;1 lm/m^2; lux
dyn;1/100000 N; dyne
erg;1/10000000 J;
Da;166053906660/100000000000000000000000000000000000 g; dalton amu
bar;100000 Pa;
mbar;100 Pa;
atm;101325 Pa; atmosphere
mmHg;133322387415/1000000000 Pa; torr Torr
psi;6894757/1000 Pa;
in;254/10000 m; inch inches
ft;3048/10000 m; foot feet
yd;9144/10000 m; yard
mi;1609344/1000 m; mile
Å;1/10000000000 m; angstrom
mph;1 mi/h;
knot;1852/3600 m/s; kn
km_per_hour;1000 m/h; kmh kmph
lb;45359237/100000 g; pound lbs
oz;28349523125/1000000000 g; ounce
ton;1000000 g; tonne t 吨
gallon;3785411784/1000000000000 m^3; gal
ha;10000 m^2; hectare
acre;40468564224/10000000 m^2;
+byte;8 bit;
ppm;;
ppb;;
hp;745699872/1000000 W; horsepower
"""
_PREFIXES = {
    "": 0, "n": -9, "µ": -6, "u": -6, "m": -3, "c": -2, "d": -1, "h": 2, "k": 3, "M": 6, "G": 9, "T": 12,
    "p": -12, "f": -15,
}  # fmt: skip
_PREFIX_WORDS = {
    "": 0, "pico": -12, "nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "hecto": 2, "kilo": 3, "mega": 6,
    "giga": 9, "tera": 12,
}  # fmt: skip
_CHINESE_PREFIXES = {"千": 3, "毫": -3, "厘": -2, "分": -1, "微": -6, "纳": -9, "兆": 6}
_ALIASES = {"公里": ("m", 3), "公斤": ("g", 3)}
_SCALES: dict[str, int | Fraction] = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12, "tens": 10,
    "half": Fraction(1, 2), "halves": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4),
    "万": 10**4, "亿": 10**8,
}  # fmt: skip
# Kelvin between absolute zero and the zero of the scale. They count only for a temperature that stands alone.
_OFFSETS = {"degreeC": Fraction(27315, 100), "degreeF": Fraction(45967, 180)}
DEGREES, RADIANS = (("degree", 1),), (("rad", 1),)
_MAX_CHARACTERS = 80
_MAX_POWER = 9
# Words that add to a value, or take it back, say no unit: 12 (not 13), 3 metres and 4 feet, 5 or more.
_NO_NOUN = re.compile(
    r"\b(?:and|or|not|no|if|for|to|where|than|but|more|less|most|least|except|from|between|is|are|nor|neither|about"
    r"|when|as|per|half|minus|plus|times|either|with|without|mod|maybe|possibly|also)\b",
    re.IGNORECASE,
)
_NOUN = re.compile(r"[A-Za-z]{3,}(?:[ -]?[A-Za-z]{2,}){0,3}|[A-Za-z]{2,}|[\u4e00-\u9fff]{1,4}")
_TOKEN = re.compile(
    r"\s*(?:\^\s*(?P<exponent>[-+]?\d+)|(?P<over>/|\bper\b)|(?P<times>\\cdot|\*|(?<=[a-zA-Z])-)"
    r"|(?P<bracket>[()])|(?P<root>square|cubic|sq\b\.?|cu\b\.?)"
    r"|(?P<name>\^\\circ\s*(?:C|F|[cC]elsius|[fF]ahrenheit)?(?![a-zA-Z])|degrees?\s+[cC]elsius|degrees?\s+[fF]ahrenheit"
    r"|'{1,2}|\\?[$¥€£]|[a-zA-ZµÅΩ]+|[\u4e00-\u9fff]+))"
)
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Describes a unit. scale: what a value in this unit is multiplied by to be in base units; 1 for a unit that is
    unknown here.

    powers: of the base units, sorted. noun: what is counted, or the base of a numeral; then there are no powers.
    offset: added after the scale, for temperatures. count: how many of the unit a scale word says, as in 5 million m.
    is_letter: a single letter, which behind a number may be a variable.
    """

    scale: Fraction = Fraction(1)
    powers: tuple[tuple[str, int], ...] = ()
    noun: str = ""
    offset: Fraction = Fraction(0)
    count: Fraction = Fraction(1)
    is_letter: bool = False

    @property
    def is_known(self) -> bool:
        return bool(self.powers)


@dataclass(slots=True)
class _Product:
    scale: Fraction = Fraction(1)
    count: Fraction = Fraction(1)
    powers: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def take(self, name: str, power: int) -> bool:
        if name.lower() in _SCALES or name.lower().rstrip("s") in _SCALES:
            self.count *= Fraction(_SCALES.get(name.lower(), 0) or _SCALES[name.lower().rstrip("s")]) ** power
            return True
        found = _look_up(name)
        if found is None:
            return False
        self.scale *= found[1] ** power
        self.names.append(found[0])
        for base, exponent in found[2]:
            self.powers[base] = self.powers.get(base, 0) + exponent * power
        return True


@functools.lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit | None:
    """Return the unit that `text` (cleaned by `latex.clean`) is, with or without `\\text` marks, or None. A counted
    noun is one."""
    if len(text) > _MAX_CHARACTERS:
        return None
    plain = _FRACTION.sub(r"(\1)/(\2)", without_text_marks(text)).replace("{", "").replace("}", "")
    plain = re.sub(r"\\mu\s*|μ", "µ", plain).replace("\\Omega", "Ω").strip().strip(".").strip()
    return _known(plain) or _noun(plain)


def same_dimension(one: Unit, other: Unit) -> bool:
    """Tell whether a value in one may be converted to the other. A unit that is unknown here is never held against
    another."""
    if one.is_known and other.is_known:
        return one.powers == other.powers
    return not (one.is_known or other.is_known)


def _known(text: str) -> Unit | None:
    factors = _factors(text)
    product = _Product()
    if not factors or not all(product.take(name, power) for name, power in factors):
        return None
    name, _ = factors[0]
    powers = tuple(sorted((base, exponent) for base, exponent in product.powers.items() if exponent))
    return Unit(
        scale=product.scale,
        powers=powers if powers or not product.names else (("one", 1),),
        offset=_OFFSETS.get(product.names[0], Fraction(0)) if product.names and factors == [(name, 1)] else Fraction(0),
        count=product.count,
        is_letter=len(factors) == 1 and len(name) == 1 and name.isascii() and name.isalpha(),
    )


def _factors(text: str) -> list[tuple[str, int]] | None:
    """Return (name, power) of each factor in m/s^2, N\\cdot m, kg m^-3, J/(kg K) and square metres; None for anything
    else."""
    factors: list[tuple[str, int]] = []
    depth, sign, root, position, last = 0, 1, 1, 0, ""
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        position, kind = match.end(), match.lastgroup
        if kind == "exponent":
            if last != "name" or abs(int(match[kind])) > _MAX_POWER:
                return None
            name, power = factors.pop()
            factors.append((name, power * int(match[kind])))
        elif kind == "over":
            sign = -1
        elif kind == "bracket":
            depth += 1 if match[kind] == "(" else -1
            sign = sign if depth else 1
        elif kind == "root":
            root = 2 if match[kind].startswith("sq") else 3
        elif kind == "name":
            factors.append((match[kind], sign * root))
            root = 1
            sign = sign if depth else 1
        last = kind or ""
    return None if depth or last in ("over", "times", "root") else factors


def _noun(text: str) -> Unit | None:
    bracketless = text[1:-1].strip() if text[:1] + text[-1:] == "()" else text
    if re.fullmatch(r"\\?p?mod\s*\d+", bracketless):
        return Unit(noun=re.sub(r"\D*(\d+)\D*", r"mod \1", bracketless))
    text = re.sub(r"\s*\^[23]$", "", text)  # units^2
    if not _NOUN.fullmatch(text) or _NO_NOUN.search(text):
        return None
    words = text.lower().split()
    count = Fraction(1)
    while words and words[0] in _SCALES:
        count *= _SCALES[words.pop(0)]
    return Unit(noun=" ".join(words), count=count)


@functools.lru_cache(maxsize=4096)
def _look_up(name: str) -> tuple[str, Fraction, tuple[tuple[str, int], ...]] | None:
    """Return (symbol, scale, powers of base units) of one name, with its prefix."""
    squeezed = re.sub(r"\s+", "", name)
    table = _spellings()
    for spelled in (
        squeezed,
        re.sub(r"^\\(?=\$)", "", squeezed),
        re.sub(r"^degrees(?=[cf])", "degree", squeezed.lower()),
    ):
        for candidate in (spelled, *([spelled.lower()] if len(spelled) > 3 else [])):
            for singular in (candidate, *([candidate[:-1]] if len(candidate) > 3 and candidate.endswith("s") else [])):
                if singular in table:
                    return table[singular]
    return None


@functools.cache
def _spellings() -> dict[str, tuple[str, Fraction, tuple[tuple[str, int], ...]]]:
    table: dict[str, tuple[str, Fraction, tuple[tuple[str, int], ...]]] = {}
    for line in _TABLE.strip().splitlines():
        symbol, definition, others = line.split(";")
        prefixed, symbol = symbol.startswith("+"), symbol.lstrip("+")
        scale, powers = _defined(definition, table) if definition else (Fraction(1), ((symbol, 1),))
        for spelling in (f"+{symbol}" if prefixed else symbol, *others.split()):
            bare = spelling.lstrip("+")
            is_word = len(bare) > 3
            prefixes = {"": 0}
            if spelling.startswith("+"):
                prefixes = _PREFIX_WORDS if is_word else _PREFIXES
            elif "\u4e00" <= bare[0] <= "\u9fff":
                prefixes = {"": 0} | _CHINESE_PREFIXES
            for prefix, exponent in prefixes.items():
                table.setdefault(prefix + bare, (symbol, scale * Fraction(10) ** exponent, powers))
    for alias, (symbol, exponent) in _ALIASES.items():
        _, scale, powers = table[symbol]
        table[alias] = (symbol, scale * Fraction(10) ** exponent, powers)
    return table


def _defined(
    definition: str, table: dict[str, tuple[str, Fraction, tuple[tuple[str, int], ...]]]
) -> tuple[Fraction, tuple[tuple[str, int], ...]]:
    number, names = re.fullmatch(r"(\d+(?:/\d+)?(?![a-z])|1(?=/))?\s*(.*)", definition).groups()  # type: ignore[union-attr]
    scale, sign = Fraction(number or 1), 1
    powers: dict[str, int] = {}
    for over, name, exponent in re.findall(r"(/)?\s*([a-zA-Z]+)(?:\^(\d))?", names):
        sign = -1 if over else sign
        power = sign * int(exponent or 1)
        scale *= table[name][1] ** power
        for base, base_power in table[name][2]:
            powers[base] = powers.get(base, 0) + base_power * power
    return scale, tuple(sorted((base, power) for base, power in powers.items() if power))
