"""Tests validation in a run: what its files keep, which step is the best, and whole runs of a tiny model."""

import json
import math
import os
import random
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import forked
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import killed
from made_runs import make_run
from ports import free_port
from rank_zero import config_of

from megatron_rl.checkpoint.steps import forget_old
from megatron_rl.config.benchmarks import BenchmarkSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.evaluation.evaluate import run_evaluation
from megatron_rl.evaluation.results import BenchmarkResult
from megatron_rl.evaluation.settings import benchmark_settings
from megatron_rl.evaluation.statistics import Estimate
from megatron_rl.evaluation.validations import Validations, best_row, read_validations, validation_metrics
from megatron_rl.metric_names import unknown
from megatron_rl.preflight.checks import check_start
from megatron_rl.preflight.registry import Start
from megatron_rl.report.build import page_data
from megatron_rl.report.curves import curves
from megatron_rl.report.runs import read_run, read_runs
from megatron_rl.report.summary import facts
from megatron_rl.rollout.provenance import write_settings
from megatron_rl.train.orchestrator.validation import _check_unchanged

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "megatron_rl.cli"]


def found(value: float, is_share: bool = True) -> BenchmarkResult:
    low, high = (value - 0.1, value + 0.1) if is_share else (-math.inf, math.inf)
    average = Estimate(value=value, low=low, high=high, is_share=is_share)
    return BenchmarkResult(
        num_prompts=2, samples_per_prompt=1, average=average, pass_at={1: average}, majority_at=None, by_kind={},
        reasons={"correct": 2}, response_tokens_mean=3.0, response_tokens_max=4, truncated_share=0.0,
        no_answer_share=0.0, error_share=0.0,
    )  # fmt: skip


def validated(run_dir: Path, scores: dict[int, float]) -> Validations:
    validations = Validations(run_dir)
    for step, score in scores.items():
        validations.add(step, 2.0, {"toys": found(score)})
        validations.folder(step).mkdir(parents=True)
        (validations.folder(step) / "toys.jsonl").write_text("{}\n")
    return validations


# ------------------------------------------------------------------------------------------------------------- files


def test_what_a_resumed_run_does_again_is_validated_again(tmp_path: Path) -> None:
    validated(tmp_path, {0: 0.2, 5: 0.3, 10: 0.4, 15: 0.1})
    left = Validations(tmp_path)
    left.forget_behind(20)
    assert [row["step"] for row in left.rows] == [0, 5, 10, 15]
    left.forget_behind(10)  # whose weights the checkpoint has
    assert [row["step"] for row in left.rows] == [row["step"] for row in read_validations(tmp_path)] == [0, 5, 10]
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == [f"step_{n:06d}" for n in (0, 5, 10)]
    left.add(10, 3.0, {"toys": found(0.5)})
    assert [row["benchmarks"]["toys"]["average"]["value"] for row in read_validations(tmp_path)] == [0.2, 0.3, 0.5]
    left.forget_behind(-1)  # a new run in this folder
    assert Validations(tmp_path).rows == []
    assert list((tmp_path / "validation").iterdir()) == []


def test_the_interval_of_a_single_score_that_is_no_share_has_no_ends(tmp_path: Path) -> None:
    row = Validations(tmp_path).add(3, 2.0, {"toys": found(1.5, is_share=False), "more": found(0.5)})
    (read,) = read_validations(tmp_path)
    assert validation_metrics(read) == validation_metrics(row) == {
        "validation/toys": 1.5, "validation/more": 0.5, "validation_low/more": 0.4, "validation_high/more": 0.6,
    }  # fmt: skip
    assert unknown(validation_metrics(row)) == []


