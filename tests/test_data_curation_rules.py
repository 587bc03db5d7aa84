"""Tests that each rule finds its defect and keeps rows that only look like one."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_rl.data.curation.rules import RULES
from megatron_rl.data.prompts import Prompt

SHARED = Path(__file__).parents[2] / "shared" / "data"

# rule, prompt, answer
DEFECTS = [
    ("invalid_characters", "Find \ufffd if 2x = 4.", "2"),
    ("invalid_characters", "Find \ue012 if 2x = 4.", "2"),
    ("invalid_characters", "Find x\x0c if 2x = 4.", "2"),
    ("invalid_characters", "Itâ€™s 3 oâ€™clock. What angle?", "90"),
    ("invalid_characters", "A cafÃ© sells 3 teas.", "3"),
    ("invalid_characters", "At 20 Â°C, what is p?", "3"),
    ("invalid_characters", "Fine?", "3\ufffd"),
    ("image", "What is the area? ![figure](https://a.b/c.png)", "3"),
    ("image", 'What is x? <img src="a.png">', "3"),
    ("image", "\\begin{center}\\includegraphics[width=3cm]{a}\\end{center} Find x.", "3"),
    ("image", "As shown in the figure, $AB = 3$. Find $BC$.", "3"),
    ("image", "As shown in Figure 1 above. In the diagram below, AB = 3.", "3"),
    ("image", "The figure shows two circles. Find the distance.", "3"),
    ("image", "In the figure, ABC is a triangle. Find the angle.", "3"),
    ("image", "The graph of $f$ is shown below. Find $f(2)$.", "3"),
    ("image", "[Image] What is the area?", "3"),
    ("multiple_choice", "What is 1+1?\nA. 1\nB. 2\nC. 3", "B"),
    ("multiple_choice", "What is 1+1? (A) 1 (B) 2 (C) 3 (D) 4", "2"),
    ("multiple_choice", "What is 1+1? $\\textbf{(A)}\\ 1 \\qquad \\textbf{(B)}\\ 2 \\qquad \\textbf{(C)}\\ 3$", "B"),
    ("multiple_choice", "Which is right?\nA) it rises\nB) it falls", "A"),
    ("multiple_choice", "Which is right? A. it rises B. it falls C. it stays D. none", "(C)"),
    ("multiple_choice", "Which is right?\n(a) it rises\n(b) it falls\n(c) it stays", "c"),
    ("multi_part", "Let x = 3. (a) Find 2x. (b) Find 3x.", "6, 9"),
    ("multi_part", "A ball falls.\n(i) How long does it fall?\n(ii) How fast is it?", "1"),
    ("multi_part", "Let x = 3.\n1. Compute 2x.\n2. Compute 3x.", "6"),
    ("multi_part", "Part A: What is 2x? Part B: What is 3x?", "6"),
    ("multi_part", "Find the values that satisfy the condition in part (a).", "6"),
    ("true_or_false", "Is 7 prime?", "Yes"),
    ("true_or_false", "7 is prime.", "\\text{True}"),
    ("true_or_false", "Is 8 prime?", " no."),
]
GOOD = [
    ("Solve $x^2 = 4$ for $x$.\n\tGive both.", "\\pm 2"),
    ("Où est le café de Zoë? Ã is a letter.", "Köln"),
    ("计算 3 的平方。", "9"),
    ("Round to three significant figures: 2.3456. It figures.", "2.35"),
    ("In the figure [asy] draw((0,0)--(1,1)); [/asy] find the slope.", "1"),
    ("Find the number of edges of the graph $G$. In an image, circles are searched.", "4"),
    ("Sketching the graph of $y = x$ shown to be continuous, find $y(2)$.", "2"),
    ("Find $P(A)$, $P(B)$ and $P(C)$ if (A) and (B) exclude each other.", "0.5"),
    ("A sequence satisfies (a) $f(1) = 1$ and (b) $f(x+y) = f(x) + f(y)$. Find $f(5)$.", "5"),
    ("Point A. Then B. They meet at C. What is the angle?", "5"),
    ("Consider the statements:\n1. All x are y.\n2. Some y are z.\nHow many hold?", "1"),
    ("Let (i) a = 1 and (ii) b = 2. What is a + b?", "3"),
    ("Vitamin A. What is its mass?", "A"),
    ("What is $P(A \\cup B)$?", "0.9"),
    ("Who said yes first?", "Yesenin"),
]


def found(prompt: str, answer: str, domain: str = "math") -> list[str]:
    record = Prompt(id="1", domain=domain, prompt=prompt, answer=answer)
    return [name for name, rule in RULES.items() if rule(record)]


@pytest.mark.parametrize(("rule", "prompt", "answer"), DEFECTS)
def test_a_defect_is_found_by_its_rule(rule: str, prompt: str, answer: str) -> None:
    assert found(prompt, answer) == [rule]


@pytest.mark.parametrize(("prompt", "answer"), GOOD)
def test_what_only_looks_like_a_defect_stays(prompt: str, answer: str) -> None:
    assert found(prompt, answer) == []


def test_prompts_about_programs_may_label_cases_and_answer_true() -> None:
    assert found("(a) Find it. (b) Find that.\nA. one\nB. two\nC. three", "True", domain="code_io") == []
    assert found("Print it. <image>", "{}", domain="code") == ["image"]


# People read the dropped rows: each has the defect, or refers to a picture that is not there.
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_real_rows_are_dropped_for_what_they_are() -> None:
    counts: Counter[str] = Counter()
    for name in ("math", "stem"):
        for row in map(json.loads, (SHARED / f"{name}_dev.jsonl").open()):
            names = found(row["prompt"], row["answer"], row["domain"])
            letters = row["meta"].get("type") == "letter"
            assert not letters or names[0] == "multiple_choice"
            assert letters or names[:1] != ["multiple_choice"] or row["answer"] in ("B", "IV stage")
            counts.update(names[:1])
    assert counts == {"multiple_choice": 202, "true_or_false": 27, "image": 4, "multi_part": 1}
