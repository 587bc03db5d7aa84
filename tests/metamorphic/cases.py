"""Makes cases for the judges: each reference answer in 25 other ways, and 25 other answers that look like it.

    PYTHONPATH=.:tests python -m metamorphic.cases [--golds 500] [--seed 1] [--out runs/answers] [--write-known]

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
    numbers.scaled,
    numbers.of_degrees,
    structures.ordered_tuple,
    structures.a_set,
    structures.a_list,
    structures.interval,
    structures.matrix,
    structures.ratio,
    structures.unit_vectors,
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
# The known failures of the judges: rows of [kind, "lost" or "taken", rule, number of cases].
KNOWN = Path(__file__).parent / "known.json"
GOLDS = 500
CASES_EACH = 25
SEED = 1
# At most so many of the 25 stand in a plain box. The others get more text around them.
_BARE = 16
_EXAMPLES = 3
LOST, TAKEN = "lost", "taken"
Failure = tuple[str, str, str]  # kind, LOST or TAKEN, rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Holds one response and whether it must be called correct.

    pred: the response, with its box. rule: how what stands in the box was made from the gold answer. dress: what was
    done to it besides, "" for nothing. reward: the kind of reward that judges it.
    """

    kind: str
    gold: str
    pred: str
    expected: bool
    rule: str
    dress: str
    reward: str


def make_cases(golds: int = GOLDS, seed: int = SEED) -> list[Case]:
    """Return `2 * CASES_EACH` cases for each of `golds` reference answers, whose kinds take turns.

    The same seed gives the same cases.
    """
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
    """Draw `each` cases to accept and `each` to refuse, of every kind."""
    by_kind: dict[tuple[str, bool], list[Case]] = defaultdict(list)
    for case in cases:
        by_kind[case.kind, case.expected].append(case)
    rng = random.Random(seed)
    return [case for group in by_kind.values() for case in rng.sample(group, each)]


def _ways(gold: Gold, rng: random.Random) -> Texts:
    named = [("named", f"{gold.name} = {gold.text}")] if gold.name else []
    return [*gold.ways, *named]


def _mutations(gold: Gold, rng: random.Random) -> Texts:
    """Return wrong texts: mutations of the answer, and guesses that name another answer besides it, in either order."""
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
    """Return 25 cases with different responses. Each rule comes once before any comes twice."""
    first_rule: dict[str, str] = {}
    for rule, text in texts:
        if expected or text != gold.text:
            first_rule.setdefault(text, rule)
    pairs = _spread([(rule, text) for text, rule in first_rule.items()], rng)
    found = {f"\\boxed{{{text}}}": (rule, "") for rule, text in pairs[:_BARE]}
    for _ in range(1000):
        if len(found) == CASES_EACH:
            break
        rule, text = rng.choice(pairs)
        dress, response = rng.choice(_dressed(text, gold))
        found.setdefault(response, (rule, dress))
    assert len(found) == CASES_EACH, f"{gold.kind} {gold.text}: {len(pairs)} texts are too few"
    return [
        Case(kind=gold.kind, gold=gold.text, pred=pred, expected=expected, rule=rule, dress=dress, reward=gold.reward)
        for pred, (rule, dress) in found.items()
    ]


def _spread(pairs: Texts, rng: random.Random) -> Texts:
    """Return the pairs shuffled, with the first of each rule in front."""
    shuffled = rng.sample(pairs, len(pairs))
    seen: Counter[str] = Counter()
    ranked = []
    for rule, text in shuffled:
        ranked.append((seen[rule], (rule, text)))
        seen[rule] += 1
    return [pair for _, pair in sorted(ranked, key=lambda item: item[0])]


def _dressed(text: str, gold: Gold) -> Texts:
    """Return (rule, response) for the text in a box, as people and models write it."""
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
    if len(text) == 1 and text in "0123456789":
        around.append(("a box without braces", f"\\boxed {text}"))
    return [(rule, f"\\boxed{{{content}}}") for rule, content in inside] + around


