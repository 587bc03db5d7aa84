"""Tests `megatron-rl rollout` with an endpoint as teacher: what is asked and written, failures, and resuming."""

import gc
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_in import StandIn, stand_in

from megatron_rl import cli
from megatron_rl import endpoint as endpoint_module
from megatron_rl.locks import sole_writer
from megatron_rl.rollout import teacher as teacher_module
from megatron_rl.rollout.rollout_file import RowLimits, check_rows

CONFIG = """
run_dir = "{folder}/run"
[teacher]
url = "{url}"
model = "teacher-1"
concurrent = 4
[data]
train = "{folder}/prompts.jsonl"
[rollout]
prompts_per_step = 6
samples_per_prompt = 2
max_response_tokens = 50
temperature = 0.7
"""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[StandIn]]]:
    monkeypatch.setattr(endpoint_module, "_PAUSE_SECONDS", 0)
    with stand_in("teacher-1") as found:
        found[1].answer = staticmethod(answer)
        yield found


def question(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def answer(body: dict[str, Any]) -> str:
    """Answer correctly about even numbers only."""
    number = int(question(body).split()[-1])
    return f"Well. \\boxed{{{number if number % 2 == 0 else 'what?'}}}"


def write_config(folder: Path, url: str, more: str = "") -> Path:
    rows = [{"id": f"p{i}", "domain": "count", "prompt": f"Say {i}", "answer": str(i)} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder, url=url) + more)
    return folder / "config.toml"


@pytest.fixture
def rollout(endpoint, tmp_path: Path, capsys) -> Callable[..., str]:
    """Runs the command in this process; returns what it says on stderr."""

    def run(*options: str, code: int = 0) -> str:
        config = str(write_config(tmp_path, endpoint[0]))
        assert cli.main(["rollout", config, "--output", str(tmp_path / "out.jsonl"), *options]) == code
        return capsys.readouterr().err

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_an_endpoint_answers_every_prompt_as_often_as_the_section_says(
    endpoint, rollout, tmp_path: Path, monkeypatch
) -> None:
    _, handler = endpoint
    monkeypatch.setenv("TEACHER_KEY", "s3cret")
    told = rollout(
        "--set",
        "teacher.api_key_variable=TEACHER_KEY",
        "--set",
        "teacher.system=Think.",
        "--set",
        'teacher.extra={reasoning_effort = "high"}',
        "--set",
        "teacher.top_p=0.9",
    )
    assert sorted(question(body) for body, _ in handler.asked) == sorted(f"Say {i}" for i in range(6) for _ in "ab")
    body, key = handler.asked[0]
    assert key == "Bearer s3cret"
    assert body["messages"][0] == {"role": "system", "content": "Think."}
    expected = {"model": "teacher-1", "temperature": 0.7, "top_p": 0.9, "max_tokens": 50, "reasoning_effort": "high"}
    assert {name: body[name] for name in expected} == expected
    assert set(body) == {*expected, "messages", "seed"}
    assert len({body["seed"] for body, _ in handler.asked}) == 12
    rows = rows_of(tmp_path)
    assert {(row["position"], row["sample_index"]) for row in rows} == {(p, i) for p in range(6) for i in (0, 1)}
    for row in rows:
        number = int(row["prompt_id"][1:])
        assert row["prompt"] == f"Say {number}"
        assert row["reward"] == (number % 2 == 0)
        assert (row["finish_reason"], row["num_tokens"], row["model"]) == ("stop", 7, "teacher-1")
        assert "output_ids" not in row
    with pytest.raises(
        ValueError, match=r"line 1 has no token ids and log-probs: .*tools/make_sft_data.py makes its rows"
    ):
        check_rows(tmp_path / "out.jsonl", RowLimits())
    for file in tmp_path.iterdir():
        assert "s3cret" not in file.read_text()
    assert "s3cret" not in told


