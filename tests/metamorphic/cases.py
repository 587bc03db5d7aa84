"""Cases for the judges of answers: each reference answer in 25 other ways, and 25 other answers that look like it.

    PYTHONPATH=.:tests python -m metamorphic.cases [--golds 500] [--seed 1] [--out runs/answers]

A way must be called correct, a mutation must not. The program writes the cases to OUT/cases.jsonl, which
tools/bench_rewards.py reads too, judges them, and writes a report by kind to OUT/report.txt.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from metamorphic import algebra, numbers, quantities, structures, words
from metamorphic.gold import Gold, Texts

from megatron_rl.reward.pool import RewardPool
from megatron_rl.reward.verdict import Verdict

KINDS: tuple[Callable[[random.Random], Gold], ...] = (
    numbers.integer,
    numbers.decimal,
    numbers.a_fraction,
    numbers.root,
    numbers.sum_with_root,
    numbers.multiple_of_pi,
    numbers.percentage,
    numbers.scientific,
    numbers.counted,
    numbers.logarithm,
    numbers.complex_number,
    structures.ordered_tuple,
    structures.a_set,
    structures.a_list,
    structures.interval,
    structures.matrix,
    structures.ratio,
    algebra.polynomial,
    algebra.formula,
    algebra.equation,
    quantities.angle,
    quantities.quantity,
    quantities.compound_quantity,
    quantities.science_number,
    quantities.science_count,
    quantities.science_quantity,
    quantities.science_compound_quantity,
    words.choice,
    words.words,
    words.chinese_words,
    words.science_choice,
    words.science_words,
    words.chemical_formula,
)
GOLDS = 500
CASES_EACH = 25
SEED = 1
# Of the 25, at most so many stand in a box as they were made; the others are dressed besides.
_BARE = 16
_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """pred: a response with its box. rule: how it was made from the gold answer. reward: the reward that judges it."""

    kind: str
    gold: str
    pred: str
    expected: bool
    rule: str
    reward: str


def make_cases(golds: int = GOLDS, seed: int = SEED) -> list[Case]:
    """`2 * CASES_EACH` of each of `golds` reference answers, which go through the kinds in turn. The same for a
    seed."""
    found: list[Case] = []
    seen: set[tuple[str, str]] = set()
    streams = [random.Random(f"{seed} {make.__name__}") for make in KINDS]
    for number in range(golds):
        make, rng = KINDS[number % len(KINDS)], streams[number % len(KINDS)]
        gold = next(gold for _ in range(1000) if ((gold := make(rng)).kind, gold.text) not in seen)
        seen.add((gold.kind, gold.text))
        found += _cases(gold, True, _ways(gold, rng), rng)
        found += _cases(gold, False, _mutations(gold, rng), rng)
    return found


def sample(cases: Sequence[Case], each: int, seed: int = SEED) -> list[Case]:
    """`each` of those to accept and of those to refuse, of every kind."""
    by_kind: dict[tuple[str, bool], list[Case]] = defaultdict(list)
    for case in cases:
        by_kind[case.kind, case.expected].append(case)
    rng = random.Random(seed)
    return [case for group in by_kind.values() for case in rng.sample(group, each)]


def _ways(gold: Gold, rng: random.Random) -> Texts:
    named = [("named", f"{gold.name} = {gold.text}")] if gold.name else []
    return [*gold.ways, *named]


def _mutations(gold: Gold, rng: random.Random) -> Texts:
    """Another answer besides the right one is none, in either order."""
    text, other = gold.text, gold.other
    pairs = [(text, other), (other, text)]
    guesses = [("two guesses, or", f"{a} \\text{{ or }} {b}") for a, b in pairs]
    guesses += [("two guesses, comma", f"{a}, {b}") for a, b in pairs]
    guesses += [("two guesses, brackets", f"{a} ({b})") for a, b in pairs]
    guesses += [("two guesses, plain or", f"{a} or {b}") for a, b in pairs]
    guesses += [
        ("two guesses, and", f"{text} \\text{{ and }} {other}"),
        ("two guesses, Chinese or", f"{text}或{other}"),
    ]
    return [*rng.sample(guesses, 4), *gold.mutations]


def _cases(gold: Gold, expected: bool, texts: Texts, rng: random.Random) -> list[Case]:
    """25 different responses; each rule once before any comes twice."""
    texts = list({text: rule for rule, text in reversed(texts)}.items())[::-1]
    pairs = _spread([(rule, text) for text, rule in texts if expected or text != gold.text], rng)
    bare = [(rule, f"\\boxed{{{text}}}") for rule, text in pairs[:_BARE]]
    found = {response: rule for rule, response in bare}
    place = 0
    while len(found) < CASES_EACH:
        rule, text = pairs[(len(pairs) - 1 - place) % len(pairs)]
        for dress, response in rng.sample(_dressed(text, gold), 1):
            found.setdefault(response, f"{rule}; {dress}")
        place += 1
        assert place < 1000, f"{gold.kind} {gold.text}: {len(pairs)} are too few to make {CASES_EACH} of"
    return [
        Case(kind=gold.kind, gold=gold.text, pred=response, expected=expected, rule=rule, reward=gold.reward)
        for response, rule in found.items()
    ]


def _spread(pairs: Texts, rng: random.Random) -> Texts:
    """Shuffled, with the first of each rule in front."""
    shuffled = rng.sample(pairs, len(pairs))
    seen: Counter[str] = Counter()
    ranked = []
    for rule, text in shuffled:
        ranked.append((seen[rule], (rule, text)))
        seen[rule] += 1
    return [pair for _, pair in sorted(ranked, key=lambda item: item[0])]


def _dressed(text: str, gold: Gold) -> Texts:
    """(rule, response): the same text in a box as people and models write it."""
    stops = [] if text.rstrip("} ").endswith((".", "。")) else [("full stop", "."), ("Chinese full stop", "。")]
    inside = [
        *((rule, text + stop) for rule, stop in stops),
        ("spaces", f" {text} "),
        ("dollars", f"${text}$"),
        ("Answer:", f"\\text{{Answer: }}{text}"),
        ("答案：", f"\\text{{答案：}}{text}"),
        ("Markdown", f"**{text}**"),
        ("colour", f"\\textcolor{{red}}{{{text}}}"),
        ("braces", f"{{{text}}}"),
    ]
    if not gold.in_words:
        inside += [("displaystyle", f"\\displaystyle {text}"), ("inline", f"\\({text}\\)")]
    box = f"\\boxed{{{text}}}"
    around = [
        ("a sentence", f"So the answer is ${box}$. I hope it is correct."),
        ("display", f"Hence\n\\[{box}\\]\n"),
        ("fbox", f"Hence \\fbox{{{text}}}"),
        ("a space before the brace", f"\\boxed {{{text}}}"),
        ("box in box", f"\\boxed{{{box}}}"),
        ("said twice", f"We get {box}. Let me check: yes.\n\n**Final answer:** {box}"),
        ("revised", f"\\boxed{{{gold.other}}}. Wait, that is wrong. It is {box}."),
        ("Chinese", f"因此答案是{box}。"),
    ]
    return [(rule, f"\\boxed{{{content}}}") for rule, content in inside] + around


def judge(cases: Sequence[Case], workers: int = 1, seconds: float = 20.0) -> list[Verdict]:
    verdicts: list[Verdict | None] = [None] * len(cases)
    for reward in sorted({case.reward for case in cases}):
        places = [n for n, case in enumerate(cases) if case.reward == reward]
        with RewardPool(reward, workers=workers, timeout_seconds=seconds) as pool:
            found = pool.score((cases[n].pred, cases[n].gold) for n in places)
        for place, verdict in zip(places, found, strict=True):
            verdicts[place] = verdict
    return [verdict for verdict in verdicts if verdict is not None]


def report(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> str:
    """By kind: what was lost and what was taken, by rule, with examples."""
    failed: dict[tuple[str, bool], list[Case]] = defaultdict(list)
    for case, verdict in zip(cases, verdicts, strict=True):
        if bool(verdict.score) != case.expected:
            failed[case.kind, case.expected].append(case)
    numbers = Counter((case.kind, case.expected) for case in cases)
    lines = [f"{'kind':32}{'lost':>16}{'taken':>16}"]
    for kind in dict.fromkeys(case.kind for case in cases):
        lost, taken = (f"{len(failed[kind, side])} of {numbers[kind, side]}" for side in (True, False))
        lines.append(f"{kind:32}{lost:>16}{taken:>16}")
    totals = [sum(len(failed[key]) for key in failed if key[1] is side) for side in (True, False)]
    lines.append(f"{'all':32}{totals[0]:>16}{totals[1]:>16}")
    for (kind, expected), wrong in failed.items():
        lines.append(f"\n{kind}: {'right answers lost' if expected else 'wrong answers taken'}")
        rules: dict[str, list[Case]] = defaultdict(list)
        for case in wrong:
            rules[case.rule].append(case)
        for rule, group in sorted(rules.items(), key=lambda item: -len(item[1])):
            shown = "   ".join(f"{case.pred!r} for {case.gold!r}" for case in group[:_EXAMPLES])
            lines.append(f"  {len(group):3} {rule}: {shown}")
    return "\n".join(lines) + "\n"


def write_cases(cases: Iterable[Case], path: Path) -> None:
    path.write_text("".join(json.dumps(asdict(case), ensure_ascii=False) + "\n" for case in cases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golds", type=int, default=GOLDS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path("runs/answers"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cases = make_cases(args.golds, args.seed)
    write_cases(cases, args.out / "cases.jsonl")
    text = report(cases, judge(cases))
    (args.out / "report.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
