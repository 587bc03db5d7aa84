"""Measure the curation of generated rows with planted duplicates, contamination and defects: what is found, rows/s,
memory.

    python tools/bench_curation.py [--rows 1000000] [--workers 2] [--seed 1] [--folder DIR]

The id of a generated row says what must become of it: `keep:17`, `near_duplicate:17` and so on. The similarity of a
planted near-duplicate is computed here, by plain sets of word triples. Rows to keep include what is easily dropped by
mistake: the same text with another number, with another answer, or less similar than the threshold, and endings that
benchmark rows have too. Prints one JSON object: by reason the number planted and found, recall, the share of rows to
keep that were dropped, rows/s, rows per second of CPU time, and the peak of resident anonymous memory; all processes
together.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
THRESHOLD = 0.8
NUM_BENCHMARK_ROWS = 1000
WAITING_ROWS = 20_000  # rows that may still get a duplicate

# The share of rows planted of each sort. A name up to its slash is the reason that must be given.
SHARES = {
    "duplicate": 0.02,
    "near_duplicate": 0.03,
    "conflicting_answers": 0.002,
    "contamination/same": 0.004,
    "contamination/inside": 0.004,
    "contamination/most": 0.002,
    "keep/other_number": 0.01,
    "keep/other_answer": 0.005,
    "keep/less_similar": 0.01,
    "malformed": 0.002,
    "missing_prompt": 0.002,
    "missing_answer": 0.004,
    "invalid_characters": 0.005,
    "image": 0.005,
    "multiple_choice": 0.005,
    "multi_part": 0.005,
    "true_or_false": 0.005,
}
ENDINGS = (
    "Find the remainder when the result is divided by {}.",
    "The answer can be written as m/n, where m and n are relatively prime positive integers. Find m + {}n.",
    "How many are left after {} days?",
    "Give your answer correct to {} decimal places.",
    "What is the total after {} steps?",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    prompt: str
    answer: str


class Generator:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "ir", "os", "um")]
        self.words = sorted({"".join(self.rng.choices(syllables, k=self.rng.randint(2, 4))) for _ in range(40_000)})
        self.rng.shuffle(self.words)
        self.weights = list(accumulate(1 / (rank + 20) for rank in range(len(self.words))))  # Zipf's law

    def new_row(self) -> Row:
        count = self.rng.randint(20, 110)
        words = self.rng.choices(self.words, cum_weights=self.weights, k=count)
        for position in range(0, count, 9):
            words[position] = str(self.rng.randint(2, 9999))
        for end in range(11, count, 12):
            words[end] += self.rng.choice(".,;")
        words += self.rng.choice(ENDINGS).format(self.rng.randint(2, 999)).split()
        return Row(prompt=" ".join(words), answer=str(self.rng.randint(-999, 99999)))

    def disguised(self, row: Row) -> Row:
        """Return a text that is the same to a reader: case, spaces, quotation marks and prose punctuation differ."""
        words = row.prompt.split(" ")
        for position in self.rng.sample(range(len(words) - 8), 3):
            change: Callable[[str], str] = self.rng.choice([str.upper, str.title, "“{}”".format, "{},".format])
            words[position] = change(words[position]) if words[position].isalpha() else words[position]
        gaps = self.rng.choices([" ", " ", "  ", "\n", " \u00a0"], k=len(words))
        return replace(row, prompt="".join(map("".join, zip(words, gaps, strict=True))).strip(" .?\n\u00a0"))

    def edited(self, row: Row, low: float, high: float) -> Row | None:
        """Replace, add or leave out words until the similarity is in [low, high); None if it jumped over that."""
        words = row.prompt.split(" ")
        while True:
            position = self.rng.randrange(len(words) - 12)
            if words[position].isalpha():
                word = self.rng.choice(self.words)
                words[position : position + 1] = self.rng.choice([[word], [words[position], word], []])
                similarity = jaccard(row.prompt, " ".join(words))
                if similarity < high:
                    return replace(row, prompt=" ".join(words)) if similarity >= low else None

    def other_number(self, row: Row) -> Row:
        words = row.prompt.split(" ")
        position = self.rng.choice([at for at, word in enumerate(words) if word.isdigit()])
        words[position] = str(int(words[position]) + self.rng.randint(1, 9))
        return Row(prompt=" ".join(words), answer=row.answer)

    def defective(self, kind: str, row: Row) -> dict[str, Any]:
        """Return the fields of a row with this defect."""
        text, pick = row.prompt, self.rng.choice
        half = text.index(" ", len(text) // 2)
        fields = {"prompt": text, "answer": row.answer}
        if kind == "malformed":
            return pick([{"prompt": text}, {"answer": row.answer}, {"prompt": {"text": text}, "answer": "1"}])
        if kind == "missing_prompt":
            return fields | {"prompt": pick(["", " \n", None])}
        if kind == "missing_answer":
            return fields | {"answer": pick([None, "", " ", "N/A", "?", "$$"])}
        if kind == "true_or_false":
            return fields | {"answer": pick(["True", "no", "Yes.", "\\text{False}", "**yes**"])}
        if kind == "invalid_characters":
            bad = pick(["\ufffd", "\ue001", "\x07", "\ud800", "â€™", "Ã©", "\x9d"])
            return fields | {"prompt": text[:half] + bad + text[half:]}
        if kind == "image":
            there = pick([" ![](a.png) ", " <img src='x'> ", " \\includegraphics{f} ", " As shown in the figure, "])
            return fields | {"prompt": text[:half] + there + text[half:]}
        if kind == "multiple_choice":
            values = self.rng.sample(range(1000), 4)
            form = pick(["\n({}) {}", "\n{}. {}", " ({}) {}", "\n{}) {}", " \\textbf{{({})}} {}"])
            options = "".join(form.format(label, value) for label, value in zip("ABCD", values, strict=True))
            return fields | {"prompt": text + options, "answer": pick(["B", "(C)", str(values[0])])}
        assert kind == "multi_part"
        form = pick(["\n({}) Find it{}", " ({}) What is it{}?", "\n{}. Compute it{}.", "\nPart {}: Determine it{}."])
        labels = "12" if form.startswith("\n{}") else "ab"
        return fields | {"prompt": text + "".join(form.format(label, f" {label}") for label in labels)}


def jaccard(one: str, other: str) -> float:
    a, b = ({*zip(w, w[1:], w[2:], strict=False)} for w in (re.findall(r"\w+|[/+]", t.lower()) for t in (one, other)))
    return len(a & b) / len(a | b)


def generated(make: Generator, benchmark: list[Row], num_rows: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (what the row is planted as, its fields). Every row to be copied is a copy's original once."""
    kinds, weights = list(SHARES), list(SHARES.values())
    waiting: list[Row] = []
    for _ in range(num_rows):
        kind = make.rng.choices([*kinds, "keep"], [*weights, 1 - sum(weights)])[0]
        name, _, how = kind.partition("/")
        if kind == "keep" or len(waiting) < 10:
            row = make.new_row()
            waiting.append(row)
            yield "keep", vars_of(row)
        elif name == "contamination":
            row = make.rng.choice(benchmark)
            words = row.prompt.split(" ")
            if how == "inside":
                row = replace(row, prompt=f"{make.new_row().prompt[:80]} {row.prompt}")
            elif how == "most":
                row = replace(row, prompt=" ".join(words[: len(words) * 3 // 4]) + make.new_row().prompt[:20])
            yield name, vars_of(make.disguised(row) if how == "same" else row)
        elif name in ("duplicate", "near_duplicate", "conflicting_answers") or how:
            original = waiting.pop(make.rng.randrange(len(waiting)))
            yield name, vars_of(copied(make, name, how, original))
        else:
            yield name, make.defective(name, make.new_row())
        if len(waiting) > WAITING_ROWS:
            waiting.pop(make.rng.randrange(len(waiting)))


def copied(make: Generator, name: str, how: str, original: Row) -> Row:
    if name == "duplicate":
        return make.disguised(original)
    if name == "conflicting_answers":
        return replace(make.disguised(original), answer=original.answer + "1")
    if how == "other_number":
        return make.other_number(original)
    low, high = (0.4, THRESHOLD - 0.02) if how == "less_similar" else (THRESHOLD, 1.0)
    row = None
    while row is None:
        row = make.edited(original, low, high)
    return replace(row, answer=original.answer + "1") if how == "other_answer" else row


def vars_of(row: Row) -> dict[str, Any]:
    return {"prompt": row.prompt, "answer": row.answer}


def write_data(folder: Path, num_rows: int, seed: int) -> Counter[str]:
    """Write rows.jsonl, benchmark.jsonl and curation.toml. Return how many rows were planted as what."""
    make = Generator(seed)
    benchmark = [make.new_row() for _ in range(NUM_BENCHMARK_ROWS)]
    planted: Counter[str] = Counter()
    with (folder / "benchmark.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(vars_of(row)) + "\n" for row in benchmark)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, (kind, fields) in enumerate(generated(make, benchmark, num_rows)):
            planted[kind] += 1
            file.write(json.dumps({"id": f"{kind}:{number}", **fields}) + "\n")
    (folder / "curation.toml").write_text(
        f'output = "{folder}/out"\n[duplicates]\nthreshold = {THRESHOLD}\n'
        f'[[source]]\npath = "{folder}/rows.jsonl"\nprompt = "prompt"\nanswer = "answer"\nid_column = "id"\n'
        f'domain = "math"\n[[benchmark]]\npath = "{folder}/benchmark.jsonl"\nprompt = "prompt"\n',
        encoding="utf-8",
    )
    return planted


def judged(out: Path, planted: Counter[str]) -> dict[str, Any]:
    """Count what became of the planted rows. An original of conflicting answers was planted as a row to keep."""
    found: Counter[tuple[str, str]] = Counter()
    conflicts = 0
    with (out / "dropped.jsonl").open(encoding="utf-8") as file:
        for dropped in map(json.loads, file):
            kind = dropped["row"]["id"].partition(":")[0]
            if (kind, dropped["reason"]) == ("keep", "conflicting_answers"):
                conflicts += 1
            else:
                found[kind, dropped["reason"]] += 1
    with (out / "kept.jsonl").open(encoding="utf-8") as file:
        found.update((json.loads(line)["id"].partition(":")[0], "keep") for line in file)
    to_keep = planted["keep"] - planted["conflicting_answers"]
    false_drops = to_keep - found["keep", "keep"]
    return {
        "planted": dict(planted),
        "recall": {kind: round(found[kind, kind] / count, 6) for kind, count in planted.items() if kind != "keep"}
        | {"both_of_conflicting_answers": round(conflicts / max(planted["conflicting_answers"], 1), 6)},
        "false_drops": false_drops,
        "false_drop_rate": round(false_drops / to_keep, 6),
        "unexpected": {f"{kind} -> {reason}": n for (kind, reason), n in found.items() if kind != reason},
    }


def run_measured(command: list[str]) -> dict[str, float]:
    """Return the seconds, CPU seconds, and the peak of the anonymous memory of the command with its children. The
    memory is sampled ten times a second: what a process does in its last tenth is not seen."""
    started, peak = time.perf_counter(), 0
    cpu_seconds: dict[int, float] = {}
    process = psutil.Popen(command, stdout=sys.stderr)
    while process.poll() is None:
        anonymous = 0
        with suppress(psutil.NoSuchProcess):
            for one in (process, *process.children(recursive=True)):
                cpu_seconds[one.pid] = sum(one.cpu_times()[:2])
                anonymous += anonymous_bytes(one.pid)
        peak = max(peak, anonymous)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu_seconds": sum(cpu_seconds.values()), "peak_anonymous_bytes": peak}


def anonymous_bytes(pid: int) -> int:
    """Return the bytes of anonymous memory; 0 for a process that has just ended."""
    try:
        found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 0


def bench(folder: Path, num_rows: int, workers: int, seed: int) -> dict[str, Any]:
    planted = write_data(folder, num_rows, seed)
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), str(folder / "curation.toml")]
    measured = run_measured([*command, "--set", f"workers={workers}"])
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    return {
        "rows": num_rows,
        "workers": workers,
        **judged(folder / "out", planted),
        "seconds_of_stages": report["seconds"],
        "rows_per_second": round(num_rows / measured["seconds"]),
        "rows_per_cpu_second": round(num_rows / measured["cpu_seconds"]),
        **{name: round(value, 1) for name, value in measured.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the files here; default: a temporary folder (3 GB)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_curation_") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(bench(folder, args.rows, args.workers, args.seed), indent=2))


if __name__ == "__main__":
    main()
