"""Tests which rollouts become SFT rows and why others do not, against a count by hand."""

import json
import random
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.distillation import Distillation, Selection
from megatron_rl.data.prompts import read_chats
from megatron_rl.data.sft_files import SftFiles
from megatron_rl.data.student import Student

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import make_sft_data
import make_tiny_model

STUDENT = Student(markers=("$", "<A>"), num_tokens=lambda messages: sum(len(m.content) for m in messages))


def row(**changes: Any) -> dict[str, Any]:
    """Return a row sampled from an endpoint. With a policy_version among the changes it is one from a checkpoint."""
    made = {
        "prompt_id": "p", "domain": "math", "prompt": "1+1?", "response": "2", "reward": 1.0, "reason": "correct",
        "finish_reason": "stop",
    }  # fmt: skip
    return made | changes


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def distil(folder: Path, *files: list[dict[str, Any]], **selection: Any) -> tuple[Distillation, list[Any], list[Any]]:
    """Distil the files. Return the distillation, and the chats for training and for validation."""
    paths = [write(folder / f"in{i}.jsonl", rows) for i, rows in enumerate(files)]
    work = Distillation(paths, Selection(**selection), STUDENT, {})
    share = selection.get("validation_share")
    with SftFiles(folder / "out.jsonl", folder / "val.jsonl" if share else None, force=True, inputs=paths) as out:
        work.write(out)
        out.finish()
    assert not list(folder.glob("*.partial"))
    return work, read_chats(folder / "out.jsonl"), read_chats(folder / "val.jsonl") if share else []


def texts(chats: list[Any]) -> list[tuple[str, str, str]]:
    return sorted((c.meta["domain"], c.messages[0].content, c.messages[1].content) for c in chats)


ROWS = st.lists(
    st.builds(
        row,
        prompt_id=st.sampled_from("xy"),
        domain=st.sampled_from(["math", "code"]),
        prompt=st.sampled_from(["a", "b", "c<A>"]),
        response=st.sampled_from(["1", "22", "333", "4444", "1$", " ", "<A>"]),
        reasoning=st.sampled_from(["", "", "hm"]),
        reward=st.sampled_from([0.0, 0.5, 1.0]),
        reason=st.sampled_from(["correct", "wrong", "timeout"]),
        finish_reason=st.sampled_from(["stop", "stop", "stop", "length"]),
    ),
    max_size=40,
)


def by_hand(rows: list[dict[str, Any]], min_reward: float, reasoning: bool) -> tuple[Counter[str], dict[Any, set[str]]]:
    """Count the reasons for dropped rows, for themselves or as repeats, and collect the texts of each prompt."""
    dropped: Counter[str] = Counter()
    found: dict[Any, set[str]] = defaultdict(set)
    for one in rows:
        text = one["response"]
        if one["reason"] == "timeout":
            dropped["no_verdict"] += 1
        elif one["reward"] < min_reward:
            dropped["low_reward"] += 1
        elif one["finish_reason"] == "length":
            dropped["unfinished"] += 1
        elif text == " ":
            dropped["empty"] += 1
        elif "$" in text or "<A>" in one["prompt"] + text:
            dropped["special_token"] += 1
        else:
            if reasoning and one.get("reasoning"):
                text = "<think>\nhm\n</think>\n\n" + text
            texts_of = found[one["domain"], one["prompt"]]
            dropped["repeat"] += text in texts_of
            texts_of.add(text)
    return dropped, found


