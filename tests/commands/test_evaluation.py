"""Tests whole evaluations on a tiny model that answers 1, 2, 2.0 or nothing, about equally often."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import forked
import psutil
import pytest
import torch
from inside import with_code
from safetensors.torch import load_file

import megatron_rl.evaluation.evaluate as evaluate_module
from megatron_rl.cli import main
from megatron_rl.config.benchmarks import BenchmarkSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.load import load_config
from megatron_rl.config.reward import RewardSection
from megatron_rl.evaluation.evaluate import run_evaluation
from megatron_rl.evaluation.report import markdown, show
from megatron_rl.evaluation.responses import Judged, as_line, judged_rows, read_verdicts
from megatron_rl.evaluation.results import summarise
from megatron_rl.evaluation.votes import Votes, count_votes, vote
from megatron_rl.locks import sole_writer
from megatron_rl.preflight.checks import check_start
from megatron_rl.preflight.registry import Start

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "megatron_rl.cli"]
CONFIG = """
[model]
path = "{folder}/sft/hf"
[rollout]
max_prompt_tokens = 32
max_response_tokens = 16
max_running_requests = 16
servers = 1
[reward]
kind = "math"
timeout_seconds = 300
[benchmarks.ones]
path = "{folder}/ones.jsonl"
samples = 5
[benchmarks.twos]
path = "{folder}/twos.jsonl"
samples = 4
prompts = 6
pass_at = [1, 3]
"""
SFT = """
run_dir = "{folder}/sft"
model.path = "{folder}/model"
optimizer.learning_rate = 1e-2
data = {{train = "{folder}/sft.jsonl", batch_tokens = 1000}}
train = {{steps = 50, micro_batch_tokens = 1000}}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    says = ["\\boxed{1}", "\\boxed{2}", "\\boxed{2.0}", "Who knows"]
    chance = random.Random(0)
    chats = [(f"q {chance.choice('abcdefgh')}", chance.choice(says)) for _ in range(400)]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats]
    write(folder / "sft.jsonl", [{"id": str(i), "messages": row} for i, row in enumerate(rows)])
    for name, answer in (("ones", "1"), ("twos", "2")):
        prompts = [{"domain": "early" if c < "e" else "late", "prompt": f"q {c}", "answer": answer} for c in "abcdefgh"]
        write(folder / f"{name}.jsonl", prompts)
    (folder / "sft.toml").write_text(SFT.format(folder=folder))
    (folder / "evaluate.toml").write_text(CONFIG.format(folder=folder))
    model = ["--hidden-size", "32", "--layers", "2", "--experts", "4", "--moe-intermediate-size", "32"]
    forked.run([sys.executable, ROOT / "tools/make_tiny_model.py", folder / "model", *model]).check_returncode()
    forked.run([*CLI, "sft", folder / "sft.toml"]).check_returncode()
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    evaluate(inputs, inputs / "whole")
    return inputs / "whole"


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(inputs: Path, output: Path, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [*CLI, "evaluate", inputs / "evaluate.toml", "--output", output, *options]
    done = forked.run(command)
    assert done.returncode == code, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done


def evaluate_here(inputs: Path, output: Path, *changes: str, names: tuple[str, ...] = ()) -> None:
    """Evaluate in this process. A process of its own would spend seconds on its imports."""
    config = load_config(EvaluateConfig, inputs / "evaluate.toml", changes)
    assert run_evaluation(config, output, names, resume=output.exists()) == 0


def results(folder: Path) -> dict:
    """Return the results without the speed."""
    found = json.loads((folder / "results.json").read_text())
    for benchmark in found["benchmarks"].values():
        del benchmark["speed"]
    return found


def lines(folder: Path, name: str) -> list[str]:
    return sorted((folder / f"{name}.jsonl").read_text().splitlines())


def elected(rows: tuple[dict, ...]) -> float:
    """Return the probability that a majority vote of these responses is right, where ties are drawn by lot."""
    votes = Counter(float(row["answer"]) for row in rows if row["answer"] is not None)
    best = [answer for answer, count in votes.items() if count == max(votes.values())]
    right = {float(row["answer"]) for row in rows if row["score"]}
    return len(right & set(best)) / len(best) if best else 0.0


def test_every_number_is_what_the_stored_responses_say(inputs: Path, whole: Path) -> None:
    found = results(whole)
    assert list(found["benchmarks"]) == ["ones", "twos"]
    for name, gold, prompts, size, at in (("ones", 1.0, 8, 5, "1245"), ("twos", 2.0, 6, 4, "13")):
        rows = [json.loads(line) for line in lines(whole, name)]
        assert len(rows) == prompts * size
        groups: dict[str, list[dict]] = {}
        for row in rows:
            assert row["score"] == (row["answer"] is not None and float(row["answer"]) == gold)
            assert row["response"] == (f"\\boxed{{{row['answer']}}}" if row["answer"] else "Who knows")
            groups.setdefault(row["prompt"], []).append(row)
        assert {tuple(sorted(row["sample_index"] for row in group)) for group in groups.values()} == {(*range(size),)}
        told = found["benchmarks"][name]
        mean = fmean(row["score"] for row in rows)
        assert 0.1 < mean < 0.9
        assert told["average"]["value"] == pytest.approx(mean)
        assert told["average"]["low"] < mean < told["average"]["high"]
        assert "".join(told["pass_at"]) == "".join(told["majority_at"]) == at
        for k in map(int, at):
            draws = [list(combinations(group, k)) for group in groups.values()]
            passed = fmean(fmean(any(row["score"] for row in draw) for draw in of_one) for of_one in draws)
            voted = fmean(fmean(map(elected, of_one)) for of_one in draws)
            assert told["pass_at"][str(k)]["value"] == pytest.approx(passed)
            assert told["majority_at"][str(k)]["value"] == pytest.approx(voted)
        for kind, letters in (("early", "abcd"), ("late", "efgh")):
            expected = fmean(row["score"] for row in rows if row["prompt"][-1] in letters)
            assert told["by_kind"][kind]["value"] == pytest.approx(expected)
        assert told["reasons"] == Counter(row["reason"] for row in rows)
        assert told["no_answer_share"] == pytest.approx(fmean(row["answer"] is None for row in rows))
        assert told["response_tokens_mean"] == pytest.approx(fmean(row["num_tokens"] for row in rows))
        assert told["response_tokens_max"] == max(row["num_tokens"] for row in rows)
        assert (told["truncated_share"], told["error_share"]) == (0.0, 0.0)
    both = [found["benchmarks"][name]["average"]["value"] for name in ("ones", "twos")]
    assert found["average"]["value"] == pytest.approx(fmean(both))
    assert f"| average |  | {100 * fmean(both):.1f} [" in (whole / "results.md").read_text()


# Signals the command once it has written so much. SIGTERM goes on as SIGINT does.
AFTER_SOME_RESPONSES = """
import os, signal
from megatron_rl.rollout.append_log import _Appending
write, signalled = _Appending._write, False
def write_and_signal(appending, texts):
    global signalled
    write(appending, texts)
    if not signalled and os.path.getsize(appending._file.name) > 5000:
        signalled = True
        os.kill(os.getpid(), signal.SIGTERM)
_Appending._write = write_and_signal
"""


def test_a_stop_keeps_the_responses_and_resume_comes_to_the_same_numbers(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    # Far more than there is before the signal; the first samples of every prompt are those of the whole evaluation.
    options = ["evaluate", str(inputs / "evaluate.toml"), "--output", str(tmp_path / "out"), "--benchmark", "ones"]
    many = [*CLI, *options, "--set", "benchmarks.ones.samples=3000"]
    responses = tmp_path / "out/ones.jsonl"
    process = subprocess.run(with_code(many, AFTER_SOME_RESPONSES), stderr=subprocess.PIPE, timeout=600, check=False)
    said = process.stderr
    server = int((tmp_path / "out/evaluate_server_0.pid").read_text())
    assert process.returncode == 75, said[-2000:]
    assert f"the responses so far are in {tmp_path}/out; --resume goes on with them" in said.decode()
    assert b"Traceback" not in said
    assert not psutil.pid_exists(server)
    assert not (tmp_path / "out/results.json").exists()
    kept = responses.read_text().splitlines()
    responses.write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:50])  # as a kill in the middle of a write leaves it
    evaluate(inputs, tmp_path / "out", "--resume")
    assert set(lines(whole, "ones")) <= set(lines(tmp_path / "out", "ones"))
    assert lines(tmp_path / "out", "twos") == lines(whole, "twos")
    assert {*kept[:-1]} <= {*lines(tmp_path / "out", "ones")}
    assert results(tmp_path / "out") == results(whole)


