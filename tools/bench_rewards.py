"""Agreement of the math reward with labelled pairs beside plain math-verify, and pairs per second.

    python tools/bench_rewards.py [PAIRS] [--workers 1] [--deadline 3]

PAIRS has one JSON object per line: pred, gold, expected, kind. Both judges see every pair in a worker of the same pool,
under the same deadline. A pred or gold that has no box is read by `stated_answer`; plain math-verify reads the texts
itself. Prints one JSON object: by kind the number of pairs, agreement, false positives and negatives of each judge,
pairs that did not end in time, pairs per second and worker, and ours that disagree.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.reward import math as math_reward
from megatron_rl.reward.answers import stated_answer
from megatron_rl.reward.pool import REWARD_KINDS, RewardKind, RewardPool
from megatron_rl.reward.verdict import Verdict, make_verdict

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ROOT.parent / "shared" / "data" / "equiv_dev.jsonl"


def settle_nothing(text: str, _answer: str) -> str:
    return text


def judge_plainly(text: str, answer: str) -> Verdict:
    """math-verify as its README calls it."""
    from math_verify import parse, verify

    started = time.perf_counter()
    equal = verify(parse(answer, parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None)
    return make_verdict("correct" if equal else "wrong", time.perf_counter() - started)


REWARD_KINDS["plain math-verify"] = RewardKind(settle=settle_nothing, judge=judge_plainly, warm_up=math_reward.warm_up)


def as_response(pred: str) -> str:
    return f"\\boxed{{{stated_answer(pred)}}}"


def measured(
    kind: str,
    rows: list[dict[str, Any]],
    pair_of: Callable[[dict[str, Any]], tuple[str, str]],
    args: argparse.Namespace,
) -> tuple[list[Verdict], float]:
    """Verdicts, and seconds for all of them once the workers are warm."""
    with RewardPool(kind, workers=args.workers, timeout_seconds=args.deadline) as pool:
        pool.score([("\\boxed{\\sqrt{x}}", "\\sqrt{y}")] * 4 * args.workers)
        started = time.perf_counter()
        verdicts = pool.score(map(pair_of, rows))
        return verdicts, time.perf_counter() - started


def tally(rows: list[dict[str, Any]], verdicts: list[Verdict], seconds: float, workers: int) -> dict[str, Any]:
    wrong = [(row, v) for row, v in zip(rows, verdicts, strict=True) if bool(v.score) != row["expected"]]
    times = sorted(v.seconds for v in verdicts)
    return {
        "agreement": round(1 - len(wrong) / len(rows), 4),
        "false_positives": sum(not row["expected"] for row, _ in wrong),
        "false_negatives": sum(row["expected"] for row, _ in wrong),
        "over_deadline": sum(v.reason == "timeout" for v in verdicts),
        "errors": sum(v.reason == "error" for v in verdicts),
        "pairs_per_second_and_worker": round(len(rows) / seconds / workers, 1),
        "judge_milliseconds_p50": round(1000 * times[len(times) // 2], 3),
        "judge_milliseconds_max": round(1000 * times[-1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="?", type=Path, default=PAIRS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=3.0, help="seconds per pair")
    args = parser.parse_args()
    if not args.pairs.is_file():
        parser.error(f"{args.pairs} does not exist; give a file of labelled pairs")
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with args.pairs.open() as file:
        for row in map(json.loads, file):
            by_kind[row["kind"]].append(row)
    report: dict[str, Any] = {"pairs": str(args.pairs), "workers": args.workers, "deadline_seconds": args.deadline}
    for kind, rows in by_kind.items():
        ours = measured("math", rows, lambda row: (as_response(row["pred"]), row["gold"]), args)
        plain = measured("plain math-verify", rows, lambda row: (row["pred"], row["gold"]), args)
        report[kind] = {
            "num_pairs": len(rows),
            "ours": tally(rows, *ours, args.workers),
            "plain_math_verify": tally(rows, *plain, args.workers),
            "ours_disagrees": [
                {"pred": row["pred"][-120:], "gold": row["gold"][-120:], "expected": row["expected"]}
                for row, verdict in zip(rows, ours[0], strict=True)
                if bool(verdict.score) != row["expected"]
            ],
        }
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
