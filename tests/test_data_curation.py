"""Tests curation from files to files: what is written and refused, and that a run leaves all or nothing."""

import errno
import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from until import wait_until

from megatron_rl.data.curation.config import CurationConfig
from megatron_rl.data.curation.output import whole_output
from megatron_rl.data.curation.pipeline import curate
from megatron_rl.data.curation.report import Report
from megatron_rl.data.prompts import read_chats, read_prompts

TOOL = Path(__file__).parents[1] / "tools" / "prepare_data.py"
TEXT = (
    "A train leaves the old station at noon and travels north along the river for 3 hours before it meets another "
    "train that left the harbour at the same time and travels south twice as fast; how far apart are the two?"
)


def rows_of(*prompts: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"domain": "math", "prompt": prompt, "answer": "7", **fields} for prompt in prompts]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def config(folder: Path, *paths: Path, **values: Any) -> CurationConfig:
    sources = [{"path": str(path), "preset": "ours"} for path in paths]
    return CurationConfig.model_validate({"output": folder / "out", "workers": 1, "source": sources, **values})


def run(folder: Path, rows: list[Any], **values: Any) -> tuple[Report, list[dict[str, Any]], list[dict[str, Any]]]:
    report = curate(config(folder, write(folder / "rows.jsonl", rows), **values), force=True)
    return report, read(folder / "out" / "kept.jsonl"), read(folder / "out" / "dropped.jsonl")


def test_what_the_disk_refuses_is_told_with_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'out'}'"),
        whole_output(tmp_path / "out", force=False),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list((tmp_path / "out").iterdir()) == []


def test_kept_rows_are_prompts_and_dropped_rows_say_where_they_stood_and_why(tmp_path: Path) -> None:
    good = rows_of("What is 3+4?", meta={"level": 1})[0]
    yes = rows_of("Is 7 prime?")[0] | {"answer": "Yes"}
    report, kept, dropped = run(
        tmp_path, [good, yes, {"prompt": "no answer", "domain": "math"}], max_malformed_share=0.5
    )
    prompt = read_prompts(tmp_path / "out" / "kept.jsonl")[0]
    assert (prompt.prompt, prompt.answer, prompt.domain, prompt.meta) == ("What is 3+4?", "7", "math", {"level": 1})
    assert kept[0]["source"] == str(tmp_path / "rows.jsonl")
    assert [(row["reason"], row["file"], row["line"], row["details"], row["row"]["prompt"]) for row in dropped] == [
        ("true_or_false", f"{tmp_path}/rows.jsonl", 2, "the answer is Yes", "Is 7 prime?"),
        ("malformed", f"{tmp_path}/rows.jsonl", 3, "no column 'answer'; the row has prompt, domain", "no answer"),
    ]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (written["rows"], written["kept"]) == (3, 1)
    assert written["dropped"] == {"true_or_false": 1, "malformed": 1} == dict(report.total.dropped)
    assert written["config"]["duplicates"]["threshold"] == 0.8
    assert "1 of 3 rows kept" in report.table()
    assert sorted(os.listdir(tmp_path / "out")) == ["dropped.jsonl", "kept.jsonl", "report.json"]


def test_columns_that_are_left_out_are_told_and_a_meta_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    rows = [{"q": f"What is {n} + 4?", "a": str(n + 4), "level": n, "deep": {"hint": "add"}} for n in (3, 4, 5)]
    path = write(tmp_path / "own.jsonl", [*rows[:2], rows[2] | {"late": 1}])

    def curated(*meta: str) -> Report:
        source = {"path": str(path), "prompt": "q", "answer": "a", "domain": "math", "meta": meta}
        given = {"output": tmp_path / "out", "workers": 1, "source": [source]}
        return curate(CurationConfig.model_validate(given), force=True)

    assert curated("late").sources[0].left_out == ["level", "deep"]
    assert "left out: level, deep (`meta` keeps" in curated("late").table()
    told = curated("level", "deep.hint", "late")
    assert (told.sources[0].left_out, "left out" in told.table()) == ([], False)
    assert [row["meta"] for row in read(tmp_path / "out/kept.jsonl")] == [
        {"level": 3, "hint": "add"}, {"level": 4, "hint": "add"}, {"level": 5, "hint": "add", "late": 1},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="meta names deep.hnt, levle, and no row has .* rows have q, a, level, deep"):
        curated("levle", "deep.hnt", "late")
    path.write_text("")
    with pytest.raises(ValueError, match="has no rows; take it out of the sources"):
        curated("late")


