"""Tests tools/bench_rewards.py on a file that the test writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "bench_rewards.py"
ROWS = [
    # Without a box, math-verify would find no formula in this gold answer.
    {"pred": "\\frac{\\sqrt{12}}{4}", "gold": "\\frac{\\sqrt{3}}{2}", "expected": True, "kind": "boxed alike"},
    {"pred": "So it is \\boxed{5}.", "gold": "$5$", "expected": True, "kind": "boxed alike"},
    {"pred": None, "gold": "5", "expected": False, "kind": "null"},
    {"pred": None, "gold": "5", "expected": True, "kind": "null"},
    {"pred": "7", "gold": "5", "expected": False, "kind": "numbers"},
    {"pred": "5", "gold": "5", "expected": False, "kind": "numbers"},
    {"pred": "7", "gold": "5", "expected": True, "kind": "numbers"},
    {"pred": "8", "gold": "5", "expected": True, "kind": "numbers"},
    {"pred": "7", "gold": ["7"], "expected": False, "kind": "a list"},
    # Two percent away: right in science, wrong to math-verify.
    {"pred": "5.1", "gold": "5.2", "expected": True, "reward": "stem", "definite": True},
]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=800)


def counts(judged: dict) -> tuple[float, int, int]:
    return judged["agreement"], judged["false_positives"], judged["false_negatives"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the tool's results for ROWS, for a file that the rules were made with, and for an unseen one."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs, known, unseen = (folder / f"{name}.jsonl" for name in ("pairs", "answers2_dev", "held_out"))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for path in (known, unseen):
        path.write_text(json.dumps({"pred": "1", "gold": "1", "expected": True}) + "\n")
    done = run(pairs, known, "--unseen", unseen, "--examples", "1", "--deadline", "240")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["files"]


def test_both_judges_are_counted_by_kind_and_a_null_prediction_is_no_answer(files):
    report, kinds = files[0], files[0]["kinds"]
    assert (report["num_pairs"], report["num_null_predictions"]) == (10, 2)
    for judge in ("ours", "math_verify"):
        assert counts(kinds["boxed alike"][judge]) == (1.0, 0, 0)
        assert counts(kinds["null"][judge]) == (0.5, 0, 1)
        assert counts(kinds["numbers"][judge]) == (0.25, 1, 2)
        assert report["rewards"]["math"][judge]["pairs_per_second_and_worker"] > 0
    assert counts(kinds["stem, definite"]["ours"]) == (1.0, 0, 0)
    assert counts(kinds["stem, definite"]["math_verify"]) == (0.0, 0, 1)
    assert kinds["null"]["num_expected_correct"] == 1
    assert kinds["null"]["ours_disagrees"] == [{"pred": None, "gold": "5", "expected": True}]
    assert len(kinds["numbers"]["ours_disagrees"]) == 1
    assert kinds["a list"]["num_pairs"] == 1


def test_a_file_says_whether_rules_were_made_beside_it(files):
    assert [file["in_sample"] for file in files] == ["not said", "yes", "no"]
    refused = run("--unseen", "answers2_dev.jsonl")
    assert refused.returncode == 2 and "answers2_dev.jsonl; it cannot be unseen" in refused.stderr


def test_a_file_that_is_not_there_is_named():
    done = run("nowhere.jsonl")
    assert done.returncode == 2 and "nowhere.jsonl does not exist" in done.stderr