@settings(max_examples=40, deadline=None)
@given(
    rows=ROWS,
    min_reward=st.sampled_from([0.5, 1.0]),
    reasoning=st.booleans(),
    per_prompt=st.sampled_from([None, 1, 2]),
    shortest=st.booleans(),
    seed=st.integers(0, 3),
)
def test_counts_and_rows_are_those_of_a_count_by_hand(rows, min_reward, reasoning, per_prompt, shortest, seed) -> None:
    dropped, found = by_hand(rows, min_reward, reasoning)
    choice = {"per_prompt": per_prompt, "shortest_first": shortest, "seed": seed}
    options = choice | {"min_reward": min_reward, "with_reasoning": reasoning}
    with tempfile.TemporaryDirectory() as name:
        if not any(found.values()):
            with pytest.raises(ValueError, match=f"no response stays of {len(rows)}: "):
                distil(Path(name), rows, **options)
            return
        work, chats, _ = distil(Path(name), rows, **options)
        mixed = random.Random(seed).sample(rows, len(rows))
        _, again, _ = distil(Path(name), mixed[: seed * 5], mixed[seed * 5 :], **options)
    assert texts(again) == texts(chats), "another order, other files: the same choice"
    kept: dict[Any, list[str]] = defaultdict(list)
    for domain, prompt, text in texts(chats):
        kept[domain, prompt].append(text)
    for question, of_question in found.items():
        limit = min(len(of_question), per_prompt or len(of_question))
        assert set(kept[question]) <= of_question
        assert len(kept[question]) == limit
        dropped["over_per_prompt"] += len(of_question) - limit
        if shortest:
            assert sorted(map(len, kept[question])) == sorted(map(len, of_question))[:limit]
    counts = work.domains
    assert sum((count.dropped for count in counts.values()), Counter()) == +dropped
    for domain, count in counts.items():
        own = [one for one in rows if one["domain"] == domain]
        written = [text for of, _, text in texts(chats) if of == domain]
        assert count.num_responses == len(own) == count.num_kept + count.dropped.total()
        assert count.num_prompts == len({one["prompt"] for one in own})
        assert count.num_kept_prompts == len({prompt for of, prompt, _ in texts(chats) if of == domain})
        assert (count.num_kept, count.num_characters) == (len(written), sum(map(len, written)))