def test_more_samples_go_on_from_fewer(inputs: Path, whole: Path, tmp_path: Path) -> None:
    evaluate_here(inputs, tmp_path / "out", "benchmarks.ones.samples=2", names=("ones",))
    assert results(tmp_path / "out")["benchmarks"]["ones"]["samples_per_prompt"] == 2
    # Another number of servers, and of slots.
    evaluate_here(inputs, tmp_path / "out", "rollout.servers=2", "rollout.max_running_requests=5")
    assert results(tmp_path / "out") == results(whole)


def test_top_p_reaches_the_server(inputs: Path, tmp_path: Path) -> None:
    evaluate_here(inputs, tmp_path / "out", "rollout.top_p=0.01", names=("ones",))
    rows = [json.loads(line) for line in lines(tmp_path / "out", "ones")]
    assert len({(row["prompt"], row["response"]) for row in rows}) == 8  # greedy: all samples of a prompt are alike


def test_temperature_0_is_greedy(inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that neither the seed nor top-p changes a greedy response."""
    changes = ("rollout.temperature=0", "benchmarks.ones.samples=2")
    evaluate_here(inputs, tmp_path / "one", *changes, "seed=1", names=("ones",))
    evaluate_here(inputs, tmp_path / "other", *changes, "seed=2", "rollout.top_p=1.0", names=("ones",))
    found = [{(row["prompt"], row["response"]) for row in map(json.loads, lines(tmp_path / name, "ones"))}
             for name in ("one", "other")]  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0]) == 8
    assert "rollout.temperature 0 is greedy, so all samples of a prompt are alike; samples = 1" in caplog.text


def test_a_domain_of_the_rewards_that_no_benchmark_has_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names 'erly', but no prompt of the benchmarks has.*Did you mean 'early'\?"):
        evaluate_here(inputs, tmp_path / "out", "reward.domains.erly=stem")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_answers_that_cannot_be_judged_are_told_and_fail(inputs: Path, tmp_path: Path) -> None:
    options = ["--benchmark", "ones", "--set", "benchmarks.ones.reward=choice", "--set", "benchmarks.ones.samples=1"]
    said = evaluate(inputs, tmp_path / "out", *options, code=1).stderr
    assert "of the responses could not be judged (error " in said
    assert "do not trust the results" in said
    rows = [json.loads(line) for line in lines(tmp_path / "out", "ones")]
    assert {row["details"] for row in rows if row["reason"] == "error"} == {
        "the reference answer '1' is no letter of a choice"
    }
    share = sum(row["reason"] == "error" for row in rows) / 8
    assert results(tmp_path / "out")["benchmarks"]["ones"]["error_share"] == share > 0.2


def test_what_no_judge_got_to_is_judged_again_from_its_text(inputs: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("evaluate_server*"))
    rows = [json.loads(line) for line in (whole / "ones.jsonl").open()]
    for row in rows[::3]:
        row |= {"score": 0.0, "reason": "timeout", "details": "not done after 3 s"}
    write(tmp_path / "out/ones.jsonl", rows)
    patience = ["reward.timeout_seconds=600", "reward.judge.timeout_seconds=300", "reward.judge.concurrent=1"]
    evaluate_here(inputs, tmp_path / "out", *patience)
    assert results(tmp_path / "out")["benchmarks"] == results(whole)["benchmarks"]
    assert lines(tmp_path / "out", "ones") == lines(whole, "ones")
    assert not list((tmp_path / "out").glob("evaluate_server*")), "nothing was left to sample"


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        ([], ["threes"], "--benchmark threes is not one of the configuration's: ones, twos"),
        (["rollout.top_p=1.0", "seed=2"], [], "sampling.top_p was 0.95, now 1.0; sampling.seed was 1, now 2; set them"),
        (["benchmarks.ones.reward=exact"], [], "benchmarks.ones.reward was None, now 'exact'"),
        (["reward.domains.early=stem"], [], "reward.domains.early was None, now 'stem'"),
        (["model.path={folder}/model"], [], "model.path was '.*/sft/hf', now '.*/model'; model.files.* was '.* bytes"),
        (["benchmarks.ones.path={folder}/twos.jsonl"], [], "benchmarks.ones.sha256 was"),
        (["benchmarks.ones.path=nowhere.jsonl"], [], "data file nowhere.jsonl does not exist"),
    ],
)
def test_an_evaluation_goes_on_only_as_what_it_was(
    inputs: Path, whole: Path, change: list[str], names: list[str], message: str
) -> None:
    before = {path: path.read_bytes() for path in whole.iterdir()}
    config = load_config(EvaluateConfig, inputs / "evaluate.toml", [c.format(folder=inputs) for c in change])
    with pytest.raises(ValueError, match=message):
        run_evaluation(config, whole, names, resume=True)
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_other_mistakes_are_named_before_a_server_starts(inputs: Path, whole: Path, tmp_path: Path) -> None:
    config = load_config(EvaluateConfig, inputs / "evaluate.toml")
    with pytest.raises(ValueError, match="whole holds an evaluation; add --resume to go on with it"):
        run_evaluation(config, whole, [], resume=False)
    shutil.copy(inputs / "ones.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"ones.jsonl was written by no evaluation; name another --output"):
        run_evaluation(config, tmp_path, [], resume=True)
    more = load_config(EvaluateConfig, inputs / "evaluate.toml", ["benchmarks.twos.prompts=9"])
    with pytest.raises(ValueError, match=r"twos.jsonl holds 8 prompts, benchmarks.twos.prompts is 9; lower it"):
        run_evaluation(more, tmp_path / "new", [], resume=False)
    short = load_config(EvaluateConfig, inputs / "evaluate.toml", ["rollout.max_prompt_tokens=1"])
    with pytest.raises(ValueError, match=r"have more tokens than rollout.max_prompt_tokens = 1: "):
        run_evaluation(short, tmp_path / "new", [], resume=False)
    assert not (tmp_path / "new").exists(), "a failed try leaves nothing"
    with sole_writer(whole, "wait"), pytest.raises(ValueError, match="another process is writing to .*whole; wait for"):
        run_evaluation(config, whole, [], resume=True)
    with pytest.raises(ValueError, match=r"pass_at 8 is more than samples 5; raise samples"):
        load_config(EvaluateConfig, inputs / "evaluate.toml", ["benchmarks.ones.pass_at=[8]"])
    with pytest.raises(ValueError, match="benchmarks is required"):
        (tmp_path / "c.toml").write_text('model.path = "model"')
        load_config(EvaluateConfig, tmp_path / "c.toml")
    longer = load_config(EvaluateConfig, inputs / "evaluate.toml", ["rollout.max_response_tokens=32768"])
    with pytest.raises(ValueError, match=r"max_prompt_tokens \+ max_response_tokens = 32800 is over the model's"):
        check_start(Start(config=longer, model=longer.model.path))
    slow = ["rollout.token_deadline_seconds=1e6"]
    larger = load_config(EvaluateConfig, inputs / "evaluate.toml", [*slow, "rollout.max_running_requests=900000000"])
    with pytest.raises(ValueError, match=r"GiB are free: .* lower rollout.max_running_requests or rollout.max_resp"):
        check_start(Start(config=larger, model=larger.model.path))


def judged(index: int, answer: str | None, *, score: float = 0.0, prompt: str = "p", judged_as: str = "math") -> Judged:
    return Judged(
        position=index, sample_index=index, prompt_id=prompt, kind="k", judged_as=judged_as, prompt="?", response="!",
        answer=answer, score=score, reason="correct" if score else "wrong", details="", num_tokens=3,
        finish_reason="stop",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("judged_as", "same", "others"),
    [
        ("math", ["1/2", "0.5", "\\frac{1}{2}", " \\dfrac12 "], ["0.51", "\\sqrt{2}", "-1/2"]),
        ("math", ["\\sqrt{2}", "$\\sqrt{2}$", "\\sqrt{2}."], ["2", "\\sqrt{3}"]),
        ("stem", ["1,000", "1000", "10^3"], ["1,000 m"]),
        ("choice", ["B", "(b)", "\\text{B}", "B. Paris"], ["C", "Paris"]),
        ("exact", ["0.5", " 0.5 "], ["1/2"]),
        ("math", ["9" * 6000], ["9" * 6001]),
    ],
)
def test_votes_are_told_apart_by_what_they_mean(judged_as: str, same: list[str], others: list[str]) -> None:
    assert len({vote(answer, judged_as) for answer in same}) == 1
    assert len({vote(answer, judged_as) for answer in [same[0], *others]}) == 1 + len(others)


def test_correct_responses_vote_together_and_silent_ones_not_at_all() -> None:
    rows = [judged(i, answer) for i, answer in enumerate(["3", "3.0", "4", None, None])]
    rows += [judged(5, "\\sin^2 x", score=1.0), judged(6, "1-\\cos^2 x", score=1.0)]
    assert count_votes(rows) == Votes(num_correct=2, others=(1, 2), num_silent=2)


def test_programs_have_no_majority_and_a_table_leaves_it_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [judged(i, None, score=float(i < 2), judged_as="code") for i in range(4)]
    found = summarise(rows, (1, 2))
    assert found.majority_at is None
    assert found.pass_at[2].value == pytest.approx(1 - 1 / 6)
    assert "| c | 1 x 4 | 50.0 [5.5, 94.5] | 83.3 @2 |  | 3 | 0.0 | 0.0 | 0.0 |" in markdown({"c": found}, "model")
    show({"c": found}, "model")
    shown = capsys.readouterr().out
    assert "50.0 [5.5, 94.5]" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_responses_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [judged(1, "\u2028 \u0085", score=1.0), judged(0, None)]
    (tmp_path / "file").write_text("".join(map(as_line, rows)))
    assert list(judged_rows(tmp_path / "file")) == rows
    numbers = read_verdicts(tmp_path / "file")
    assert numbers == [replace(row, prompt="", response="") for row in rows[::-1]]
    # Without the texts they say the same, also of what is elected.
    assert summarise(numbers, (1,)) == summarise(rows, (1,))
    (tmp_path / "file").write_text('{"position": 1}\n')
    with pytest.raises(ValueError, match="file line 1 is no judged response"):
        read_verdicts(tmp_path / "file")


def test_a_benchmark_has_powers_of_two_by_itself_and_the_reward_of_its_domain(tmp_path: Path) -> None:
    assert [BenchmarkSection(path="x", samples=k).at for k in (1, 6, 8)] == [(1,), (1, 2, 4, 6), (1, 2, 4, 8)]
    assert RewardSection(kind="math", domains={"code": "code"}).kind_of("code") == "code"


def test_a_try_that_fails_before_its_first_response_leaves_only_the_logs_of_its_servers(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(EvaluateConfig, inputs / "evaluate.toml")

    @asynccontextmanager
    async def broken(*_: object) -> AsyncIterator[None]:
        (tmp_path / "out/evaluate_server_0.log").write_text("no GPU")
        raise ValueError("the generation server ended with code 1")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_module, "serving", broken)
        with pytest.raises(ValueError, match="ended with code 1"):
            run_evaluation(config, tmp_path / "out", [], resume=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["evaluate_server_0.log"]


def test_a_checkpoint_of_a_run_is_converted_for_as_long_as_it_is_served(inputs: Path, tmp_path: Path) -> None:
    """Check that `evaluate` takes a checkpoint or a model directory, as `model.path` of a training run does."""
    from megatron_rl.evaluation.weights import served_model

    model = tmp_path / "model"
    (step,) = (inputs / "sft/checkpoints").glob("step_*")
    with served_model(step, tmp_path) as weights:
        assert weights.parent == tmp_path
        shutil.copytree(weights, model)
    assert not weights.exists()
    with served_model(model, tmp_path) as weights:
        assert weights == model
    tensors = [
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (model, inputs / "sft/hf")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_a_file_for_another_command_is_told_in_one_sentence(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(inputs / "sft.toml"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "sft.toml is for `megatron-rl sft`, and this is `megatron-rl evaluate`; run that command" in said
    assert len(said) < 300
    assert not (tmp_path / "out").exists()
    assert main(["train", str(inputs / "evaluate.toml")]) == 2
    assert "is for `megatron-rl evaluate`, and this is `megatron-rl train`" in capsys.readouterr().err
    # Other mistakes are named, and a long list of them is cut.
    (tmp_path / "many.toml").write_text("".join(f"key{i} = 1\n" for i in range(100)) + "[benchmarks]\n")
    assert main(["evaluate", str(tmp_path / "many.toml"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "unknown key key0" in said
    assert re.search(r"; and \d\d more$", said.strip())
