"""Compare the math and stem rewards with math-verify on labelled pairs: false positives and negatives, pairs per
second.

    python tools/bench_rewards.py [PAIRS ...] [--unseen PAIRS ...] [--workers 1] [--deadline 3] [--examples 20]

PAIRS has one JSON object per line: pred (null where there is none), gold, expected; optionally kind and reward ("math"
unless it says "stem"). Both judges get the answer in the same box, and math-verify the gold answer in one too; it
reads with its own default extraction, which is what its README calls. Both see a file one after the other, in workers
of the same pool, under the same deadline. Prints one JSON object, by file and kind; `in_sample` says whether rules were
made beside these pairs. Pairs given as `--unseen` were not looked at.
"""

import argparse
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.reward import math as math_reward
from megatron_rl.reward.answers import stated_answer
from megatron_rl.reward.pool import RewardKind, RewardPool
from megatron_rl.reward.verdict import Verdict, make_verdict

ROOT = Path(__file__).resolve().parents[1]
PAIRS = sorted((ROOT / "tests" / "answer_pairs").glob("*.jsonl"))
# The rules were made while somebody looked at these rows. True: a prediction may be a whole text, whose answer is
# looked for; False: it is what stands in the box.
IN_SAMPLE = {"equiv_dev.jsonl": True, "answers2_dev.jsonl": False} | {path.name: False for path in PAIRS}
_BOX = re.compile(r"\\boxed\s*[{\d]|\\fbox\s*\{")
_DELIMITED = re.compile(r"\s*(?:\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\])\s*", re.DOTALL)
Row = dict[str, Any]


def settle_nothing(text: str, _gold: str) -> str:
    return text