@given(st.dictionaries(st.integers(0, 50), st.integers(0, 3), max_size=20))
def test_the_best_step_is_the_first_of_the_highest_score(scores: dict[int, int]) -> None:
    rows = [{"step": step, "benchmarks": {"toys": {"average": {"value": scores[step]}}}} for step in sorted(scores)]
    best = best_row(rows, "toys")
    if not scores:
        assert best is None
    else:
        assert best is not None
        assert best["step"] == min(step for step in scores if scores[step] == max(scores.values()))
    assert best_row(rows, "others") is None


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"step": 1}', '{"step": "x", "benchmarks": {}}', '{"step": 1, "benchmarks": {"a": 1}}']
)
def test_a_line_that_is_no_validation_is_named(tmp_path: Path, line: str) -> None:
    validated(tmp_path, {0: 0.5})
    with (tmp_path / "validation.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"validation.jsonl line 2 is no validation of a run; remove the file"):
        read_validations(tmp_path)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12, unique=True), st.integers(1, 4), st.integers(0, 5), st.data()
)
def test_the_best_checkpoint_stays_however_old_it_gets(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep_last: int, keep_every: int, data: st.DataObject
) -> None:
    folder, best = tmp_path_factory.mktemp("run"), data.draw(st.sampled_from([None, *steps]))
    for order, step in enumerate(sorted(steps)):
        path = folder / f"step_{step}"
        path.mkdir()
        os.utime(path, (order, order))
        forget_old(path, keep_last, keep_every, best)
    left = {int(path.name.removeprefix("step_")) for path in folder.iterdir()}
    stays = {step for step in steps if step == best or (keep_every and step % keep_every == 0)}
    assert left == stays | set(sorted(steps)[-keep_last:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": 1}, "its key prompts changed"),
        ({"reward": "exact"}, "its key reward changed"),
        ({"suffix": " Think."}, "its key suffix changed"),
        ({"samples": 8}, None),  # more of the same
    ],
)
def test_a_resume_with_another_benchmark_under_the_same_name_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str | None
) -> None:
    questions = tmp_path / "toys.jsonl"
    questions.write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    validations = validated(tmp_path, {0: 0.5, 2: 0.6})
    rest = {"model": {"path": "m"}, "sampling": {"max_response_tokens": 16}, "reward": {"kind": "math"}}

    def settings(**changes: Any) -> dict[str, Any]:
        return rest | {"benchmark": benchmark_settings(BenchmarkSection(path=questions, **changes))}

    for step in (0, 2):
        write_settings(tmp_path / f"validation/step_{step:06d}/toys.settings.json", settings())
    _check_unchanged(validations, "toys", settings())
    _check_unchanged(validations, "others", settings(**change))
    if said is None:
        _check_unchanged(validations, "toys", settings(**change))
    else:
        with pytest.raises(ValueError, match=f"toys is not what the scores of this run up to step 2 are of: {said}; "):
            _check_unchanged(validations, "toys", settings(**change))
    questions.write_text('{"prompt": "1 + 1", "answer": "3"}\n')
    with pytest.raises(ValueError, match="the text of its file changed; put it back, or give the new one another name"):
        _check_unchanged(validations, "toys", settings())


def test_a_resume_that_samples_validation_otherwise_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    validations = validated(tmp_path, {4: 0.5})
    before = {"model": {"path": "m"}, "sampling": {"top_p": 0.9}, "reward": {"kind": "math"}, "benchmark": {}}
    write_settings(tmp_path / "validation/step_000004/toys.settings.json", before)
    _check_unchanged(validations, "toys", before | {"model": {"path": "moved"}})
    assert caplog.messages == []
    _check_unchanged(validations, "toys", before | {"sampling": {"top_p": 0.5}})
    (told,) = caplog.messages
    assert "toys: its scores up to step 4 were made with other settings (sampling.top_p was 0.9, now 0.5)" in told
    (tmp_path / "validation/step_000004/toys.settings.json").unlink()
    _check_unchanged(validations, "toys", before | {"benchmark": {"prompts": 1}})


# ------------------------------------------------------------------------------------------------------ configuration


BENCHMARK = 'validation.benchmarks={toys = {path = "x.jsonl"}, more = {path = "y.jsonl", samples = 2}}'


def test_samples_of_validation_are_those_of_benchmarks_that_name_none_also_when_read_back(tmp_path: Path) -> None:
    config = config_of(tmp_path, "validation.every=2", "validation.samples=8", BENCHMARK)
    assert config.validation is not None
    assert {name: one.samples for name, one in config.validation.benchmarks.items()} == {"toys": 8, "more": 2}
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(RlConfig, tmp_path / "again.toml") == config
    assert [step for step in range(5) if config.is_validated(step)] == [0, 2, 4]
    assert [
        step
        for step in range(8)
        if config_of(tmp_path, "validation.every=5", BENCHMARK, "train.steps=7").is_validated(step)
    ] == [0, 5, 7]
    assert not config_of(tmp_path).is_validated(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["train.keep_best=toys"],
            r"keep_best 'toys' is no benchmark of validation; write \[validation.benchmarks.toys\]",
        ),
        (["train.keep_best=toy", "validation.every=2", BENCHMARK], "keep_best 'toy' is no .* take one of toys, more"),
        (["validation.every=2"], "validation.benchmarks is required"),
        (["validation.every=0", BENCHMARK], "validation.every: .* greater than 0"),
        (["validation.every=2", "validation.temperature=1e-8", BENCHMARK], "1e-08 is too near to 0 to divide by"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, *changes)


