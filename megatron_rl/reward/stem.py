"""Rewards for questions of science: numbers with tolerance and units, short text, true or false, letters of choices.

The last box is the answer here too. Letters of choices (`choice_verdict`) are for evaluation: a guess is right too
often to learn from.
"""

import re
import time

from megatron_rl.reward.answers import boxed_answer
from megatron_rl.reward.latex import clean, without_text_marks
from megatron_rl.reward.limits import excess
from megatron_rl.reward.number import Number, read_number
from megatron_rl.reward.symbolic import real_value
from megatron_rl.reward.units import canonical_unit, same_unit, split_unit
from megatron_rl.reward.verdict import Verdict, make_verdict

# SciBench's (Wang et al. 2023, section 4): its answers are rounded in between, each its own way.
RELATIVE_TOLERANCE = 0.05
# Smaller whole numbers count something, and are met exactly.
MAX_COUNT = 100
_ZERO = 1e-9
_TRUTH = {"true": True, "yes": True, "correct": True, "false": False, "no": False, "incorrect": False}
# Units of one dimension, as multiples of its first.
_SCALES = (
    {"m": 1.0, "nm": 1e-9, "mm": 1e-3, "cm": 1e-2, "km": 1e3},
    {"g": 1.0, "mg": 1e-3, "kg": 1e3},
    {"s": 1.0, "min": 60.0, "h": 3600.0, "day": 86400.0},
    {"J": 1.0, "kJ": 1e3, "eV": 1.602176634e-19, "MeV": 1.602176634e-13},
    {"Pa": 1.0, "kPa": 1e3, "atm": 101325.0},
    {"L": 1.0, "mL": 1e-3},
    {"Hz": 1.0, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9},
)
_CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*\)?(?:[.:)].*)?", re.DOTALL)
# 10 tons, 1,440,000 yuan: a word that is no known unit still says of what.
_COUNTED = re.compile(r"([-+]?[\d.,]*\d) [A-Za-z]{2,}")
_LABELLED = re.compile(r"\(?([A-J])[).:]\s+(.+)", re.DOTALL)


def choice_verdict(response_text: str, answer: str) -> Verdict:
    """The letter of the last box is the letter `answer`. For evaluation only."""
    boxed = boxed_answer(response_text)
    if boxed is None:
        return make_verdict("no_answer")
    right = choice_letter(answer)
    if right is None:
        return make_verdict("error", details=f"the reference answer {answer!r:.80} is no letter of a choice")
    return make_verdict("correct" if choice_letter(boxed) == right else "wrong")


def choice_letter(answer: str) -> str | None:
    """B of "(b)", "B. Paris" and "\\text{B}"; None where the answer is no letter of a choice."""
    match = _CHOICE.fullmatch(without_text_marks(clean(answer)).strip())
    return match[1].upper() if match else None


def settle_stem(response_text: str, answer: str) -> Verdict | str:
    """The verdict, or the box whose value a worker has to compute."""
    boxed = boxed_answer(response_text)
    if boxed is None:
        return make_verdict("no_answer")
    boxed = boxed.strip()
    too_much = excess(boxed) if boxed else "nothing in it"
    if too_much:
        return make_verdict("wrong", details=f"the answer has {too_much}")
    said, gold = _plain(boxed), _plain(answer)
    if _truth(gold) is not None:
        return _as_verdict(_truth(said) == _truth(gold))
    if _elements(gold):
        golds, found = _elements(gold), _elements(said) or said.split(",")
        same = len(golds) == len(found) and all(map(_same_number, golds, found))
        return _as_verdict(same)
    if _number(gold) is None:
        return _as_verdict(bool(_phrases(gold) & _phrases(said)))
    if not same_unit(gold, said) and _scale(gold, said) is None:
        return make_verdict("wrong", details="another unit")
    if _number(said) is not None:
        return _as_verdict(_same_number(gold, said))
    if ":" in said:  # a ratio, which a parser takes for a division
        return make_verdict("wrong")
    return boxed if re.search(r"\d|\\pi|(?<![a-zA-Z])e(?![a-zA-Z])", said) else make_verdict("wrong")


