"""Measure code rewards on real tasks: verdicts of right and wrong solutions, items/s, and what a sandbox costs.

    python tools/bench_sandbox.py DATA [--workers 2] [--humaneval FILE] [--mbpp FILE] [--taco FILE]

DATA is a JSONL of tasks (`prompt`, `tests`, `meta`). Solutions: for HumanEval and MBPP the reference solutions, where
the files of their authors are given (HumanEval.jsonl with `canonical_solution`, mbpp.jsonl with `code`); for tasks on
stdin a program with a table of the expected outputs, which goes through every test without solving anything, and as
`stdin_references` the programs of TACO's taco_generation_example.json (the first of each `output`). Wrong
solutions: a function that returns None, and the table with its last entry changed. Each worker is a process that
judges one item at a time. Prints one JSON object; `right` and `wrong` count verdicts by reason.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from megatron_rl.reward.code import CodeSettings, judge_response, warm_up
from megatron_rl.reward.sandbox import Limits, Sandbox

Item = tuple[str, str, str]  # name, response, answer


def fenced(source: str) -> str:
    return f"```python\n{source}\n```"


def solutions(path: Path | None, code: str) -> dict[str, str]:
    if path is None:
        return {}
    return {str(row["task_id"]): row[code] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def items(
    rows: list[dict[str, Any]], humaneval: dict[str, str], mbpp: dict[str, str], taco: dict[str, str]
) -> dict[str, list[list[Item]]]:
    """Return, by kind, right items and wrong items."""
    kinds = ("humaneval", "asserts", "stdin_stdout", "stdin_references")
    found: dict[str, list[list[Item]]] = {kind: [[], []] for kind in kinds}
    for row in rows:
        tests, name = row["tests"], str(row["meta"].get("task_id", ""))
        if row["meta"].get("set", "").startswith("TACO") and name in taco:
            right, wrong = taco[name], "import sys\nprint(len(sys.stdin.read()), 'no')"
            for place, program in zip(found["stdin_references"], (right, wrong), strict=True):
                place.append((name, fenced(program), json.dumps(tests)))
        if tests["type"] == "humaneval" and name in humaneval:
            tests = {**tests, "prefix": row["prompt"]}
            right, wrong = humaneval[name], f"def {tests['entry_point']}(*_): return None"
        elif tests["type"] == "asserts" and name in mbpp:
            right = mbpp[name]
            # Every function of the solution stays, and gives up.
            wrong = right + "\nfor _name, _value in list(globals().items()):\n"
            wrong += "    if callable(_value): globals()[_name] = lambda *_: None\n"
        elif tests["type"] == "stdin_stdout" and len({case["input"] for case in tests["cases"]}) == len(tests["cases"]):
            table = {case["input"]: case["output"] for case in tests["cases"]}
            source = "import sys\nprint({!r}[sys.stdin.read()])"
            right = source.format(table)
            wrong = source.format({**table, tests["cases"][-1]["input"]: tests["cases"][-1]["output"] + "?"})
        else:
            continue
        for place, program in zip(found[tests["type"]], (right, wrong), strict=True):
            place.append((name, fenced(program), json.dumps(tests)))
    return found


def judge(item: Item) -> tuple[str, str, str, float]:
    name, response, answer = item
    judgement = judge_response(response, answer, CodeSettings(seconds=30.0))
    return name, judgement.reason, judgement.details, judgement.seconds


def measure(pool: ProcessPoolExecutor, batch: list[Item], expected: str) -> dict[str, Any]:
    started = time.perf_counter()
    results = list(pool.map(judge, batch))
    seconds = time.perf_counter() - started
    return {
        "items": len(batch),
        "reasons": dict(Counter(reason for _, reason, _, _ in results)),
        "items_per_second": round(len(batch) / seconds, 1),
        "median_ms": round(1000 * statistics.median(s for *_, s in results), 1),
        "unexpected": [f"{name}: {reason}: {details}" for name, reason, details, _ in results if reason != expected],
    }


def latency(runs: int) -> dict[str, float]:
    """Return the median ms of `print(1)` by the same interpreter with and without the sandbox."""
    box = Sandbox()
    plain = [box.python, "-I", "-S", "-c", "print(1)"]
    work: dict[str, Callable[[], object]] = {
        "plain_ms": lambda: subprocess.run(plain, capture_output=True, check=True),
        "sandbox_ms": lambda: box.run_python("print(1)", b"", Limits()),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(runs):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: round(1000 * statistics.median(values), 1) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--workers", type=int, default=2, help="processes that judge (default: 2)")
    parser.add_argument("--humaneval", type=Path, metavar="FILE", help="HumanEval.jsonl of openai/human-eval")
    parser.add_argument("--mbpp", type=Path, metavar="FILE", help="mbpp.jsonl of google-research")
    parser.add_argument("--taco", type=Path, metavar="FILE", help="taco_generation_example.json of FlagOpen/TACO")
    parser.add_argument("--runs", type=int, default=100, help="runs for the latency (default: 100)")
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        parser.error(f"{arguments.data} does not exist; give a JSONL file of code tasks")
    warm_up(CodeSettings(seconds=30.0))
    rows = list(map(json.loads, arguments.data.read_text(encoding="utf-8").splitlines()))
    taco = json.loads(arguments.taco.read_text(encoding="utf-8")) if arguments.taco else []
    found = items(
        rows,
        solutions(arguments.humaneval, "canonical_solution"),
        solutions(arguments.mbpp, "code"),
        {str(row["task_id"]): row["output"][0] for row in taco},
    )
    result: dict[str, Any] = {
        "data": str(arguments.data),
        "workers": arguments.workers,
        "seccomp": Sandbox().has_seccomp,
        **latency(arguments.runs),
    }
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("forkserver"), warm_up) as pool:
        for kind, (right, wrong) in found.items():
            if right:
                result[kind] = {"right": measure(pool, right, "correct"), "wrong": measure(pool, wrong, "wrong")}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