# -------------------------------------------------------------------------------------------------------------- report


def test_the_report_draws_scores_with_their_intervals_up_to_the_last_weights(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 4)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = validated(folder, {0: 0.3, 2: 0.7, 4: 0.4})
    for row in rows[::2]:
        row |= validation_metrics(next(one for one in validations.rows if one["step"] == row["step"]))
        row["validation_seconds"] = 3600.0
        row["step_seconds"] = 0.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(folder, "run")
    drawn = curves(run, width=1)
    assert drawn["x"] == [0, 1, 2, 3, 4]
    assert drawn["metrics"]["validation/toys"] == [
        [0.3, None, 0.7, None, 0.4], [0.2, None, 0.6, None, 0.3], [0.4, None, 0.8, None, 0.5],
    ]  # fmt: skip
    assert drawn["metrics"]["reward"][0][4] is None
    assert drawn["hours"][0] == 1.0
    assert run.num_steps == 4
    assert not [name for name in drawn["metrics"] if name.startswith(("validation_low", "validation_high"))]
    assert curves(run, width=2)["metrics"]["validation/toys"] == [[0.3, 0.7, 0.4], [0.2, 0.6, 0.3], [0.4, 0.8, 0.5]]
    told = dict(facts(run, None))["validation of toys, best and last"]
    assert told == "70.0 [60.0, 80.0] after 2 steps, 40.0 [30.0, 50.0] after 4 steps"
    (plot,) = [
        plot for section in page_data(read_runs([folder]), 0, [])["sections"] for plot in section["plots"]
        if plot["title"] == "Validation"
    ]  # fmt: skip
    assert plot["curves"] == [{"label": "toys", "metric": "validation/toys"}]


# ---------------------------------------------------------------------------------------------------------- whole runs
# A model that answers 1, 2, 2.0 or nothing, about equally often. The first prompts that it is trained on want 2, those
# behind them 1, and validation asks others for 2: its score has to rise and then to fall.

SFT = """
run_dir = "{folder}/sft"
model.path = "{folder}/model"
optimizer.learning_rate = 1e-2
data = {{train = "{folder}/sft.jsonl", batch_tokens = 1000}}
train = {{steps = 50, micro_batch_tokens = 1000}}
"""
RL = """
run_dir = "run"
threads = 1
model.path = "{folder}/sft/hf"
reward = {{kind = "math", timeout_seconds = 300}}
[[data.stages]]
prompts = 32
train = "{folder}/wants_2.jsonl"
[[data.stages]]
train = "{folder}/wants_1.jsonl"
[rollout]
prompts_per_step = 16
samples_per_prompt = 8
max_prompt_tokens = 32
max_response_tokens = 16
servers = 1
[budget]
tokens = 400
[algorithm]
name = "grpo"
[optimizer]
learning_rate = 4e-3
[train]
steps = 14
keep_last = 1
micro_batch_tokens = 512
"""
VALIDATION = """
[validation]
every = 2
samples = 6
top_p = 1.0
[validation.benchmarks.twos]
path = "{folder}/asked_2.jsonl"
[validation.benchmarks.ones]
path = "{folder}/asked_1.jsonl"
reward = "exact"
samples = 2
"""
BEST = ["--set", "train.keep_best=twos"]