def test_what_a_reasoning_model_thought_is_kept_beside_its_answer(endpoint, rollout, tmp_path: Path) -> None:
    _, handler = endpoint
    thought = {"content": "\\boxed{0}", "reasoning_content": "Zero\ud83d, or \\boxed{1}?"}
    cut = {"content": None, "reasoning": "Zero, or"}
    handler.replies += [{"message": thought, "finish_reason": "stop"}, {"message": cut, "finish_reason": "length"}]
    handler.answer = staticmethod(lambda body: {"message": {"content": "\\boxed{no}"}, "finish_reason": None})
    rollout("--prompts", "1", "--set", "teacher.send_seed=false", "--set", "teacher.concurrent=1")
    first, second = rows_of(tmp_path)
    assert [body.keys() & {"seed"} for body, _ in handler.asked] == [set(), set()]
    number = int(first["prompt_id"][1:])
    assert (first["response"], first["reasoning"]) == ("\\boxed{0}", "Zero?, or \\boxed{1}?")
    assert first["reward"] == (number == 0), "the reasoning is not judged"
    assert (second["response"], second["reasoning"], second["finish_reason"]) == ("", "Zero, or", "length")
    assert (second["reward"], second["reason"]) == (0.0, "no_answer")


def test_a_run_that_was_killed_goes_on_and_asks_only_what_is_missing(endpoint, rollout, tmp_path: Path) -> None:
    _, handler = endpoint
    rollout()
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    assert "exists; add --resume" in rollout(code=2)
    (tmp_path / "out.jsonl").write_text("".join(lines[:7]) + lines[7][:30])  # three groups, and a part of a fourth
    handler.asked.clear()
    rollout("--resume")
    assert len(handler.asked) == 3 * 2
    key = lambda row: (row["position"], row["sample_index"])  # noqa: E731
    assert sorted(rows_of(tmp_path), key=key) == sorted(map(json.loads, lines), key=key)
    handler.model = "teacher-2"
    told = rollout("--resume", "--set", "teacher.model=teacher-2", "--set", "rollout.temperature=1.0", code=2)
    assert "holds responses with other settings: teacher.model was 'teacher-1', now 'teacher-2'; rollout.temp" in told
    assert len(handler.asked) == 3 * 2


def test_a_second_run_leaves_the_file_of_the_first_alone(rollout, tmp_path: Path) -> None:
    """Check that a second run is refused: it would ask the same prompts and cut off what the first one writes."""
    rollout("--prompts", "2")
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"position": 2, ')
    before = (tmp_path / "out.jsonl").read_text()
    with sole_writer(tmp_path / "out.jsonl", "wait"):
        told = rollout("--resume", code=2)
    assert f"another process is writing to {tmp_path}/out.jsonl; wait for it, or name another --output" in told
    assert (tmp_path / "out.jsonl").read_text() == before


def test_a_teacher_that_says_nothing_is_waited_for_in_words_and_asked_again(
    endpoint, rollout, tmp_path: Path, monkeypatch, caplog
) -> None:
    _, handler = endpoint
    monkeypatch.setattr(teacher_module, "_TELL_EVERY_SECONDS", 0.05)
    handler.replies.append(hung := threading.Event())
    # Whoever is too slow for the limit once more asks again.
    limits = ("teacher.timeout_seconds=0.3", "teacher.tries=50", "teacher.concurrent=1")
    rollout("--prompts", "1", *(part for limit in limits for part in ("--set", limit)))
    hung.set()
    assert "waiting for 1 prompts; 0 responses so far" in caplog.text
    assert "; asking again in 0 s" in caplog.text
    assert len(rows_of(tmp_path)) == 2


