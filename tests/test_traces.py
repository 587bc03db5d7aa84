"""Tests which responses are traced, and what is written of each token and of its part of the text."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import make_sample, make_schedule, make_segment, make_trajectory
from test_tokenizers import KINDS, byte_level

from megatron_rl.data.chat import load_tokenizer, response_decoder
from megatron_rl.records import Group, Sample
from megatron_rl.train.step.token_traces import chosen, lines, pieces

WORDS = "the sum of x and y is prime "
Decoded = tuple[Any, Callable[[Sequence[int]], str]]
NUM_IDS = 300  # fewer than either tokenizer has


@pytest.fixture(scope="module", params=KINDS)
def decoded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoded:
    """Return (tokenizer, decode) of a byte-level BPE, and of a sentencepiece BPE that falls back to bytes."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "config.json").write_text(json.dumps({"model_type": "bailing_moe"}))
    KINDS[request.param](directory)
    tokenizer = load_tokenizer(directory)
    return tokenizer, response_decoder(tokenizer, [tokenizer.eos_token_id])


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
@example(text="🙂🙂 naïve π≠3\n\n  中文� \ufffd🙂")
def test_a_text_has_its_characters_at_the_token_that_ends_them(decoded: Decoded, text: str) -> None:
    tokenizer, decode = decoded
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces([*ids, tokenizer.eos_token_id], decode)
    assert len(found) == len(ids) + 1
    assert "".join(found) == decode(ids)
    assert found[-1] == ""
    # Read off the whole response's prefixes: a token has what is in the text with it and was not before.
    given_before = 0
    for i in range(len(ids)):
        prefix = decode(ids[: i + 1])
        if decode(ids).startswith(prefix) and "\ufffd" not in prefix:
            assert found[i] == prefix[given_before:]
            given_before = len(prefix)
        elif "\ufffd" not in text:
            assert found[i] == ""


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, NUM_IDS - 1), max_size=40))
def test_any_tokens_have_pieces_that_join_to_the_response_and_leave_what_is_ill_formed_behind(
    decoded: Decoded, ids: list[int]
) -> None:
    tokenizer, decode = decoded
    assert "".join(pieces(ids, decode)) == decode(ids)
    assert len(pieces(ids, decode)) == len(ids)
    tail = tokenizer.encode(WORDS * 20, add_special_tokens=False)[-64:]
    whole = decode([*ids, *tail])
    last = [decode([*ids, *tail[: i + 1]]) for i in range(32, 64)]
    assert all(whole.startswith(prefix) for prefix in last)
    assert pieces([*ids, *tail], decode)[-31:] == [b[len(a) :] for a, b in pairwise(last)]


def test_bytes_that_are_no_character_are_where_they_came(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bailing_moe"}))
    byte_level(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    alphabet = {"F0": "ð", "9F": "Ł", "82": "Ĥ"}  # as byte-level vocabularies write these bytes
    ids = [tokenizer.convert_tokens_to_ids(alphabet.get(c, c)) for c in ("F0", "9F", "F0", "A", "82", "B")]
    # A character that breaks off is one mark, which its first byte has; a byte that begins none is one by itself.
    assert pieces(ids, tokenizer.decode) == ["\ufffd", "", "\ufffd", "A", "\ufffd", "B"]


def responses(prompt_id: int, *lengths: int) -> tuple[Sample, ...]:
    return tuple(make_sample(prompt_id, i, length) for i, length in enumerate(lengths))


def test_the_first_groups_with_a_trained_token_are_traced_whole() -> None:
    # The carried response and a part of one group fill the budget; which one is a matter of the seed.
    groups = [Group(prompt_id=9, samples=responses(9, 30, 30)), Group(prompt_id=5, samples=responses(5, 30, 30))]
    trained = set()
    for seed in range(8):
        plan = make_schedule(groups, carried=responses(7, 12), budgets=(20,), seed=seed)
        (other,) = {plan.samples[s.index].id[0] for step in plan.plan.steps for s in step.selected} - {7}
        trained.add(other)
        first, second = ([(7, 0)], [(other, 0), (other, 1)]) if other == 9 else ([(5, 0), (5, 1)], [(7, 0)])
        for num_groups, expected in ((0, []), (1, first), (2, first + second), (3, first + second)):
            assert [plan.samples[i].id for i in chosen(plan, num_groups)] == expected
    assert trained == {5, 9}


def test_a_row_says_of_each_token_what_both_sides_made_of_it() -> None:
    def sample(index: int, logprobs: list[float], versions: list[int]) -> Sample:
        sampled = {"rollout_logprobs": np.array(logprobs, np.float32), "policy_versions": np.array(versions, np.int32)}
        return make_trajectory(4, index, [replace(make_segment(len(versions)), **sampled)])

    samples = (sample(0, [-0.12345, -1.0, -math.inf], [1, 1, 3]), sample(1, [-2.0, -0.5], [3, 3]))
    plan = make_schedule([Group(prompt_id=4, samples=samples)], budgets=(2, 2), cut="token")
    at = {plan.samples[s.index].id[1]: (n, s) for n, step in enumerate(plan.plan.steps) for s in step.selected}
    found: list[dict[int, np.ndarray]] = [{}, {}]
    for number, selected in at.values():
        found[number][selected.index] = np.array([-0.00004, math.nan])[: selected.num_loss_tokens]
    traced = type(plan.plan)(steps=plan.plan.steps, traced=chosen(plan, 1))
    schedule = type(plan)(plan=traced, samples=plan.samples, carried=(), num_dropped=0, num_cut_tokens=0)
    rows = [json.loads(line) for line in lines(schedule, found, lambda ids: "".join("abc"[i] for i in ids))]
    assert rows == [
        {
            "position": 4,
            "sample_index": 0,
            "tokens": ["a", "b", "c"],
            "rollout_logprobs": [-0.1235, -1.0, None],
            "train_logprobs": [-0.0, None, None],
            "policy_versions": [[1, 2], [3, 1]],
            "optimizer_step": at[0][0],
        },
        {
            "position": 4,
            "sample_index": 1,
            "tokens": ["a", "b"],
            "rollout_logprobs": [-2.0, -0.5],
            "train_logprobs": [-0.0, None],
            "policy_versions": [[3, 2]],
            "optimizer_step": at[1][0],
        },
    ]
    assert {at[0][0], at[1][0]} == {0, 1}