def judge_value(boxed: str, answer: str) -> Verdict:
    """Is the value of the expression `boxed` the number `answer`? Only for pool workers."""
    started = time.perf_counter()
    said, gold = _plain(boxed), _plain(answer)
    value = real_value(split_unit(said)[0].rpartition("=")[2])
    number = _number(gold)
    assert number is not None, "settle_stem leaves only numbers to the worker"
    close = value is not None and _close(number, value * (_scale(gold, said) or 1.0), is_whole=False)
    return make_verdict("correct" if close else "wrong", time.perf_counter() - started)


def _plain(text: str) -> str:
    """Cleaned, and without `\\text` where that is around everything."""
    text = clean(text)
    return without_text_marks(text).strip() if re.fullmatch(r"\\text\s*\{[^{}]*\}", text) else text


def _as_verdict(same: bool) -> Verdict:
    return make_verdict("correct" if same else "wrong")


def _truth(text: str) -> bool | None:
    return _TRUTH.get(without_text_marks(text).strip().lower())


def _elements(text: str) -> list[str]:
    """Of a list of numbers, such as [1, 1, 1, 1]; empty for anything else."""
    if text[:1] + text[-1:] not in ("[]", "()"):
        return []
    parts = text[1:-1].split(",")
    return parts if len(parts) > 1 and all(_number(part) is not None for part in parts) else []


def _number(text: str) -> Number | None:
    value = split_unit(text.strip())[0].rpartition("=")[2].rpartition("\\approx")[2]
    counted = _COUNTED.fullmatch(value.strip())
    return read_number(text) or read_number(counted[1] if counted else value.strip())


def _same_number(gold: str, said: str) -> bool:
    numbers = _number(gold), _number(said)
    if numbers[0] is None or numbers[1] is None:
        return False
    scale = _scale(gold, said)
    whole = numbers[1].value.denominator == 1 and scale in (None, 1.0)
    value = float(numbers[1].value) * (scale or 1.0)
    if numbers[1].is_percent != numbers[0].is_percent and _close(numbers[0], _percent_apart(numbers[1], value), whole):
        return True
    return _close(numbers[0], value, whole)


def _percent_apart(said: Number, value: float) -> float:
    return value / 100 if said.is_percent else value * 100


def _close(gold: Number, value: float, is_whole: bool) -> bool:
    """Within the tolerance; whole numbers that count something exactly."""
    expected = float(gold.value)
    if gold.value.denominator == 1 and abs(expected) < MAX_COUNT and is_whole:
        return expected == value
    return abs(value - expected) <= max(RELATIVE_TOLERANCE * abs(expected), _ZERO if expected == 0 else 0.0)


def _scale(gold: str, said: str) -> float | None:
    """By what a value in the unit of `said` is multiplied to be in that of `gold`; None where that is unknown."""
    units = canonical_unit(split_unit(gold)[1]), canonical_unit(split_unit(said)[1])
    for scales in _SCALES:
        if units[0] in scales and units[1] in scales:
            return scales[units[1]] / scales[units[0]]
    return None


def _phrases(text: str) -> set[str]:
    """What an answer in words may be said as: with its letter or without, with what it has in brackets or without."""
    text = without_text_marks(text)
    labelled = _LABELLED.fullmatch(text)
    forms = [text] + ([labelled[1], labelled[2]] if labelled else [])
    for form in tuple(forms):
        bracket = re.fullmatch(r"(.+?)\s*\(([^()]+)\)", form)
        if bracket:
            forms += [bracket[1], bracket[2]]
    return {plain for plain in map(_plain_words, forms) if plain}


def _plain_words(text: str) -> str:
    words = re.sub(r"[^\w.:/%+]+", " ", text.lower()).strip(" .").split()
    return re.sub(r"\s*:\s*", ":", " ".join(word for word in words if word not in ("a", "an", "the")) or text.lower())
