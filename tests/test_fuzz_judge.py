"""Tests the fuzzer of the judge: a short run finds no hole, but finds those that are made for it."""

import sys
from pathlib import Path

import pytest
from sandboxed import why_not

from megatron_rl.reward import code, code_runners

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import fuzz_judge

MISSING = why_not(lambda: code.warm_up(fuzz_judge.SETTINGS))
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(autouse=True)
def _own_runner():
    code.runner.cache_clear()
    yield
    code.runner.cache_clear()


def test_programs_that_answer_with_mutated_bytes_are_wrong():
    reasons = {fuzz_judge.judge(f"test/{case}")[1] for case in range(100)}
    assert reasons <= {"wrong", "too_slow"} and "wrong" in reasons


HOLES = {
    "a program that is asked whether it equals what is expected": (
        'state.refuse(f"is compared with a plain',
        "state.connection.ask('len', self) or str(f\"is compared with a plain",
    ),
    "an end of iteration that leaves a loop": (
        "_ENDS_OF_LOOPS = (StopIteration, StopAsyncIteration)",
        "_ENDS_OF_LOOPS = (StopAsyncIteration,)",
    ),
    "an object that says what it contains": (
        "*arguments) if state.trusted else state.refuse(refusal)",
        "*arguments)",
    ),
}


@pytest.mark.parametrize("hole", HOLES)
def test_the_fuzzer_finds_a_hole_that_is_made_for_it(hole, monkeypatch):
    before, after = HOLES[hole]
    plain = code_runners.sources

    def with_hole(modules):
        texts = [(name, text.replace(before, after)) for name, text in plain(modules)]
        assert texts != plain(modules) or "code_remote" not in modules, "the hole is not in the source"
        return texts

    monkeypatch.setattr(code_runners, "sources", with_hole)
    assert any(fuzz_judge.judge(f"1/{case}")[1] == "correct" for case in range(400))
