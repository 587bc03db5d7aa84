"""Tests which rows of prompts are accepted."""

import json
import logging
from pathlib import Path

import pytest

from megatron_rl.data.prompts import prompt_id, read_chats, read_prompts
from megatron_rl.data.rows import LOOKED_AT, Problems, likely_column

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
        ({"domain": "math", "prompt": "1?"}, ["no field 'answer'", "the row has 'domain', 'prompt'"]),
        ({**GOOD, "answer": True}, ["'answer'", "got True", "write it in quotes"]),
        ('{"domain": "math", "prompt": "1?", "answer": NaN}', ["'answer'", "got nan", "write it in quotes"]),
        ({**GOOD, "answer": [4, "5"]}, ["'answer'", "non-empty string", "got [4, '5']"]),
        ({**GOOD, "prompt": "  "}, ["'prompt'", "non-empty string", "'  '"]),
        ({**GOOD, "domain": " "}, ["'domain'", "' '"]),
        ({**GOOD, "id": [7]}, ["'id'", "got [7]"]),
        ({**GOOD, "meta": "x"}, ["'meta'", "must be an object", "'x'"]),
        (
            {"domain": "math", "prompt": "1?", "anser": "4"},
            ["there is no field 'answer'", "its column 'anser' may be it"],
        ),
        ({"Question": "1?", "answer": "4"}, ["'prompt'", "its column 'Question' may be it", "megatron-rl inspect"]),
        ({"prompt": [{"role": "human", "content": "1?"}], "answer": "4"}, ["'prompt[0].role'", "megatron-rl inspect"]),
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


def test_what_is_there_and_is_no_file_of_rows_is_not_said_to_be_missing(tmp_path):
    write(tmp_path / "b.jsonl", GOOD)
    with pytest.raises(ValueError, match=rf"^data file {tmp_path} is a directory; name a file in it, as .*/b\.jsonl$"):
        read_prompts(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is a directory; name a file in it$"):
        read_prompts(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"^data file /dev/null is not a regular file"):
        read_prompts("/dev/null")
    with pytest.raises(ValueError, match=r"\*\.jsonl does not exist; patterns are not read here: name one file"):
        read_prompts(tmp_path / "*.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_file_in_utf_16_is_called_that(tmp_path, encoding):
    text = "".join(json.dumps(GOOD | {"answer": str(n)}) + "\n" for n in range(3))
    (tmp_path / "p.jsonl").write_bytes(
        ("\ufeff" if encoding == "utf-16-be" else "").encode(encoding) + text.encode(encoding)
    )
    with pytest.raises(ValueError, match=r"p\.jsonl is in UTF-16; write it in UTF-8"):
        read_prompts(tmp_path / "p.jsonl")


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
        ({"conversations": [USER, REPLY]}, ["'messages'", "its column 'conversations' may be it", "inspect"]),
        ({"question": "hi", "answer": "ho"}, ["'messages'", "the key `response`", "inspect"]),
    ],
)
def test_a_bad_chat_row_is_named_by_file_line_field_and_value(tmp_path, row, parts):
    path = write(tmp_path / "c.jsonl", {"messages": [USER, REPLY]}, row)
    with pytest.raises(ValueError, match=r"c\.jsonl:2: ") as error:
        read_chats(path)
    for part in parts:
        assert part in str(error.value)


def test_all_faults_of_the_first_rows_are_told_at_once_and_each_once(tmp_path):
    rows = [{"question": "1?", "answer": n} for n in range(3)] + [{"question": "2?", "answer": ""}, "{nope", GOOD]
    with pytest.raises(ValueError) as error:
        read_prompts(write(tmp_path / "p.jsonl", *rows))
    lines = str(error.value).split("\n  ")
    assert [line.replace(str(tmp_path), "") for line in lines] == [
        "the rows cannot be used, for 3 reasons:",
        "/p.jsonl:1: there is no field 'prompt'; the row has 'question', 'answer'; its column "
        "'question' may be it (3 more such rows)",
        "/p.jsonl:4: field 'answer' must be a non-empty string, got ''; fill it in or drop the row",
        "/p.jsonl:5: not valid UTF-8 JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char "
        "1)); write one object per line",
        "megatron-rl inspect /p.jsonl shows how its rows can be read, and writes the mapping that "
        "tools/prepare_data.py makes our rows by",
    ]


