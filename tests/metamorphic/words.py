"""Makes reference answers that are no mathematics: letters of choices, words, chemical formulas."""

import random

from metamorphic.gold import Gold


def choice(rng: random.Random) -> Gold:
    return _choice(rng, "choice", "math")


def science_choice(rng: random.Random) -> Gold:
    return _choice(rng, "science: choice", "stem")


def _choice(rng: random.Random, kind: str, reward: str) -> Gold:
    right = rng.choice("ABCDE")
    wrong = rng.sample([letter for letter in "ABCDE" if letter != right], 3)
    said = rng.choice(["12", "\\frac{1}{2}", "Paris", "\\text{nitrogen}", "3\\pi", "28"])
    ways = [
        *(
            ("letter", text)
            for text in (
                right,
                f"({right})",
                f"{right}.",
                f"\\text{{{right}}}",
                f"\\text{{({right})}}",
                f"\\textbf{{{right}}}",
                f"\\textbf{{({right})}}",
                f"\\mathrm{{{right}}}",
                f"\\mathbf{{{right}}}",
                f"\\mathrm{{({right})}}",
                f"\\mathbf{{({right})}}",
            )
        ),
        ("letter, full width", right.translate(str.maketrans("ABCDE", "ＡＢＣＤＥ"))),
        ("full-width brackets", f"（{right}）"),
        ("with its text, bold", f"\\textbf{{({right}) }} {said}"),
        ("with its text", f"({right}) {said}"),
        ("with its text, in text", f"\\text{{({right})}} {said}"),
        ("with its text, full stop", f"{right}. {said}"),
        ("with its text, bracket", f"{right}) {said}"),
        ("with its text, colon", f"{right}: {said}"),
        ("with its text, mathrm", f"\\mathrm{{({right})}}\\ {said}"),
        ("a sentence", f"\\text{{The answer is {right}}}"),
        ("option", f"\\text{{Option {right}}}"),
    ]
    mutations = [
        *(
            ("another letter", text)
            for w in wrong[:2]
            for text in (
                w,
                f"({w})",
                f"\\text{{{w}}}",
                f"{w}.",
                f"\\textbf{{({w}) }} {said}",
                f"({w}) {said}",
                f"{w}. {said}",
            )
        ),
        ("a letter that is none", "G"),
        ("two letters", f"{right}{wrong[0]}"),
        ("two letters in brackets", f"({right})({wrong[0]})"),
        ("all", "A, B, C, D, E"),
        ("not", f"\\text{{not {right}}}"),
        ("not, brackets", f"Not ({right})"),
        ("neither", f"neither {right} nor {wrong[0]}"),
        ("all but", f"\\text{{all but {right}}}"),
        ("a number", "7"),
        ("a text alone", "\\text{none of these}"),
    ]
    text = rng.choice((right, f"({right})", f"\\text{{({right})}}", f"\\textbf{{({right})}}"))
    return Gold(kind=kind, text=text, ways=ways, mutations=mutations, other=wrong[2], in_words=True, reward=reward)


_WORDS = [
    "ellipse",
    "no solution",
    "Evelyn",
    "isosceles triangle",
    "even",
    "infinitely many",
    "hyperbola",
    "tangent",
    "Tuesday",
    "odd",
    "square",
    "diverges",
    "monotonic",
    "parabola",
    "convergent",
    "obtuse",
    "blue",
    "impossible",
    "west",
    "acute",
]


_SCIENCE_WORDS = [
    "increases",
    "nitrogen",
    "mitochondria",
    "oxidation",
    "endothermic",
    "potential energy",
    "photosynthesis",
    "mutualism",
    "convection",
    "covalent bond",
    "gravity",
    "erosion",
    "diffusion",
    "carbon dioxide",
    "the nucleus",
    "an enzyme",
    "friction",
    "osmosis",
    "evaporation",
    "a lipid",
]


_CHINESE = [
    "无解",
    "增大",
    "等腰三角形",
    "椭圆",
    "不存在",
    "减小",
    "双曲线",
    "平行",
    "垂直",
    "偶函数",
    "奇函数",
    "直角三角形",
    "抛物线",
    "相交",
    "正确",
    "充分条件",
    "线段",
    "菱形",
    "单调递增",
    "钝角",
]


def words(rng: random.Random) -> Gold:
    return _words(rng, "words", "math", _WORDS)


def science_words(rng: random.Random) -> Gold:
    return _words(rng, "science: words", "stem", _SCIENCE_WORDS)


def _words(rng: random.Random, kind: str, reward: str, known: list[str]) -> Gold:
    text, *others = rng.sample(known, 6)
    ways = [
        ("as it stands", text),
        ("text", f"\\text{{{text}}}"),
        ("mathrm", f"\\mathrm{{{text.replace(' ', '~')}}}"),
        ("bold", f"\\textbf{{{text}}}"),
        ("italics", f"\\textit{{{text}}}"),
        ("capital", text[0].upper() + text[1:]),
        ("capital, text", f"\\text{{{text[0].upper() + text[1:]}}}"),
        ("capitals", text.upper()),
        ("full stop", f"\\text{{{text}.}}"),
        ("spaces", f"\\text{{ {text} }}"),
        ("a sentence", f"\\text{{The answer is {text}}}"),
        ("quoted", f'"{text}"'),
    ]
    last = text.split()[-1]
    mutations = [
        *(("another word", other) for other in others[:4]),
        *(("another word, text", f"\\text{{{other}}}") for other in others[:4]),
        ("not", f"not {text}"),
        ("not, text", f"\\text{{not {text}}}"),
        ("neither", f"\\text{{neither {text} nor {others[0]}}}"),
        ("a letter lost", text[:-2]),
        ("a letter lost in front", last[2:]),
        ("a letter", text[:-1] + ("x" if text[-1] != "x" else "y")),
        ("a number", "5"),
        ("its first letter", text[0]),
        ("backwards", text[::-1]),
        ("two answers", f"{text}/{others[1]}"),
        ("two answers, but", f"\\text{{{text} but {others[2]}}}"),
        ("two answers, then", f"\\text{{{text}, then {others[3]}}}"),
    ]
    return Gold(kind=kind, text=text, ways=ways, mutations=mutations, other=others[4], in_words=True, reward=reward)


