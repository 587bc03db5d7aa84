"""Tests the judges on labelled pairs of answers: `make test` takes every eighth, `make test-answers` all of them."""

import json
import os
from pathlib import Path

import pytest

from megatron_rl.reward.pool import RewardPool

FILES = sorted((Path(__file__).parent / "answer_pairs").glob("*.jsonl"))
EVERY = 1 if os.environ.get("ANSWERS") == "whole" else 8
# (reference, answer) that are judged against their label, docs/rewards.md says why.
DISPUTED = {
    ("a_{n+1}", "a_{1+n}"),
    ("m+n=17", "17"),
    ("right", "\\text{to the right}"),
    ('["x=1","x=2"]', "x=1, x=2"),
    ('["x=1","x=2"]', "x=1"),
    ("4.2 kJ", "\\SI{4.2}{\\kilo\\joule}"),
    ("\\text{maximum } 5, \\text{ minimum } -3", "\\max = 5, \\min = -3"),
    ("\\frac{\\pi}{3}", "60^\\circ"),
    ("\\frac{\\sin^2 x}{2}+C", "-\\cos^2 x/2 + C"),
    ("all positive multiples of 3", "\\text{all positive integers } n \\text{ divisible by } 3"),
    ("color", "\\text{colour}"),
    ("^{14}C", "{}^{14}_{6}\\text{C}"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("reward", ["math", "stem"])
def test_labelled_pairs_are_judged_as_their_labels_say(path, reward):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["reward"] == reward and (row["gold"], row["pred"]) not in DISPUTED][::EVERY]
    responses = [row["pred"] if "\\boxed" in row["pred"] else f"\\boxed{{{row['pred']}}}" for row in rows]
    with RewardPool(reward, workers=1, timeout_seconds=240.0) as pool:
        verdicts = pool.score(zip(responses, (row["gold"] for row in rows), strict=True))
    wrong = [row for row, verdict in zip(rows, verdicts, strict=True) if bool(verdict.score) != row["expected"]]
    assert wrong == []
