"""Row contracts."""

import json
from pathlib import Path

import pytest

from megatron_rl.data.prompts import read_chats, read_prompts

REAL = Path(__file__).parents[2] / "shared" / "data" / "math_dev.jsonl"
GOOD = {"domain": "math", "prompt": "1+1?", "answer": "2"}
USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_prompt_file_gives_its_rows_in_order(tmp_path):
    second = {"domain": "stem", "prompt": "é?", "answer": "漢", "id": "x1", "source": "s", "meta": {"level": 3}}
    prompts = read_prompts(write(tmp_path / "p.jsonl", GOOD, "", second))
    assert [(p.domain, p.prompt, p.answer) for p in prompts] == [("math", "1+1?", "2"), ("stem", "é?", "漢")]
    assert (prompts[0].meta, prompts[0].source) == ({}, "")
    assert (prompts[1].id, prompts[1].meta, prompts[1].source) == ("x1", {"level": 3}, "s")


def test_ids_that_are_not_given_depend_on_the_content_only(tmp_path):
    other = {**GOOD, "prompt": "1+2?"}
    one = read_prompts(write(tmp_path / "a.jsonl", GOOD, other))
    two = read_prompts(write(tmp_path / "b.jsonl", other, {**GOOD, "source": "elsewhere"}))
    assert [p.id for p in one] == [p.id for p in two][::-1]
    assert one[0].id != one[1].id


def test_the_real_math_rows_fit_the_contract():
    if not REAL.is_file():
        pytest.skip(f"{REAL} is not on this machine")
    prompts = read_prompts(REAL)
    assert len(prompts) == 500
    assert {p.domain for p in prompts} == {"math"}


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("{nope", ["not valid UTF-8 JSON", "one object per line"]),
        ([1, 2], ["must be a JSON object", "[1, 2]"]),
        ({"domain": "math", "prompt": "1?"}, ["'answer'", "no such field", "fill it in"]),
        ({**GOOD, "answer": 4}, ["'answer'", "non-empty string", "got 4"]),
        ({**GOOD, "prompt": "  "}, ["'prompt'", "non-empty string", "'  '"]),
        ({**GOOD, "domain": None}, ["'domain'", "None"]),
        ({**GOOD, "id": 7}, ["'id'", "got 7"]),
        ({**GOOD, "meta": "x"}, ["'meta'", "must be an object", "'x'"]),
        ({**GOOD, "anser": "4"}, ["'anser'", "'4'", "domain, prompt, answer", "put anything else into 'meta'"]),
        ({**GOOD, "prompt": "\ud800"}, ["'prompt'", "surrogate"]),
        ({**GOOD}, ["'id'", "line 1", "drop the duplicate"]),
    ],
)
def test_a_bad_prompt_row_is_named_by_file_line_field_and_value(tmp_path, row, parts):
    path = write(tmp_path / "p.jsonl", GOOD, "", row)
    with pytest.raises(ValueError, match=r"p\.jsonl:3: ") as error:
        read_prompts(path)
    assert str(path) in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_long_value_is_shortened_in_the_message(tmp_path):
    with pytest.raises(ValueError, match="'meta'") as error:
        read_prompts(write(tmp_path / "p.jsonl", {**GOOD, "meta": "x" * 10_000}))
    assert len(str(error.value)) < 400


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        read_chats(write(tmp_path / "empty.jsonl", ""))


def test_a_chat_file_gives_its_messages_in_order(tmp_path):
    chats = read_chats(write(tmp_path / "c.jsonl", {"messages": [USER, REPLY], "id": "c"}, {"messages": [USER, REPLY]}))
    assert [(m.role, m.content) for m in chats[0].messages] == [("user", "hi"), ("assistant", "ho")]
    assert chats[0].id == "c"
    assert len(chats[1].id) == 16


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"id": "a"}, ["'messages'", "non-empty list", "None"]),
        ({"messages": []}, ["'messages'", "non-empty list", "[]"]),
        ({"messages": [USER, "ho"]}, ["'messages[1]'", "'ho'"]),
        ({"messages": [{**USER, "name": "n"}, REPLY]}, ["'messages[0]'", "leave out other keys"]),
        ({"messages": [{"role": "human", "content": "hi"}, REPLY]}, ["'messages[0].role'", "'human'", "user"]),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, ["messages[1]", "'content'", "''"]),
        ({"messages": [USER, REPLY, USER]}, ["'messages'", "end with an assistant", "'user'"]),
        ({"messages": [REPLY]}, ["'messages'", "not begin with an assistant"]),
        ({"messages": [USER, REPLY], "answer": "4"}, ["'answer'", "unknown field"]),
    ],
)
def test_a_bad_chat_row_is_named_by_file_line_field_and_value(tmp_path, row, parts):
    path = write(tmp_path / "c.jsonl", {"messages": [USER, REPLY]}, row)
    with pytest.raises(ValueError, match=r"c\.jsonl:2: ") as error:
        read_chats(path)
    for part in parts:
        assert part in str(error.value)