def write(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    says, chance = ["\\boxed{1}", "\\boxed{2}", "\\boxed{2.0}", "Who knows"], random.Random(0)
    chats = [(f"q {chance.choice('abcdefgh')}", chance.choice(says)) for _ in range(400)]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats]
    write(folder / "sft.jsonl", [{"id": str(i), "messages": row} for i, row in enumerate(rows)])
    for letters, name in (("abcd", "wants"), ("efgh", "asked")):
        for answer in "12":
            prompts = [{"domain": "toys", "prompt": f"q {letter}", "answer": answer} for letter in letters]
            write(folder / f"{name}_{answer}.jsonl", prompts)
    (folder / "sft.toml").write_text(SFT.format(folder=folder))
    model = ["--hidden-size", "32", "--layers", "2", "--experts", "4", "--moe-intermediate-size", "32"]
    forked.run([sys.executable, ROOT / "tools/make_tiny_model.py", folder / "model", *model]).check_returncode()
    forked.run([*CLI, "sft", folder / "sft.toml"]).check_returncode()
    return folder


def command(inputs: Path, folder: Path, *options: str, text: str = RL + VALIDATION) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "rl.toml").write_text(text.format(folder=inputs).replace('"run"', f'"{folder}/run"'))
    return [*CLI, "train", str(folder / "rl.toml"), *options]


def finish(arguments: list[str], code: int = 0) -> str:
    done = forked.run(arguments)
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout + done.stderr


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert unknown(name for row in rows for name in row) == []
    return rows


def numbers(folder: Path) -> list[dict]:
    """Return the metrics of training alone."""
    names = (
        "reward",
        "num_loss_tokens",
        "loss",
        "entropy",
        "grad_norm",
        "num_generated_tokens",
        "logprob_difference_mean",
    )
    return [{name: row[name] for name in names} for row in rows_of(folder)]


def scores(folder: Path, name: str = "twos") -> dict[int, float]:
    return {row["step"]: row["benchmarks"][name]["average"]["value"] for row in read_validations(folder / "run")}


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "said").write_text(finish(command(inputs, folder, *BEST)), encoding="utf-8")
    return folder


def test_validation_sees_what_is_unlearned_and_the_best_checkpoint_is_kept(whole: Path) -> None:
    found = scores(whole)
    assert list(found) == [0, 2, 4, 6, 8, 10, 12, 14]
    best = max(found, key=found.__getitem__)
    assert best in (2, 4, 6)
    assert found[0] < found[best] / 1.5
    assert found[14] < found[best] / 2
    rewards = [row["reward"] for row in rows_of(whole)]
    assert rewards[-1] > 0.5 > max(rewards[2:6])  # of training, which sees nothing of it
    names = sorted(path.name for path in (whole / "run/checkpoints").iterdir())
    assert names == sorted(["latest", f"step_{best}", "step_14"])
    said = (whole / "said").read_text(encoding="utf-8")
    assert f"of step {best}, {whole}/run/checkpoints/step_{best}; megatron-rl convert" in said
    rows = rows_of(whole)
    assert {row["step"]: row["validation/twos"] for row in rows if "validation/twos" in row} | {14: found[14]} == found
    for step, row in enumerate(rows):
        assert ("validation_seconds" in row) == (step % 2 == 0)
    for step, value in found.items():
        judged = [
            json.loads(line) for line in (whole / f"run/validation/step_{step:06d}/twos.jsonl").read_text().splitlines()
        ]
        assert len(judged) == 4 * 6
        assert fmean(row["score"] for row in judged) == pytest.approx(value)