def test_faults_of_several_files_are_told_together_and_no_file_is_read_to_its_end(tmp_path):
    bad = [{"prompt": "p", "answer": None}] * (3 * LOOKED_AT)
    problems = Problems()
    read_prompts(write(tmp_path / "a.jsonl", GOOD, *bad), problems=problems)
    read_prompts(tmp_path / "b.jsonl", problems=problems)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    read_prompts(tmp_path / "c.parquet", problems=problems)
    with pytest.raises(ValueError) as error:
        problems.tell()
    told = str(error.value)
    assert "for 3 reasons" in told
    assert "a.jsonl:2: field 'answer' must be a non-empty string, got None" in told
    assert f"({LOOKED_AT:,} more such rows)" in told
    assert "data file " + str(tmp_path / "b.jsonl") + " does not exist" in told
    assert "c.parquet is no JSONL, one JSON object per line" in told


@pytest.mark.parametrize(
    ("answer", "taken"),
    [(27, "27"), (-3, "-3"), (0.5, "0.5"), (["12", "13"], '["12", "13"]'), ("27", "27"), (10**30, "1" + "0" * 30)],
)
def test_a_number_is_taken_for_its_text(tmp_path, answer, taken):
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", {**GOOD, "answer": answer, "id": 7}))
    assert (prompt.answer, prompt.id) == (taken, "7")
    assert read_prompts(write(tmp_path / "q.jsonl", {**GOOD, "answer": answer}))[0].id == prompt_id(
        "math", "1+1?", taken
    )


def test_a_row_without_a_domain_has_the_default_and_one_with_tests_is_code(tmp_path, caplog):
    tests = {"type": "asserts", "asserts": ["assert f(1) == 2"]}
    rows = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "f?", "answer": tests}, {**GOOD, "domain": None}, GOOD]
    path = write(tmp_path / "p.jsonl", *({**row, "id": n} for n, row in enumerate(rows)))
    with caplog.at_level(logging.INFO):
        prompts = read_prompts(path, "algebra")
    assert [prompt.domain for prompt in prompts] == ["algebra", "code", "algebra", "math"]
    assert json.loads(prompts[1].answer) == tests
    assert [record.message for record in caplog.records] == [
        f"{path}: 2 rows name no domain and are taken as 'algebra'",
        f"{path}: 1 rows name no domain and are taken as 'code'",
    ]


def test_other_columns_go_into_meta_and_are_named_once(tmp_path, caplog):
    row = {**GOOD, "level": 3, "tags": ["a"], "meta": {"level": 5}}
    path = write(tmp_path / "p.jsonl", row, {**GOOD, "prompt": "2?", "level": 4})
    with caplog.at_level(logging.INFO):
        prompts = read_prompts(path)
    assert [prompt.meta for prompt in prompts] == [{"level": 5, "tags": ["a"]}, {"level": 4}]
    assert [record.message for record in caplog.records] == [
        f"{path}: columns level, tags are no fields of ours and go into meta"
    ]
    (chat,) = read_chats(write(tmp_path / "c.jsonl", {"messages": [USER, REPLY], "metadata": {"a": 1}}))
    assert chat.meta == {"metadata": {"a": 1}}


def test_a_suffix_goes_behind_every_prompt_and_leaves_ids_alone(tmp_path):
    path = write(tmp_path / "p.jsonl", GOOD)
    (plain,), (asked,) = read_prompts(path), read_prompts(path, suffix=" Box it.")
    assert (asked.prompt, asked.id) == ("1+1? Box it.", plain.id)
    assert plain.where == f"{path}:1"


@pytest.mark.parametrize(
    ("field", "columns", "meant"),
    [
        ("prompt", ["answer", "Problem"], "Problem"),
        ("prompt", ["input", "question"], "question"),
        ("answer", ["ground-truth", "label"], "ground-truth"),
        ("answer", ["awnser"], "awnser"),
        ("prompt", ["a", "b"], None),
        ("domain", ["domains"], "domains"),
    ],
)
def test_the_likely_column_is_a_usual_name_or_a_misspelt_one(field, columns, meant):
    assert likely_column(field, columns) == meant