def chinese_words(rng: random.Random) -> Gold:
    text, *others = rng.sample(_CHINESE, 6)
    ways = [
        ("as it stands", text),
        ("text", f"\\text{{{text}}}"),
        ("bold", f"\\textbf{{{text}}}"),
        ("mathrm", f"\\mathrm{{{text}}}"),
        ("spaces", f" {text} "),
        ("full stop", f"{text}。"),
        ("quoted", f"“{text}”"),
        ("mbox", f"\\mbox{{{text}}}"),
        ("answer", f"答案：{text}"),
        ("answer is", f"答案是{text}"),
        ("answer is, text", f"\\text{{答案为{text}}}"),
        ("brackets", f"（{text}）"),
    ]
    mutations = [
        *(("another word", other) for other in others[:4]),
        *(("another word, text", f"\\text{{{other}}}") for other in others[:4]),
        ("not", f"不是{text}"),
        ("not, text", f"\\text{{非{text}}}"),
        ("a character lost", text[:-1]),
        ("a character more", f"{text}数"),
        ("or", f"{text}或{others[0]}"),
        ("or, text", f"\\text{{{text}或{others[1]}}}"),
        ("comma", f"{text}、{others[2]}"),
        ("full-width comma", f"{text}，{others[3]}"),
        ("brackets", f"{text}（{others[0]}）"),
        ("a number", "5"),
        ("backwards", text[::-1]),
        ("answer is another", f"答案：{others[1]}"),
    ]
    return Gold(kind="Chinese words", text=text, ways=ways, mutations=mutations, other=others[4], in_words=True)


_CHEMISTRY = [
    ("CO2", "CO_2", "CO₂"),
    ("H2SO4", "H_2SO_4", "H₂SO₄"),
    ("NH3", "NH_3", "NH₃"),
    ("Fe2O3", "Fe_2O_3", "Fe₂O₃"),
    ("CH4", "CH_4", "CH₄"),
    ("Na+", "Na^+", "Na⁺"),
    ("Cl-", "Cl^-", "Cl⁻"),
    ("C6H12O6", "C_6H_{12}O_6", "C₆H₁₂O₆"),
    ("CaCO3", "CaCO_3", "CaCO₃"),
    ("N2O", "N_2O", "N₂O"),
    ("O2", "O_2", "O₂"),
    ("Ca2+", "Ca^{2+}", "Ca²⁺"),
    ("PCl5", "PCl_5", "PCl₅"),
    ("SiO2", "SiO_2", "SiO₂"),
    ("KNO3", "KNO_3", "KNO₃"),
    ("Mg2+", "Mg^{2+}", "Mg²⁺"),
    ("SO3", "SO_3", "SO₃"),
    ("HCl", "HCl", "HCl"),
    ("H2O2", "H_2O_2", "H₂O₂"),
    ("NaOH", "NaOH", "NaOH"),
]


def chemical_formula(rng: random.Random) -> Gold:
    (text, lowered, signs), *others = rng.sample(_CHEMISTRY, 5)
    braced = "".join(f"_{{{c}}}" if c.isdigit() and text[-1] not in "+-" else c for c in text)
    ways = [
        ("as it stands", text),
        ("indices", lowered),
        ("indices, mathrm", f"\\mathrm{{{lowered}}}"),
        ("indices, ce", f"\\ce{{{text}}}"),
        ("signs", signs),
        ("text", f"\\text{{{text}}}"),
        ("signs, text", f"\\text{{{signs}}}"),
        ("mathrm", f"\\mathrm{{{text}}}"),
        ("braced indices", f"\\mathrm{{{braced}}}" if "12" not in text else f"\\mathrm{{{lowered}}}"),
        ("bold", f"\\textbf{{{text}}}"),
    ]
    mutations = [
        *(("another formula", form) for other in others[:4] for form in other[:2]),
        *(("another formula, mathrm", f"\\mathrm{{{other[1]}}}") for other in others[:3]),
        ("one more atom", f"{text}2" if not text[-1].isdigit() else f"{text[:-1]}{int(text[-1]) + 1}"),
        ("a charge", f"{text}^{{3-}}"),
        ("two of it", f"2{text}"),
        ("the first letter", "X"),
        ("not", f"not {text}"),
        ("two answers", f"{text}/{others[0][0]}"),
        ("two answers, plus", f"{text} + {others[1][0]}"),
    ]
    mutations = list({t: (r, t) for r, t in mutations if t != text}.values())
    return Gold(
        kind="science: formula",
        text=text,
        ways=ways,
        mutations=mutations,
        other=others[-1][0],
        in_words=True,
        reward="stem",
    )