def test_the_last_validation_is_what_evaluate_says_of_the_model(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Check that other servers, which read the exported model, get the same results."""
    rl = load_config(RlConfig, whole / "run/config.toml")
    assert rl.validation is not None
    values = {
        "model": {"path": whole / "run/hf"},
        "rollout": {"max_prompt_tokens": 32, "max_response_tokens": 16, "servers": 1, "top_p": 1.0},
        "reward": {"kind": "math"},
        "benchmarks": {name: one.model_dump() for name, one in rl.validation.benchmarks.items()},
    }
    assert run_evaluation(EvaluateConfig.model_validate(values), tmp_path / "out", (), resume=False) == 0
    expected = json.loads((tmp_path / "out/results.json").read_text())["benchmarks"]
    *_, last = read_validations(whole / "run")
    for name, result in last["benchmarks"].items():
        del expected[name]["speed"]
        assert result == expected[name]


def test_training_is_the_same_to_the_digit_without_validation(inputs: Path, whole: Path, tmp_path: Path) -> None:
    finish(command(inputs, tmp_path, text=RL))
    assert numbers(tmp_path) == numbers(whole)
    assert not [name for row in rows_of(tmp_path) for name in row if name.startswith("validation")]
    assert not (tmp_path / "run/validation").exists()


# Ends the run behind the first responses of the third validation, once wandb, which starts beside the run, has a file.
IN_A_VALIDATION = """
import pathlib, time
from megatron_rl.rollout.append_log import _Appending
write = _Appending._write
def write_and_end(appending, texts):
    write(appending, texts)
    path = pathlib.Path(appending._file.name)
    if path.parts[-2:] == ("step_000004", "twos.jsonl"):
        run = path.parents[2]
        while "wandb" in (run / "config.toml").read_text() and not [*run.glob("wandb/offline-run-*/run-*.wandb")]:
            time.sleep(0.01)
        end_now()
_Appending._write = write_and_end
"""


def test_a_run_that_is_killed_in_a_validation_goes_on_to_the_same_numbers_under_one_tracked_run(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    to = [name for name in ("tensorboard", "wandb", "trackio") if find_spec(name)]
    arguments = command(inputs, tmp_path, *BEST, "--set", f"tracking.to={to}")
    killed(arguments, IN_A_VALIDATION, 800)
    responses = tmp_path / "run/validation/step_000004/twos.jsonl"
    kept = responses.read_text().splitlines()[:5]
    responses.write_text("\n".join(kept) + "\n" + kept[-1][:40])  # whenever the kill came
    run_id = (tmp_path / "run/tracking/id").read_text()
    finish([*arguments, "--resume"])
    assert numbers(tmp_path) == numbers(whole)
    assert scores(tmp_path) == scores(whole)
    assert scores(tmp_path, "ones") == scores(whole, "ones")
    assert (tmp_path / "run/tracking/id").read_text() == run_id
    if "wandb" in to:
        assert len(list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))) == 2


def test_two_ranks_validate_between_phases_on_servers_that_lend_their_memory(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    """Check that two ranks validate all weights, also the last ones, after which nothing is trained."""
    changes = ("rollout.release_memory=true", "train.offload_while_generating=true", "train.steps=3")
    arguments = command(inputs, tmp_path, *BEST, *(word for change in changes for word in ("--set", change)))
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        forked.Program(arguments, tmp_path / f"log{rank}", os.environ | place | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    try:
        codes = [rank.wait(600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], (tmp_path / "log0").read_text()[-4000:]
    found, rows = scores(tmp_path), rows_of(tmp_path)
    assert list(found) == [0, 2, 3]
    assert found[0] == scores(whole)[0]  # later weights differ by the rounding of two ranks
    assert scores(tmp_path, "ones")[0] == scores(whole, "ones")[0]
    for name in ("reward", "num_generated_tokens"):
        assert rows[0][name] == rows_of(whole)[0][name]
    assert [("release_seconds" in row, "validation_seconds" in row) for row in rows] == [
        (True, True),
        (True, False),
        (True, True),
    ]
    # The last weights are validated behind their checkpoint, so the best one of before may still be there.
    best, before = (max(steps, key=found.__getitem__) for steps in ([0, 2, 3], [0, 2]))
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    needed = {"latest", "step_3"} | ({f"step_{best}"} if best else set())
    assert needed <= names <= needed | {f"step_{before}"}


def test_mistakes_in_benchmarks_are_told_before_a_model_is_built(inputs: Path, tmp_path: Path) -> None:
    def refused(*changes: str, **options: Path) -> str:
        command(inputs, tmp_path)
        config = load_config(RlConfig, tmp_path / "rl.toml", changes)
        with pytest.raises(ValueError) as caught:
            check_start(Start(config=config, world_size=1, **options))
        return str(caught.value)

    write(tmp_path / "wrong.jsonl", [{"prompt": "q", "answer": None}])
    told = refused(f"validation.benchmarks.ones.path={tmp_path}/wrong.jsonl")
    assert "wrong.jsonl:1: field 'answer'" in told
    write(tmp_path / "long.jsonl", [{"prompt": "why " * 60, "answer": "2"}])
    told = refused(f"validation.benchmarks.ones.path={tmp_path}/long.jsonl")
    assert "1 of 1 prompts have more tokens than rollout.max_prompt_tokens = 32" in told
    shutil.copy(inputs / "wants_1.jsonl", tmp_path / "rollouts.jsonl")
    told = refused(rollouts=tmp_path / "rollouts.jsonl")
    assert "validation samples from servers, and with --rollouts there are none; take [validation]" in told
