"""Tests how the last box of a response is found, and rewards that compare it as a string."""

import time

import pytest

from megatron_rl.reward.boxed import boxes
from megatron_rl.reward.exact import exact_verdict


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{4}.", "4"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{}", ""),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{a \\\\{b}}", "a \\\\{b}"),
        ("\\boxed{a \\boxed{b}}", "b"),
        ("\\boxed{a\nb}", "a\nb"),
        ("no box here", None),
        ("", None),
        ("\\fbox{4}", "4"),
        ("\\boxed 4", "4"),
        ("so $\\boxed 12$.", "12"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("put it in \\boxed please", None),
        ("\\boxedness{4}", None),
        ("\\boxed{4} wait, \\boxed{5", None),
        ("\\boxed{\\}", None),
        ("\\boxed{4\\", None),
    ],
)
def test_the_last_box_is_found_with_balanced_braces(text, expected):
    found = boxes(text)
    assert (found[-1].content if found else None) == expected


def test_a_long_response_of_unclosed_boxes_takes_linear_time():
    start = time.process_time()
    assert boxes("\\boxed{" * 200_000) == []
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("response", "answer", "score", "reason"),
    [
        ("a0b1;\\boxed{4}", "4", 1.0, "correct"),
        ("\\boxed{ 4 }", "4", 1.0, "correct"),
        ("\\boxed{4.0}", "4", 0.0, "wrong"),
        ("\\boxed{AB}", "ab", 0.0, "wrong"),
        ("\\boxed{4} or \\boxed{5}", "4", 0.0, "wrong"),
        ("\\boxed{}", "4", 0.0, "wrong"),
        ("\\boxed{4}", "so \\boxed{4}", 1.0, "correct"),
        ("\\boxed{4}", '["4"]', 1.0, "correct"),
        ('\\boxed{["4"]}', '["4"]', 1.0, "correct"),
        ("\\boxed{13}", '["12", "13"]', 1.0, "correct"),
        ("\\boxed{12, 13}", '["12", "13"]', 0.0, "wrong"),
        ("the answer is 4", "4", 0.0, "no_answer"),
        ("\\boxed{4", "4", 0.0, "no_answer"),
    ],
)
def test_the_exact_reward_is_string_equality_of_the_last_box(response, answer, score, reason):
    verdict = exact_verdict(response, answer)
    assert (verdict.score, verdict.reason) == (score, reason)