def test_a_prompt_that_fails_has_no_rows_until_it_is_asked_again(endpoint, rollout, tmp_path: Path, caplog) -> None:
    _, handler = endpoint
    handler.replies.append({"message": {"content": ["no", "text"]}})
    rollout("--prompts", "4", "--set", "teacher.max_failure_share=0.3", "--set", "teacher.concurrent=1")
    assert '1 of 4 prompts got no answer (the last: no chat completion: {"choices": [{"message":' in caplog.text
    assert len(rows_of(tmp_path)) == 3 * 2
    (tmp_path / "out.jsonl").unlink()
    handler.replies += [503, None, (429, "slow down")]  # each is asked again
    refused = (400, {"error": "what a question"})
    handler.answer = staticmethod(lambda body: refused if question(body) == "Say 3" else answer(body))
    rollout()
    assert '1 of 6 prompts got no answer (the last: HTTP 400: {"error": "what a question"}); --resume' in caplog.text
    assert {row["prompt_id"] for row in rows_of(tmp_path)} == {"p0", "p1", "p2", "p4", "p5"}
    handler.answer = staticmethod(answer)
    handler.asked.clear()
    rollout("--resume")
    assert [question(body) for body, _ in handler.asked] == ["Say 3"] * 2
    assert len(rows_of(tmp_path)) == 12


def test_a_prompt_that_always_fails_does_not_keep_a_resumed_run_from_ending(endpoint, rollout, tmp_path: Path) -> None:
    """Check that the failing prompt counts as one of six in each start."""
    _, handler = endpoint
    refused = (400, {"error": "what a question"})
    handler.answer = staticmethod(lambda body: refused if question(body) == "Say 3" else answer(body))
    allowed = ("--set", "teacher.max_failure_share=0.2")
    rollout(*allowed)
    rollout("--resume", *allowed)
    assert len(rows_of(tmp_path)) == 10
    assert "1 of 6 prompts got no answer" in rollout("--resume", "--set", "teacher.max_failure_share=0.1", code=1)


def test_a_teacher_that_fails_too_often_ends_the_run_and_what_came_is_kept(
    endpoint, rollout, tmp_path: Path, monkeypatch, caplog
) -> None:
    _, handler = endpoint
    monkeypatch.setattr(teacher_module, "_MIN_FAILED", 2)
    handler.answer = staticmethod(lambda body: answer(body) if question(body) == "Say 0" else 500)
    told = rollout("--set", "teacher.tries=2", "--set", "teacher.concurrent=1", code=1)
    assert "prompts got no answer from teacher-1 at http" in told
    assert "teacher.max_failure_share = 0.2. The last: HTTP 500" in told
    assert len(handler.asked) < 2 * 12, "it did not ask on"

    async def lost(*_: object) -> None:
        raise endpoint_module.EndpointError("the line is cut")

    monkeypatch.setattr(endpoint_module.Endpoint, "ask", lost)
    assert "The last: the line is cut" in rollout("--resume", code=1)
    gc.collect()
    assert "never retrieved" not in caplog.text, "one message says it"
    assert {row["prompt_id"] for row in rows_of(tmp_path)} <= {"p0"}
    handler.model = "other"
    assert "teacher.model 'teacher-1' is not served at http" in rollout("--resume", code=2)


def test_who_answers_is_said_once(endpoint, rollout, tmp_path: Path, capsys) -> None:
    url, handler = endpoint
    assert "--model names a checkpoint and teacher an endpoint" in rollout("--model", str(tmp_path), code=2)
    config = write_config(tmp_path, url)
    training = ["--set", "budget.tokens=100", "--set", "train.steps=1", "--set", "train.micro_batch_tokens=200"]
    for command in ("train", "rollout"):
        assert cli.main([command, str(config), *training]) == 2
        assert "teacher is for `megatron-rl rollout` with a configuration without budget" in capsys.readouterr().err
    assert "teacher.extra names 'n', which a request has from elsewhere" in rollout(
        "--set", "teacher.extra={n = 4}", code=2
    )
    assert "unknown key teacher.modle; did you mean teacher.model?" in rollout("--set", "teacher.modle=x", code=2)
    text = config.read_text()
    config.write_text(text[: text.index("[teacher]")] + text[text.index("[data]") :])
    assert cli.main(["rollout", str(config)]) == 2
    assert "model is required, a checkpoint to sample from; or teacher" in capsys.readouterr().err
    assert handler.asked == []