def test_parquet_gz_several_files_and_workers_give_the_same(tmp_path: Path) -> None:
    rows = rows_of(*(f"{TEXT} {word}" for word in "abcdefgh")) + rows_of("What is 3+4?", "what is 3 + 4", "Is it?")
    rows[-1]["answer"] = "no"
    expected = run(tmp_path, rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=3)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n\n" for row in rows)
    write(tmp_path / "part1.jsonl", rows[:4])
    write(tmp_path / "part2.jsonl", rows[4:])
    for name, workers in (("rows.parquet", 1), ("rows.jsonl.gz", 1), ("part*.jsonl", 2)):
        report = curate(config(tmp_path, tmp_path / name, workers=workers), force=True)
        assert report.total.dropped == expected[0].total.dropped
        kept = read(tmp_path / "out" / "kept.jsonl")
        assert [{**row, "source": ""} for row in kept] == [{**row, "source": ""} for row in expected[1]]


def test_many_malformed_rows_are_a_wrong_preset(tmp_path: Path) -> None:
    rows = [*rows_of("What is 3+4?"), {"question": "q", "answer": "1"}]
    message = (
        r"1 of 2 rows do not have the layout that was given, above max_malformed_share = 0\.1; correct the preset or "
        r"the columns\. The first: .*rows\.jsonl:2: no column 'prompt'; the row has question, answer"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path, rows)
    assert os.listdir(tmp_path / "out") == []


def test_a_line_that_is_no_json_is_a_malformed_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of("What is 3+4?"))
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    report = curate(config(tmp_path, path, max_malformed_share=0.5))
    assert report.total.dropped == {"malformed": 1}
    assert read(tmp_path / "out" / "dropped.jsonl")[0]["row"] == '{"prompt": "\\xff"}\n'


def test_half_a_surrogate_pair_in_meta_costs_its_row_only(tmp_path: Path) -> None:
    rows = [*rows_of("What is 3+4?"), *rows_of("What is 2+5?", meta={"by": ["\ud83d"]})]
    report, kept, _ = run(tmp_path, rows)
    assert ([row["prompt"] for row in kept], report.total.dropped) == (["What is 3+4?"], {"invalid_characters": 1})


def test_rules_can_be_left_out_for_all_or_for_one_source(tmp_path: Path) -> None:
    rows = [rows_of("Is 7 prime?")[0] | {"answer": "yes"}]
    assert run(tmp_path, rows)[1] == []
    assert len(run(tmp_path, rows, rules=["image"])[1]) == 1
    source = {"path": str(tmp_path / "rows.jsonl"), "preset": "ours", "skip_rules": ["true_or_false"]}
    assert len(run(tmp_path, rows, source=[source])[1]) == 1


def test_contaminated_rows_name_the_benchmark_and_what_they_share(tmp_path: Path) -> None:
    ending = "where m and n are relatively prime positive integers find m + n times the number of all of them"
    others = [f"{word * 3} {ending}" for word in ("ab", "cd", "ef")]
    write(
        tmp_path / "bench.jsonl",
        [{"q": text} for text in (TEXT, "What is 8+9?", "Name the sum of all primes up to 97", *others)],
    )
    words = TEXT.split()
    rows = rows_of(
        f"Answer this: {TEXT.upper()}",
        " ".join(words[:30]) + " and so on, as one can see?",
        "what is 8 + 9",
        "Please name the sum of all primes up to 97, if you can.",
        " ".join(words[:20]) + " which is a question that only begins like the other, because it soon turns to ships, "
        "sails, anchors and captains of whom 3 are old and the others are young. How old is the youngest captain?",
        "Compute: what is 8 + 9 + 10?",
        f"Let x be 3 {ending}",
    )  # fmt: skip
    _, kept, dropped = run(tmp_path, rows, benchmark=[{"path": str(tmp_path / "bench.jsonl"), "prompt": "q"}])
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in rows[4:]]
    assert {row["reason"] for row in dropped} == {"contamination"}
    # The second row has 37 words, so 25 runs of 13. 31 words in a row are the benchmark's ("and" too), so 19 runs.
    assert [(row["benchmark_line"], row["share"]) for row in dropped] == [(1, 1.0), (1, 0.76), (2, 1.0), (3, 1.0)]
    assert dropped[0]["benchmark"] == str(tmp_path / "bench.jsonl")
    assert dropped[0]["ngram"] == "a train leaves the old station at noon and travels north along the"
    assert dropped[3]["ngram"] == "name the sum of all primes up to 97"


