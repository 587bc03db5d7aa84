"""Tests LiveCodeBench's packed tests, as published and as an attacker would pack them."""

import base64
import contextlib
import json
import pickle
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.curation.packed import unpacked_text


def pack(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_a_text_comes_back_as_it_was_packed(text: str, protocol: int) -> None:
    assert unpacked_text(pack(pickle.dumps(text, protocol))) == text


def test_json_without_a_pickle_around_it_is_read_too() -> None:
    assert unpacked_text(pack(json.dumps([{"input": "é"}]).encode())) == '[{"input": "\\u00e9"}]'


class Bomb:
    ran = False

    def __reduce__(self) -> Any:
        return (exec, ("Bomb.ran = True",))


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [Bomb(), ["a"], {"a": "b"}, ("a", "b"), 7, Bomb])
def test_a_pickle_of_anything_else_is_refused_and_runs_nothing(value: object, protocol: int) -> None:
    with pytest.raises(ValueError, match="the pickle of the tests holds"):
        unpacked_text(pack(pickle.dumps(value, protocol)))
    assert not Bomb.ran


def test_memory_is_not_asked_for_by_what_a_pickle_says_of_itself() -> None:
    # A text that says to have 2^62 bytes, and a place 2^32 - 1 in the memo.
    for content in (b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a.", b"\x80\x02X\x01\0\0\0ar\xff\xff\xff\xff."):
        with contextlib.suppress(ValueError):
            assert unpacked_text(pack(content)) == "a"


def test_what_unpacks_to_too_much_is_a_trap() -> None:
    with pytest.raises(ValueError, match="unpack to more than 1,000, which looks like a trap"):
        unpacked_text(pack(pickle.dumps("a" * 10_000_000)), most=1000)
    assert unpacked_text(pack(b"[" + b" " * 998 + b"]"), most=1000) == "[" + " " * 998 + "]"


@pytest.mark.parametrize("packed", ["", "!", "AAAA", base64.b64encode(zlib.compress(b"[1]")[:-3]).decode(), "[1]"])
def test_what_is_not_packed_is_named(packed: str) -> None:
    with pytest.raises(ValueError, match="neither JSON nor compressed tests in base64"):
        unpacked_text(packed)
