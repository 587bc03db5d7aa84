"""Tests the normal form, exact duplicates and near-duplicates, against brute force over all pairs."""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.curation.answers import agree
from megatron_rl.data.curation.config import CurationConfig
from megatron_rl.data.curation.pipeline import curate
from megatron_rl.data.curation.text import jaccard, ngram_hashes, numbers_digest, shingles, token_hashes, tokens

SURE = {"bands": 64, "band_rows": 2}  # misses a pair of similarity 0.6 once in 10^12
FILLER = "the quick brown fox jumps over a lazy dog near some old mill while rain falls on every roof of that town"


def curated(rows: list[dict[str, Any]], **duplicates: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return kept and dropped rows of math questions. By default the answer is 7 and the id is the position."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        full = [{"domain": "math", "answer": "7", "id": str(i), **row} for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in full))
        config = {
            "output": f"{folder}/out",
            "workers": 1,
            "source": [{"path": str(path), "preset": "ours"}],
            "duplicates": {**SURE, **duplicates},
        }
        curate(CurationConfig.model_validate(config))
        return tuple(  # type: ignore[return-value]
            list(map(json.loads, Path(folder, "out", name).open())) for name in ("kept.jsonl", "dropped.jsonl")
        )


def ids(rows: list[dict[str, Any]]) -> list[int]:
    return [int(row["id"]) for row in rows]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2 + 3?", "what is  2+3"),
        ("Find $x$, then stop.", "Find x; then stop"),
        ("He said “no”.", 'He said "no".'),
        ("It costs 1,000 dollars", "It costs 1000 dollars."),
        ("ﬁnd ２x − 1", "find 2x - 1"),
        ("\\left( \\dfrac{1}{2} \\right)", "(\\frac{1}{2})"),
        ("计算。", "计算"),
    ],
)
def test_prompts_that_read_the_same_have_one_normal_form(one: str, other: str) -> None:
    assert tokens(one) == tokens(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("What is 1.5?", "What is 15?"),
        ("What is 5!", "What is 5?"),
        ("Find f'(2).", "Find f(2)."),
        ("a < b", "a > b"),
        ("x^{12}", "x^{1}2"),
        ("(1, 2)", "12"),
    ],
)
def test_prompts_that_mean_different_things_do_not(one: str, other: str) -> None:
    assert tokens(one) != tokens(other)


def test_numbers_in_words_are_numbers() -> None:
    def same(one: str, other: str) -> bool:
        return numbers_digest(tokens(one)) == numbers_digest(tokens(other))

    assert not same("three apples", "four apples")
    assert not same("one apple", "two apples")
    assert not same("1 of 2", "2 of 1")
    assert same("no one eats 3 apples", "nobody eats 3 pears")


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.integers(1, 5))
def test_equal_runs_and_only_those_have_equal_hashes(words: list[str], size: int) -> None:
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    hashes = ngram_hashes(token_hashes(words), size).tolist()
    assert len(hashes) == len(runs)
    assert all((a == b) == (x == y) for (a, x), (b, y) in itertools.combinations(zip(runs, hashes, strict=True), 2))


def test_jaccard_of_runs_is_that_of_sets() -> None:
    one, other = (shingles(token_hashes(text.split()), 2) for text in ("a b c d", "a b c e a b"))
    assert jaccard(one, other) == pytest.approx(2 / 5)  # ab bc | cd, ce ea
    assert jaccard(one, shingles(token_hashes(["z"]), 2)) == 0
    assert len(shingles(token_hashes(["z"]), 2)) == 1
    assert one.dtype == np.uint64


def triples(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} if len(words) > 2 else {tuple(words)}


def brute_force(texts: list[str], threshold: float) -> list[int]:
    """Return the indices of the texts that stay when each is compared with all that stayed before it."""
    kept: list[int] = []
    for index, text in enumerate(texts):
        sets = ((triples(text), triples(texts[other])) for other in kept)
        if all(len(a & b) / len(a | b) < threshold for a, b in sets):
            kept.append(index)
    return kept