def test_a_benchmark_row_without_a_prompt_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "bench.jsonl", [{"q": "What is it?"}, {"question": "What?"}])
    with pytest.raises(ValueError, match=r"bench\.jsonl:2: no benchmark row: no column 'q'; the row has question"):
        run(tmp_path, rows_of("Q?"), benchmark=[{"path": str(tmp_path / "bench.jsonl"), "prompt": "q"}])


def rollouts(path: Path, **rewards: list[float]) -> str:
    rows = [{"prompt": f"{name}?", "reward": reward} for name, given in rewards.items() for reward in given]
    return str(write(path, rows))


def test_difficulty_drops_what_is_always_solved_and_what_no_model_solves(tmp_path: Path) -> None:
    rows = rows_of("easy?", "some?", "hard?", "hopeless?", "half?", "new?")
    model = rollouts(tmp_path / "a.jsonl", easy=[1, 1], some=[1, 0, 0, 0], hard=[0, 0], hopeless=[0, 0], half=[0])
    stronger = rollouts(tmp_path / "b.jsonl", hard=[0, 1], hopeless=[0, 0], some=[0])

    def left(**difficulty: Any) -> str:
        return " ".join(row["prompt"] for row in run(tmp_path, rows, difficulty={"rollouts": [model], **difficulty})[1])

    assert left() == "some? new?"
    asked = write(tmp_path / "c.jsonl", [row | {"prompt": row["prompt"] + " Box it."} for row in read(Path(model))])
    assert left(rollouts=[str(asked)], suffix=" Box it.") == "some? new?"
    assert left(stronger=[stronger]) == "some? hard? half? new?"
    assert left(stronger=[stronger], unmeasured="drop") == "some? hard? half?"
    assert left(stronger=[stronger], min_pass_rate=0.25) == "hard? half? new?"
    dropped = run(tmp_path, rows, difficulty={"rollouts": [model], "stronger": [stronger]})[2]
    assert [(row["reason"], row["row"]["prompt"], row["pass_rate"], row["num_responses"]) for row in dropped] == [
        ("too_easy", "easy?", 1.0, 2),
        ("too_hard", "hopeless?", 0.0, 2),
    ]
    assert dropped[1]["stronger_pass_rate"] == 0.0


def test_rollouts_of_other_prompts_or_of_no_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the 1 prompts of difficulty.rollouts is among the rows"):
        run(tmp_path, rows_of("Q?"), difficulty={"rollouts": [rollouts(tmp_path / "a.jsonl", other=[1])]})
    write(tmp_path / "b.jsonl", [{"prompt": "Q?"}])
    with pytest.raises(ValueError, match=r"b\.jsonl:1 is not a scored response \(KeyError: 'reward'\)"):
        run(tmp_path, rows_of("Q?"), difficulty={"rollouts": [str(tmp_path / "b.jsonl")]})


def test_responses_that_nobody_could_judge_are_no_measurement(tmp_path: Path) -> None:
    given_up = [{"prompt": "new?", "reward": 0.0, "reason": reason} for reason in ("timeout", "error")]
    wrong = [{"prompt": "hard?", "reward": 0.0, "reason": "wrong"}]
    model = str(write(tmp_path / "a.jsonl", given_up + wrong))
    kept = run(tmp_path, rows_of("new?", "hard?"), difficulty={"rollouts": [model]})[1]
    assert [row["prompt"] for row in kept] == ["new?"]