def judge_by_math_verify(text: str, gold: str) -> Verdict:
    from math_verify import parse, verify

    started = time.perf_counter()
    equal = verify(parse(boxed(gold), parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None)
    return make_verdict("correct" if equal else "wrong", time.perf_counter() - started)


MATH_VERIFY = RewardKind(
    settle=settle_nothing,
    judge=judge_by_math_verify,
    warm_up=math_reward.warm_up,
    preload="megatron_rl.reward.preload_math",
)


def boxed(answer: str) -> str:
    """Put an answer in a box, unless it has one. The delimiters of a formula, which have no place in a box, are left
    out."""
    if _BOX.search(answer):
        return answer
    delimited = _DELIMITED.fullmatch(answer)
    return f"\\boxed{{{next(filter(None, delimited.groups())) if delimited else answer}}}"


def response(row: Row, is_text: bool) -> str:
    """Return what both judges read: the prediction in a box; empty where there is none."""
    pred = row["pred"]
    if pred is None:
        return ""
    return boxed(stated_answer(pred) if is_text else pred)


def gold_of(row: Row) -> str:
    """Return the gold answer. A list of answers stays JSON, as data sets have it."""
    gold = row["gold"]
    return gold if isinstance(gold, str) else json.dumps(gold)


def kind_of(row: Row) -> str:
    plain = row.get("kind") or row.get("reward", "math")
    return f"{plain}, definite" if row.get("definite") else plain


def judged(
    rows: Sequence[Row], reward: str, judge: RewardKind | None, is_text: bool, args: argparse.Namespace
) -> tuple[list[Verdict], float]:
    """Return the verdicts, and the seconds for all of them once the workers are warm."""
    with RewardPool(reward, workers=args.workers, timeout_seconds=args.deadline, judge=judge) as pool:
        pool.score([("\\boxed{\\sqrt{x}}", "\\sqrt{y}")] * 4 * args.workers)
        started = time.perf_counter()
        verdicts = pool.score((response(row, is_text), gold_of(row)) for row in rows)
        return verdicts, time.perf_counter() - started


def agreement(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Row:
    wrong = Counter(row["expected"] for row, v in zip(rows, verdicts, strict=True) if bool(v.score) != row["expected"])
    return {
        "agreement": round(1 - wrong.total() / len(rows), 4),
        "false_positives": wrong[False],
        "false_negatives": wrong[True],
    }


def speed(verdicts: Sequence[Verdict], seconds: float, workers: int) -> Row:
    times = sorted(verdict.seconds for verdict in verdicts)
    return {
        "pairs_per_second_and_worker": round(len(verdicts) / seconds / workers, 1),
        "judge_milliseconds_p50": round(1000 * times[len(times) // 2], 3),
        "judge_milliseconds_max": round(1000 * times[-1], 1),
        "over_deadline": sum(verdict.reason == "timeout" for verdict in verdicts),
        "errors": sum(verdict.reason == "error" for verdict in verdicts),
    }


def compared(path: Path, in_sample: bool | None, args: argparse.Namespace) -> Row:
    """Compare the judges on one file. in_sample: None where nobody said."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    is_text = IN_SAMPLE.get(path.name, False)
    report: Row = {
        "pairs": str(path),
        "in_sample": {True: "yes", False: "no", None: "not said"}[in_sample],
        "num_pairs": len(rows),
        "num_null_predictions": sum(row["pred"] is None for row in rows),
        "rewards": {},
        "kinds": {},
    }
    by_kind: dict[str, list[tuple[Row, Verdict, Verdict]]] = defaultdict(list)
    for reward in sorted({row.get("reward", "math") for row in rows}):
        part = [row for row in rows if row.get("reward", "math") == reward]
        ours, seconds = judged(part, reward, None, is_text, args)
        theirs, their_seconds = judged(part, "math-verify", MATH_VERIFY, is_text, args)
        report["rewards"][reward] = {
            "num_pairs": len(part),
            "ours": agreement(part, ours) | speed(ours, seconds, args.workers),
            "math_verify": agreement(part, theirs) | speed(theirs, their_seconds, args.workers),
        }
        for row, own, other in zip(part, ours, theirs, strict=True):
            by_kind[kind_of(row)].append((row, own, other))
    for kind, judged_rows in by_kind.items():
        part = [row for row, _, _ in judged_rows]
        mine, others = [v for _, v, _ in judged_rows], [v for _, _, v in judged_rows]
        report["kinds"][kind] = {
            "num_pairs": len(part),
            "num_expected_correct": sum(row["expected"] for row in part),
            "ours": agreement(part, mine),
            "math_verify": agreement(part, others),
            "ours_disagrees": examples(part, mine, args.examples),
        }
    return report


def examples(rows: Sequence[Row], verdicts: Sequence[Verdict], most: int) -> list[Row]:
    wrong = [row for row, v in zip(rows, verdicts, strict=True) if bool(v.score) != row["expected"]]
    return [
        {
            "pred": None if row["pred"] is None else row["pred"][-120:],
            "gold": gold_of(row)[-120:],
            "expected": row["expected"],
        }
        for row in wrong[:most]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", type=Path, help="default: tests/answer_pairs")
    parser.add_argument("--unseen", nargs="+", type=Path, default=[], help="pairs that nobody made a rule beside")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=3.0, help="seconds per pair")
    parser.add_argument("--examples", type=int, default=20, help="of each kind at most so many pairs are shown")
    parser.add_argument("--out", type=Path, help="write there, not to the standard output")
    args = parser.parse_args()
    files = args.pairs or ([] if args.unseen else PAIRS)
    for path in args.unseen:
        if path.name in IN_SAMPLE:
            parser.error(f"rules were made beside {path}; it cannot be unseen")
    for path in [*files, *args.unseen]:
        if not path.is_file():
            parser.error(f"{path} does not exist; give a file of labelled pairs")
    found = [compared(path, True if path.name in IN_SAMPLE else None, args) for path in files]
    found += [compared(path, False, args) for path in args.unseen]
    text = json.dumps(
        {"workers": args.workers, "deadline_seconds": args.deadline, "files": found}, indent=2, ensure_ascii=False
    )
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