@st.composite
def families(draw: st.DrawFn) -> list[str]:
    """Draw texts, many of which differ from another in a word or two."""
    texts = [draw(st.lists(st.sampled_from(FILLER.split()), min_size=1, max_size=25))]
    for _ in range(draw(st.integers(0, 12))):
        words = list(draw(st.sampled_from(texts)))
        for _ in range(draw(st.integers(0, 3))):
            position = draw(st.integers(0, len(words) - 1))
            words[position : position + 1] = draw(st.sampled_from([["cat"], [words[position], "dog"], []])) or ["owl"]
        texts.append(words)
    return [" ".join(words) for words in texts]


@settings(max_examples=60, deadline=None)
@given(families(), st.sampled_from([0.6, 0.7, 0.8]))
def test_near_duplicates_are_those_of_brute_force(texts: list[str], threshold: float) -> None:
    kept, dropped = curated([{"prompt": text} for text in texts], threshold=threshold)
    assert ids(kept) == brute_force(texts, threshold)
    for row in dropped:
        one, other = triples(row["row"]["prompt"]), triples(texts[int(row["of"])])
        assert int(row["of"]) < int(row["row"]["id"])
        if row["reason"] == "duplicate":
            assert texts[int(row["of"])] == row["row"]["prompt"]
        else:
            assert int(row["of"]) in ids(kept)
            assert row["similarity"] == pytest.approx(len(one & other) / len(one | other), abs=1e-3)
            assert row["similarity"] >= threshold


@settings(max_examples=30, deadline=None)
@given(families())
def test_a_second_run_finds_no_duplicates(texts: list[str]) -> None:
    kept, _ = curated([{"prompt": text} for text in texts])
    again, dropped = curated(kept)
    assert dropped == []
    assert again == kept


def test_the_first_of_equal_rows_stays() -> None:
    kept, dropped = curated([{"prompt": "What is 2+3?"}, {"prompt": "Other?"}, {"prompt": "what is 2 + 3"}])
    assert ids(kept) == [0, 1]
    assert [(row["reason"], row["of"], row["of_line"], row["line"]) for row in dropped] == [("duplicate", "0", 1, 3)]


def test_all_rows_of_a_question_with_conflicting_answers_are_dropped() -> None:
    rows = [{"prompt": "Q?", "answer": answer} for answer in ("1/2", "0.5", "\\frac12", "3")]
    kept, dropped = curated([*rows[:3], {"prompt": "R?"}])
    assert ids(kept) == [0, 3]
    kept, dropped = curated([*rows, {"prompt": "R?"}])
    assert ids(kept) == [4]
    assert [(row["reason"], row["of"]) for row in dropped] == [
        ("conflicting_answers", "3"),
        ("conflicting_answers", "0"),
        ("conflicting_answers", "0"),
        ("conflicting_answers", "0"),
    ]


def test_answers_agree_as_a_grader_says() -> None:
    assert agree("math", "$\\frac{1}{2}$", "1/2")
    assert agree("math", "(1, 2)", "(1,2)")
    assert not agree("math", "(1, 2)", "(2, 1)")
    assert not agree("code_io", "'a'", "'A'")
    assert agree("code", '{"type": "asserts"}', '{"type": "humaneval"}')


def test_near_duplicates_with_other_numbers_or_answers_are_other_questions() -> None:
    texts = [f"{FILLER} with 3 apples", f"{FILLER} with 4 apples", f"{FILLER} with 3 apples today"]
    rows = [{"prompt": text} for text in texts]
    assert ids(curated(rows)[0]) == [0, 1]
    assert ids(curated(rows, same_numbers=False)[0]) == [0]
    rows[2]["answer"] = "8"
    assert ids(curated(rows)[0]) == [0, 1, 2]
    assert ids(curated(rows, same_answer=False)[0]) == [0, 1]


def test_every_character_counts_in_a_verbatim_domain() -> None:
    prompts = [f'{FILLER}: f("ab")', f'{FILLER}: f("Ab")', f'{FILLER}: f("ab")\n', f'{FILLER}: f("a b")']
    rows = [{"prompt": prompt, "domain": "code_io"} for prompt in prompts]
    assert ids(curated(rows)[0]) == [0, 1, 3]


def test_duplicates_stay_where_they_are_not_asked_for_and_ids_are_made_unique() -> None:
    rows = [{"prompt": "Q?", "id": "x"}, {"prompt": "Q?", "id": "x"}]
    kept, _ = curated(rows, exact=False, near=False)
    assert [row["id"] for row in kept] == ["x", "x~1"]