def test_a_result_is_overwritten_only_by_force(tmp_path: Path) -> None:
    given = config(tmp_path, write(tmp_path / "rows.jsonl", rows_of("Q?")))
    curate(given)
    with pytest.raises(ValueError, match=r"out already holds kept\.jsonl, dropped\.jsonl, report\.json; .*--force"):
        curate(given)
    curate(given, force=True)


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    directory = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is writing to"):
        run(tmp_path, rows_of("Q?"))
    os.close(directory)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.csv").write_text("prompt,answer\na,b,c\n")
    (tmp_path / "b.csv").write_text('prompt,answer\n"never closed,b\n')
    (tmp_path / "c.csv").write_bytes("prompt,answer\nCafé?,1\n".encode("latin-1"))
    (tmp_path / "d.csv").write_text("prompt,prompt\na,b\n")
    (tmp_path / "e.csv").write_text("prompt;answer\na;b\n")
    (tmp_path / "a.json").write_text('[{"prompt": "p"')
    (tmp_path / "a.parquet").write_text("a")
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-9])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 100)
    for name, message in (
        ("b.jsonl", "no file matches"),
        ("a.txt", r"a\.txt is none of \.jsonl, \.jsonl\.gz, \.json, \.parquet, \.csv; convert it"),
        ("a.csv", r"a\.csv:2: 3 columns, and the first line names 2; put quotes around texts with commas"),
        ("b.csv", r"b\.csv:2: not CSV \(unexpected end of data\)"),
        ("c.csv", r"c\.csv is not in UTF-8 \(.*\); write it in UTF-8"),
        ("e.csv", r"e\.csv:1: columns stand between ';'; write the file again with commas"),
        ("d.csv", r"d\.csv:1: two columns have the same name; rename one of prompt, prompt"),
        ("a.json", r"a\.json begins as a JSON array and is none"),
        ("a.parquet", r"a\.parquet does not read as Parquet"),
        ("a.jsonl", "has no rows"),
        ("a.jsonl.gz", "is no whole gzip file"),
        ("b.jsonl.gz", r"b\.jsonl\.gz is no whole gzip file .*; fetch it again"),
    ):
        with pytest.raises(ValueError, match=message):
            curate(config(tmp_path, tmp_path / name))