def judge(cases: Sequence[Case], workers: int = 1, seconds: float = 240.0) -> list[Verdict]:
    verdicts: list[Verdict | None] = [None] * len(cases)
    for reward in sorted({case.reward for case in cases}):
        places = [n for n, case in enumerate(cases) if case.reward == reward]
        with RewardPool(reward, workers=workers, timeout_seconds=seconds) as pool:
            found = pool.score((cases[n].pred, cases[n].gold) for n in places)
        for place, verdict in zip(places, found, strict=True):
            verdicts[place] = verdict
    return [verdict for verdict in verdicts if verdict is not None]


def failures(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> Counter[Failure]:
    """Return the number of wrong verdicts for each kind, side and rule."""
    return Counter(
        (case.kind, LOST if case.expected else TAKEN, case.rule)
        for case, verdict in zip(cases, verdicts, strict=True)
        if bool(verdict.score) != case.expected
    )


def known_failures() -> Counter[Failure]:
    return Counter({(kind, side, rule): number for kind, side, rule, number in json.loads(KNOWN.read_text())})


def write_known(found: Counter[Failure]) -> None:
    """Write the known failures, one a line, so that a change of the judges shows in a diff."""
    lines = [json.dumps([*failure, number], ensure_ascii=False) for failure, number in sorted(found.items())]
    KNOWN.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def report(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> str:
    """Return a table of right answers lost and wrong ones taken, by kind; then the failures by rule, with examples."""
    wrong = [case for case, verdict in zip(cases, verdicts, strict=True) if bool(verdict.score) != case.expected]
    sides = {True: LOST, False: TAKEN}
    all_of, wrong_of = (Counter((case.kind, case.expected) for case in group) for group in (cases, wrong))
    kinds = list(dict.fromkeys(case.kind for case in cases))
    lines = [f"{'kind':32}{LOST:>16}{TAKEN:>16}"]
    for kind in kinds:
        cells = (f"{wrong_of[kind, side]} of {all_of[kind, side]}" for side in sides)
        lines.append(f"{kind:32}" + "".join(f"{cell:>16}" for cell in cells))
    dresses = Counter(case.dress for case in wrong)
    of_dresses = Counter(case.dress for case in cases)
    totals = (sum(wrong_of[kind, side] for kind in kinds) for side in sides)
    lines.append(f"{'all':32}" + "".join(f"{total:>16}" for total in totals))
    lines += [f"{dresses[dress]:4} of {of_dresses[dress]:5} {dress or 'bare'}" for dress in sorted(of_dresses)]
    groups: dict[Failure, list[Case]] = defaultdict(list)
    for case in wrong:
        groups[case.kind, sides[case.expected], case.rule].append(case)
    for (kind, side, rule), group in sorted(groups.items()):
        shown = "   ".join(f"{case.pred!r} for {case.gold!r}" for case in group[:_EXAMPLES])
        lines.append(f"{side:6} {len(group):4} {kind}; {rule}: {shown}")
    return "\n".join(lines) + "\n"


def write_cases(cases: Iterable[Case], path: Path) -> None:
    path.write_text("".join(json.dumps(asdict(case), ensure_ascii=False) + "\n" for case in cases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golds", type=int, default=GOLDS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path("runs/answers"))
    parser.add_argument("--write-known", action="store_true", help=f"write what failed to {KNOWN.name}")
    args = parser.parse_args()
    if args.write_known and (args.golds, args.seed) != (GOLDS, SEED):
        parser.error("--write-known takes the default golds and seed: the tests judge those")
    args.out.mkdir(parents=True, exist_ok=True)
    cases = make_cases(args.golds, args.seed)
    write_cases(cases, args.out / "cases.jsonl")
    verdicts = judge(cases)
    text = report(cases, verdicts)
    (args.out / "report.txt").write_text(text)
    if args.write_known:
        write_known(failures(cases, verdicts))
    print(text)


if __name__ == "__main__":
    main()