def test_no_prompt_is_both_trained_and_validated_and_none_moves_when_others_come(tmp_path: Path) -> None:
    rows = [
        row(prompt_id=f"{d}{i}", domain=d, prompt=f"{i}?", response=f"{j}")
        for i in range(400) for j in range(3) for d in ("math", "code")
    ]  # fmt: skip
    work, chats, validation = distil(tmp_path, rows, validation_share=0.1)
    trained, validated = ({chat.messages[0].content for chat in part} for part in (chats, validation))
    assert not trained & validated
    assert len(trained) + len(validated) == 400
    assert 20 <= len(validated) <= 60  # mean 40, standard deviation 6
    assert len(validation) == 6 * len(validated) == sum(count.num_validation for count in work.domains.values())
    _, _, fewer = distil(tmp_path, rows[:600], validation_share=0.1)
    assert {chat.messages[0].content for chat in fewer} == {v for v in validated if int(v[:-1]) < 100}
    with pytest.raises(ValueError, match=r"a validation share of 0.1 of 1 prompts leaves no response for"):
        distil(tmp_path, rows[:1], validation_share=0.1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt_id": "p"', r"line 2 is no scored response \(JSON.*; it is cut short: go on with .* --resume"),
        ('{"prompt_id": "p"}\n', r"line 2 is no scored response .*no domain.*name the data file with id 'p' by --prom"),
        (json.dumps(row(reward=None)) + "\n", r"line 2 is no scored response \(TypeError"),
        (json.dumps(row(response="\ud83d")) + "\n", r"line 2 is no scored response \(UnicodeEncodeError"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "in").write_text(json.dumps(row()) + "\n" + line)
    work = Distillation([tmp_path / "in"], Selection(), STUDENT, {})
    with pytest.raises(ValueError, match=message), SftFiles(tmp_path / "out.jsonl") as files:
        work.write(files)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a model that has a tokenizer alone, which is all that is needed of it."""
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model.write_tokenizer(folder, make_tiny_model.TinyModel())
    return str(folder)


def test_the_tool_writes_a_file_for_each_domain_and_a_summary(model: str, tmp_path: Path, capsys) -> None:
    rollouts = write(
        tmp_path / "in.jsonl",
        [
            row(response="two", policy_version=0),
            row(response="two"),
            row(response=f"one{make_tiny_model.EOS}and", policy_version=0),
            row(response="<role>HUMAN</role>"),
            row(response="a long one"),
            row(response="6", segments=[]),
            row(domain="code", prompt="f?", response="def", reasoning="f is easy"),
        ],
    )
    data = tmp_path / "data.jsonl"
    data.write_text('{"id": "q", "domain": "math", "prompt": "2+2?", "answer": "4"}\n')
    step = write(
        tmp_path / "step.jsonl",
        [
            {"prompt_id": "q", "prompt": "<role>HUMAN</role>2+2?<role>ASSISTANT</role>", "response": "4",
             "policy_versions": {"3": 2}, "finish_reason": "stop", "reward": 1.0, "reason": "correct",
             "outcome": "trained"},
            {"prompt_id": "q", "prompt": "2+2?", "response": "", "policy_versions": {}, "finish_reason": "",
             "outcome": "dropped: kept for too long"},
        ],
    )  # fmt: skip
    output = tmp_path / "sft.jsonl"
    options = [str(rollouts), str(step), "--prompts", str(data), "--model", model, "--output", str(output)]
    # 4 characters of the prompt, 3 of "two", two turns and the end of the sequence
    options += ["--by-domain", "--max-tokens", "40"]
    assert make_sft_data.main([*options, "--max-tokens", "10"]) == 0
    told = capsys.readouterr().out
    assert texts(read_chats(tmp_path / "sft_math.jsonl")) == [("math", "1+1?", "two"), ("math", "2+2?", "4")]
    assert not (tmp_path / "sft_code.jsonl").exists()
    assert "math: 2 of 8 responses kept, to 2 of 2 prompts, 2 characters in the mean\n" in told
    summary = json.loads((tmp_path / "sft.jsonl.summary.json").read_text())
    assert summary["domains"]["math"] == {
        "prompts": 2, "kept_prompts": 2, "responses": 8, "kept": 2, "validation": 0, "mean_characters": 2.0,
        "dropped": {"special_token": 2, "repeat": 1, "too_long": 1, "many_turns": 1, "no_verdict": 1},
    }  # fmt: skip
    assert summary["domains"]["code"]["dropped"] == {"too_long": 1}
    assert summary["files"] == {str(tmp_path / "sft_math.jsonl"): 2}
    assert make_sft_data.main(options) == 2
    assert "sft_math.jsonl exists; overwrite it with --force" in capsys.readouterr().err
    assert make_sft_data.main([*options, "--force"]) == 0
    assert texts(read_chats(tmp_path / "sft_code.jsonl")) == [("code", "f?", "<think>\nf is easy\n</think>\n\ndef")]
    assert len(read_chats(tmp_path / "sft_math.jsonl")) == 3


def test_mistakes_are_named_before_anything_is_read(model: str, tmp_path: Path, capsys) -> None:
    rollouts = str(write(tmp_path / "in.jsonl", [row(domain="a/b")]))
    options = [rollouts, "--model", model, "--output", str(tmp_path / "out.jsonl")]
    for more, message in [
        (["--output", rollouts], "in.jsonl is one of the files that are read; name another output"),
        (["--validation", str(tmp_path / "out.jsonl")], "validation rows cannot go to"),
        (["--validation", "v.jsonl", "--validation-share", "1"], "--validation-share must be between 0 and 1, got 1"),
        (["--per-prompt", "0"], "--per-prompt must be at least 1, got 0"),
        (["--shortest"], "--shortest says which responses --per-prompt N leaves"),
        (["--by-domain"], "domain 'a/b' cannot be a part of a file's name"),
        (["--model", str(tmp_path / "none")], "none does not exist"),
    ]:
        assert make_sft_data.main([*options, *more]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