def test_hugging_face_datasets_are_streamed_where_the_library_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(name: str, subset: str | None, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        assert (name, subset, split, streaming) == ("org/set", "main", "test", True)
        return iter(rows_of("Q?", "R?", "q"))

    source = {"hf": "org/set", "hf_config": "main", "split": "test", "preset": "ours"}
    given = CurationConfig.model_validate({"output": tmp_path / "out", "workers": 1, "source": [source]})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hf = 'org/set' needs the library datasets, which is not installed"):
        curate(given)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert curate(given).total.num_kept == 2
    assert read(tmp_path / "out" / "dropped.jsonl")[0]["file"] == "hf:org/set/test"


# The tool, which stands still behind the first rows that it has written.
STANDS_STILL = """
import runpy, sys, threading
from megatron_rl.data.curation import pipeline
def inspected(*arguments, inner=pipeline.inspected):
    for one in inner(*arguments):
        yield one
        threading.Event().wait()
pipeline.inspected = inspected
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", rows_of(*(f"{TEXT} {n}" for n in range(5_000))))
    text = f'output = "{tmp_path}/out"\n[[source]]\npath = "{tmp_path}/rows.jsonl"\npreset = "ours"\n'
    (tmp_path / "c.toml").write_text(text)
    command = [sys.executable, "-c", STANDS_STILL, TOOL, tmp_path / "c.toml"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    records = tmp_path / "out" / ".partial" / "records.jsonl"
    try:
        wait_until(
            lambda: process.poll() is not None or (records.exists() and records.stat().st_size),
            f"rows are in {records}",
        )
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert os.listdir(tmp_path / "out") == [".partial"]
    write(tmp_path / "rows.jsonl", rows_of("Q?"))
    report = curate(config(tmp_path, tmp_path / "rows.jsonl"))
    assert report.total.num_kept == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["dropped.jsonl", "kept.jsonl", "report.json"]


def test_the_tool_says_what_to_correct(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOL, tmp_path / "no.toml"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"prepare_data: config file {tmp_path}/no.toml does not exist\n")


def test_csv_and_arrays_are_read_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('\ufeffprompt,answer\r\n"2 lines,\nWhat is 3+4?",7\r\n\r\nBad?,\r\n'.encode())
    (tmp_path / "b.json").write_text(json.dumps(rows_of("What is 4+5?", "What is 5+6?"), indent=1))
    (tmp_path / "c.jsonl").write_text("\n " + json.dumps(rows_of("What is 6+7?")))
    given = config(tmp_path, *(tmp_path / name for name in ("a.csv", "b.json", "c.jsonl")))
    curate(given)
    kept, dropped = (read(tmp_path / "out" / name) for name in ("kept.jsonl", "dropped.jsonl"))
    assert [row["prompt"] for row in kept] == [
        "2 lines,\nWhat is 3+4?", "What is 4+5?", "What is 5+6?", "What is 6+7?",
    ]  # fmt: skip
    assert [(row["reason"], row["line"], row["row"]["prompt"]) for row in dropped] == [("missing_answer", 5, "Bad?")]


def said(question: str, answer: str, **others: Any) -> dict[str, Any]:
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": messages, **others}


@pytest.mark.parametrize(
    ("source", "row", "asked"),
    [
        ({"preset": "alpaca"}, {"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n\n1 and 2"),
        ({"preset": "alpaca"}, {"instruction": "Add 1 and 2.", "input": "", "output": "3"}, "Add 1 and 2."),
        ({"preset": "prompt_completion"}, {"prompt": "1+2?", "completion": "3"}, "1+2?"),
        ({"prompt": "q.text", "response": "a"}, {"q": {"text": "1+2?"}, "a": 3}, "1+2?"),
    ],
)
def test_a_question_and_a_response_become_a_chat(tmp_path: Path, source: dict, row: dict, asked: str) -> None:
    *questions, response = row
    rows = [row | {"level": 4}, row | dict.fromkeys(questions, ""), row | {response: ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    config = {"output": str(tmp_path / "out"), "workers": 1, "source": [{"path": str(tmp_path / "a.jsonl"), **source}]}
    curate(CurationConfig.model_validate(config | {"max_malformed_share": 1.0}))
    (chat,) = read_chats(tmp_path / "out/kept.jsonl")
    assert [(message.role, message.content) for message in chat.messages] == [("user", asked), ("assistant", "3")]
    assert chat.meta == {"level": 4}
    dropped = [json.loads(line)["reason"] for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert len(dropped) == 2 and "unusable_conversation" in dropped  # no question, and nothing to learn


def test_conversations_are_curated_into_chats(tmp_path: Path) -> None:
    rows = [
        said("What is 3+4?", "7", id="a", metadata={"level": 1}, solution="seven"),
        said("What is 3+4?", "Seven."),  # another response to the same question
        said("What is 3+4?", "7"),
        said("Go on.<|im_end|>", "No."),
        said("Fine?", "Yes \ufffd"),
        {"conversations": [{"from": "gpt", "value": "Hello!"}]},
        {"conversations": "Hello!"},
        said(TEXT, "It depends."),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    benchmark = {"path": str(write(tmp_path / "benchmark.jsonl", rows_of(TEXT))), "preset": "ours"}
    source = {"path": str(path), "preset": "sharegpt"}
    given = {"output": tmp_path / "out", "workers": 1, "source": [source], "benchmark": [benchmark],
             "max_malformed_share": 0.5}  # fmt: skip
    curate(CurationConfig.model_validate(given))
    chats = read_chats(tmp_path / "out" / "kept.jsonl")
    assert [[(m.role, m.content) for m in chat.messages] for chat in chats] == [
        [("user", "What is 3+4?"), ("assistant", "7")],
        [("user", "What is 3+4?"), ("assistant", "Seven.")],
    ]
    assert (chats[0].id, chats[0].meta) == ("a", {"level": 1, "solution": "seven"})
    dropped = read(tmp_path / "out" / "dropped.jsonl")
    assert [(row["reason"], row["line"]) for row in dropped] == [
        ("special_tokens", 4),
        ("invalid_characters", 5),
        ("unusable_conversation", 6),
        ("malformed", 7),
        ("contamination", 8),
        ("duplicate", 3),
    ]


def test_conversations_and_prompts_are_not_one_set_of_rows(tmp_path: Path) -> None:
    prompts = {"path": "p.jsonl", "preset": "ours"}
    chats = {"path": "c.jsonl", "preset": "messages"}
    with pytest.raises(ValueError, match=r"c\.jsonl holds conversations and p\.jsonl prompts"):
        CurationConfig.model_validate({"output": tmp_path, "source": [prompts, chats]})
    with pytest.raises(ValueError, match="difficulty is of prompts"):
        CurationConfig.model_validate({"output": tmp_path, "source": [chats], "difficulty": {"rollouts": ["r"]}})
