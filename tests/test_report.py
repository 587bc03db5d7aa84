"""Tests the run report and the page that it writes. tests/browser opens pages in a real browser."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import make_run, response_row, write_rows

from megatron_rl.cli import main
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.report.build import page_data, run_report
from megatron_rl.report.curves import bin_width, binned, curves, metric_columns
from megatron_rl.report.families import groups, offsets, parents
from megatron_rl.report.page import embedded, render
from megatron_rl.report.rollouts import evenly, read_step
from megatron_rl.report.runs import Run, read_run, read_runs, short_names
from megatron_rl.report.sections import sections_for
from megatron_rl.report.summary import changes, facts

HOSTILE = (
    "</script><script>window.hacked = 1</script><!-- <script> {{DATA}} {{SCRIPT}} &lt; ]]>",
    "\x00\x07\x1b\u202e\u2066\u2028\u2029\ud800\U000e0041 \\u003c",
    "x" * 1_000_000,
    "שלום",
)


# ------------------------------------------------------------------------------------------------------------ curves


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=60, unique=True).map(sorted),
    st.integers(1, 70),
    st.data(),
)
def test_a_bin_has_mean_and_range_of_the_values_of_its_steps(steps: list[int], width: int, data: Any) -> None:
    value = st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6))
    values = data.draw(st.lists(value, min_size=len(steps), max_size=len(steps)))
    expected = []
    for k in range(max(steps) // width + 1):
        if inside := [v for s, v in zip(steps, values, strict=True) if k * width <= s < (k + 1) * width]:
            there = [v for v in inside if v == v]
            expected.append((sum(there) / len(there), min(there), max(there)) if there else (np.nan,) * 3)
    found = binned(np.array(steps), np.array(values), width)
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=1e-9, atol=1e-6)


def test_a_long_run_has_at_most_as_many_points_as_asked_for() -> None:
    for num_steps, points, width in ((1, 1000, 1), (1000, 1000, 1), (1001, 1000, 2), (10_000, 1000, 10)):
        assert bin_width(num_steps, points) == width
        assert -(-num_steps // width) <= points


def test_curves_add_up_tokens_and_hours_and_leave_out_what_is_no_number(tmp_path: Path) -> None:
    rows = [{"step": s, "num_loss_tokens": 10, "step_seconds": 1800, "a": s, "b": None, "c": [1]} for s in (0, 1, 2, 5)]
    rows[1] |= {"a": None}
    rows[3] |= {"b": float("inf"), "d": 10**400, "e": True}
    found = curves(the_run(make_run(tmp_path / "run"), rows=rows), width=2)
    assert found["bins"] == [0, 1, 2]
    assert found["x"] == [0.5, 2, 5]
    assert found["tokens"] == [20, 30, 40]
    assert found["hours"] == [1.0, 1.5, 2.0]
    assert found["metrics"]["a"] == [[0, 2, 5], [0, 2, 5], [0, 2, 5]]
    assert set(found["metrics"]) == {"a", "num_loss_tokens", "step_seconds"}


def test_rest_is_what_a_step_takes_beside_its_phases() -> None:
    row = {"step": 0, "rollout_seconds": 1.0, "train_seconds": 2.0, "plan_seconds": 0.25, "step_seconds": 4.0}
    assert metric_columns([row])["rest_seconds"].tolist() == [0.75]
    assert "rest_seconds" not in metric_columns([{"step": 0, "step_seconds": 4.0}])  # of sft


def test_every_metric_is_drawn_once_listed_as_zero_or_under_everything_else() -> None:
    present = {"reward", "reward/math", "reward/code", "kl", "num_dropped_stale", "something_new"}
    found = sections_for(present, zero={"kl", "num_dropped_stale"})
    drawn = [curve["metric"] for s in found for plot in s["plots"] for curve in plot["curves"]]
    assert sorted(drawn) == ["reward", "reward/code", "reward/math", "something_new"]
    assert found[0]["zero"] == ["kl"]
    assert found[-1]["title"] == "Everything else"


def test_the_reward_is_drawn_also_where_it_is_0_throughout() -> None:
    everything = {"reward", "reward/math", "kl", "too_slow_share"}
    (learning,) = sections_for(everything, zero=everything)
    assert [plot["title"] for plot in learning["plots"]] == ["Reward", "Reward by domain"]
    assert learning["zero"] == ["kl"]


def test_the_kinds_of_failure_are_named_with_their_shares(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 20)
    rows = [{"step": i, "reward": 0.0, "no_answer_share": 1.0, "wrong_share": 0.0} for i in range(18)]
    rows += [{"step": i, "reward": 0.0, "no_answer_share": 0.25, "wrong_share": 0.75} for i in (18, 19)]
    found = dict(facts(the_run(folder, rows=rows), None))
    assert found["failed responses, last tenth"] == "wrong answer 75%, no answer 25%"
    old = [{"step": 0, "reward": 0.0}]  # of a version that did not count them
    assert "failed responses, last tenth" not in dict(facts(the_run(folder, rows=old), None))


def test_a_response_shows_what_was_expected_and_extracted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 1)
    path = folder / "rollouts/step_000000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"expected": "7" * 1000, "extracted": "8"}
    rows[1] |= {"expected": "7", "extracted": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = read_runs([folder])
    first, second, third, *_ = read_step(run, 0, 600)["groups"][0]["responses"]
    assert (first["expected"], first["extracted"]) == ("7" * 300, "8")
    assert (second["expected"], "extracted" in second) == ("7", False)
    assert "expected" not in third  # a row of before


# ------------------------------------------------------------------------------------------- groups and stages


def test_runs_that_differ_by_seed_alone_are_a_group_named_by_what_differs(tmp_path: Path) -> None:
    made = [
        make_run(tmp_path / f"{algorithm}-{seed}", 2, seed=seed, algorithm=algorithm, model=f"warm/seed_{seed}/hf")
        for algorithm in ("grpo", "c3po")
        for seed in (1, 2, 3)
    ]
    runs = read_runs(made)
    found = groups(runs, parents(runs))
    assert [(g.label, g.members) for g in found] == [("grpo", (0, 1, 2)), ("c3po", (3, 4, 5))]
    assert [g.differences["algorithm.name"] for g in found] == ["grpo", "c3po"]


def test_runs_that_start_from_other_models_are_no_group(tmp_path: Path) -> None:
    made = [make_run(tmp_path / name, 2, seed=1, model=f"models/{name}") for name in ("small", "large")]
    runs = read_runs(made)
    found = groups(runs, parents(runs))
    assert [(g.label, g.members) for g in found] == [("small", (0,)), ("large", (1,))]


def test_a_stage_follows_the_run_from_whose_model_it_starts(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", 30)
    second = make_run(tmp_path / "second", 10, model=str(first / "hf"))
    early = make_run(tmp_path / "early", 10, model=str(first / "checkpoints/step_20"))
    third = make_run(tmp_path / "third", 10, model=str(second / "hf"))
    runs = read_runs([third, first, early, second])  # in any order
    assert parents(runs) == [3, None, 1, 1]
    assert offsets(runs, parents(runs)) == [40, 0, 20, 30]


def test_stages_of_several_seeds_are_groups_whatever_their_folders_are_called(tmp_path: Path) -> None:
    names = {1: "wren", 2: "lark"}
    firsts = [make_run(tmp_path / name, 3, seed=seed) for seed, name in names.items()]
    seconds = [
        make_run(tmp_path / f"{name}2", 2, seed=seed, algorithm="gspo", model=str(tmp_path / name / "hf"))
        for seed, name in names.items()
    ]
    runs = read_runs([*seconds, *firsts])
    assert [g.members for g in groups(runs, parents(runs))] == [(0, 1), (2, 3)]


def test_a_model_behind_a_link_and_a_relative_path_are_found(tmp_path: Path) -> None:
    """Check paths as they occur: `select` leaves a link, and configurations name paths from the folder of the start."""
    first = make_run(tmp_path / "runs/first", 3)
    (first / "hf").mkdir()
    (tmp_path / "runs/chosen").symlink_to("first/hf")
    second = make_run(tmp_path / "runs/second", 2, model="runs/chosen")
    config = (second / "config.toml").read_text().replace(str(second), "runs/second")
    (second / "config.toml").write_text(config)
    assert parents(read_runs([second, first])) == [1, None]


def test_names_are_as_long_as_telling_runs_apart_needs() -> None:
    assert short_names([Path("/a/b/run"), Path("/a/c/run")]) == ["b/run", "c/run"]
    assert short_names([Path("/a/b/one"), Path("/a/c/two")]) == ["one", "two"]


# ------------------------------------------------------------------------------------------------------- what ran


def test_only_what_is_not_the_default_is_listed(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", algorithm="grpo"), "run")
    listed = {key: (value, usual) for key, value, usual in changes(run)}
    assert listed["algorithm.name"] == ("grpo", "c3po")
    assert listed["train.steps"] == ("30", "required")
    assert "seed" not in listed


def test_a_configuration_of_defaults_alone_lists_required_keys_alone(tmp_path: Path) -> None:
    """Check a config.toml that has every key, in the types that TOML has."""
    from megatron_rl.config.load import dump_config

    folder = make_run(tmp_path / "run")
    config = load_config(RlConfig, folder / "config.toml")
    (folder / "config.toml").write_text(dump_config(config))
    listed = changes(read_run(folder, "run"))
    required = {"run_dir", "model.path", "data.train", "train.steps", "train.micro_batch_tokens", "budget.tokens"}
    required |= {"rollout.prompts_per_step", "rollout.samples_per_prompt"}
    required |= {"rollout.max_prompt_tokens", "rollout.max_response_tokens"}
    assert {key for key, _, usual in listed if usual == "required"} <= required
    assert {key for key, _, _ in listed} <= required


def test_facts_say_how_far_a_run_came(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 30)
    rows = [{"step": s, "reward": s / 10, "num_loss_tokens": 6000, "step_seconds": 2.0} for s in range(20)]
    found = dict(facts(the_run(folder, rows=rows), parent=None))
    assert found["steps"] == "20 of 30"
    assert found["state"] == "not ended"
    assert found["reward, first → last tenth"] == "0.050 → 1.850"
    assert found["best ten steps"] == "1.450 from step 10"
    assert found["tokens trained"] == "120 k"
    assert found["time in steps"] == "40 s"


def test_the_steps_of_resuming_are_those_with_another_start(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 30)
    assert read_run(folder, "run").resumed_at == (), "a run from before this was told"
    rows = [{"step": step, "num_starts": 1 + (step >= 7) + (step >= 20)} for step in range(30)]
    write_rows(folder / "metrics.jsonl", rows)
    assert read_run(folder, "run").resumed_at == (7, 20)


# ------------------------------------------------------------------------------------------------------ responses


@given(st.integers(0, 300), st.integers(1, 40))
def test_evenly_spaced_ones_have_both_ends(size: int, count: int) -> None:
    found = evenly(range(size), count)
    assert len(set(found)) == len(found) == min(size, count)
    assert found == sorted(found)
    if size and count > 1:
        assert (found[0], found[-1]) == (0, size - 1)


def test_traced_groups_come_first_and_rows_find_their_traces(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 2, texts=["the answer is 4"])
    step = read_step(read_run(folder, "run"), 1, characters=1000)
    assert [group["prompt_id"] for group in step["groups"]] == ["id0", "id1", "id2"]
    cut = step["groups"][0]["responses"][2]
    assert "".join(cut["trace"]["tokens"]) == "the answer is 4"
    assert [value is None for value in cut["trace"]["train"]] == [False, False, True, True]
    assert cut["trace"]["versions"] == [[1, 2], [2, 2]]
    assert (cut["num_loss_tokens"], cut["line"]) == (2, 3)
    assert step["groups"][1]["responses"][0]["text"] == ["the answer is 4"]


def test_groups_beside_the_traced_ones_are_spread_over_the_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 1)
    rows = [response_row(i % 4, 0, f"{i // 4}") | {"position": i // 4, "prompt_id": f"id{i // 4}"} for i in range(80)]
    write_rows(folder / "rollouts/step_000000.jsonl", rows)
    step = read_step(read_run(folder, "run"), 0, characters=100)
    assert [group["prompt_id"] for group in step["groups"]] == ["id0", "id1", "id10", "id19"]
    assert step["num_groups"] == 20


def test_long_responses_keep_beginning_and_end_and_say_what_is_missing(tmp_path: Path) -> None:
    text = "".join(f"{i:04d}" for i in range(1000))
    folder = make_run(tmp_path / "run", 1, texts=[text])
    step = read_step(read_run(folder, "run"), 0, characters=600)
    head, missing, tail = step["groups"][1]["responses"][0]["text"]
    assert len(head) + missing + len(tail) == 4000
    assert (head, tail) == (text[: len(head)], text[-len(tail) :])
    assert len(head) + len(tail) == 600
    trace = step["groups"][0]["responses"][0]["trace"]
    first, number = trace["gap"]
    assert first + number + (len(trace["tokens"]) - first) == 1000
    assert "".join(trace["tokens"][:first]) == text[: 4 * first]
    assert "".join(trace["tokens"][first:]) == text[4 * (first + number) :]
    assert len(trace["train"]) == len(trace["rollout"]) == len(trace["tokens"]) <= 100


def trajectory_row() -> dict:
    """Return a row of two segments whose text has 20 characters."""
    first = {"spans": [["aaaa", True], ["bb", False], ["cccc", True]]}
    second = {"shared_tokens": 7, "prompt": "ddd", "spans": [["eeeeeee", True]]}
    return response_row(4, 0, "eeeeeee") | {"num_turns": 3, "num_masked_tokens": 2, "segments": [first, second]}


def test_trajectories_tell_who_wrote_what_and_where_a_segment_begins(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 1)
    row = trajectory_row()
    write_rows(folder / "rollouts/step_000000.jsonl", [row, row | {"sample_index": 1, "segments": [3]}])

    def shown(characters: int) -> list:
        (group,) = read_step(read_run(folder, "run"), 0, characters)["groups"]
        assert "text" in group["responses"][1]  # where the segments are none
        assert (group["responses"][0]["num_turns"], group["responses"][0]["num_masked_tokens"]) == (3, 2)
        return group["responses"][0]["spans"]

    whole = [["aaaa", "policy"], ["bb", "others"], ["cccc", "policy"], ["\n", "segment", 7], ["ddd", "others"]]
    assert shown(21) == [*whole, ["eeeeeee", "policy"]]
    # The first six and the last four of 21 characters are shown.
    assert shown(10) == [["aaaa", "policy"], ["bb", "others"], [11, "gap"], ["eeee", "policy"]]
    assert shown(5) == [["aaa", "policy"], [16, "gap"], ["ee", "policy"]]


def test_a_line_that_is_still_being_written_and_broken_traces_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    path, traces = folder / "rollouts/step_000002.jsonl", folder / "tokens/step_000002.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:5])[:-20])
    rows = [json.loads(line) for line in traces.read_text().splitlines()]
    write_rows(traces, [rows[0] | {"train_logprobs": [0.0]}, {"position": "x"}, rows[1]])
    with traces.open("a") as file:
        file.write('{"position": 6, "sample')
    step = read_step(read_run(folder, "run"), 2, characters=100)
    assert [["trace" in r for r in group["responses"]] for group in step["groups"]] == [[False, True, False, False]]


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 1)
    path = folder / "rollouts/step_000000.jsonl"
    path.write_text(path.read_text().replace('"reward": 1.0', '"reward": NaN').replace("-1.0", "-1e999"))
    responses = read_step(read_run(folder, "run"), 0, characters=100)["groups"][1]["responses"]
    assert ["reward" in r for r in responses] == [True, False, True, False]
    assert ["advantage" in r for r in responses] == [False, True, False, True]
    assert render(page_data(read_runs([folder]), None, ()))


# ---------------------------------------------------------------------------------------------------------- the page


@given(st.recursive(st.text(st.characters(codec=None, exclude_categories=())), lambda inner: st.lists(inner)))
def test_any_text_survives_the_page_and_none_can_end_the_script(value: Any) -> None:
    found = embedded(value)
    assert found.isascii()
    assert not set(found) & set("<>&")
    assert json.loads(found) == value


class Elements(HTMLParser):
    """Collects the elements of a page, and the text of those with data in them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.data: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self._inside = dict(attrs).get("id", tag)

    def handle_data(self, data: str) -> None:
        self.data[self._inside] = self.data.get(self._inside, "") + data


def test_a_hostile_run_adds_no_element_to_the_page(tmp_path: Path) -> None:
    tame, hostile = Elements(), Elements()
    tame.feed(render(page_data(read_runs([make_run(tmp_path / "tame", 2)]), None, ())))
    folder = make_run(tmp_path / "<script>alert(1)<", 2, model="</title><script>", texts=HOSTILE)
    data = page_data(read_runs([folder]), None, ())
    page = render(data)
    hostile.feed(page)
    assert hostile.tags == tame.tags
    assert json.loads(hostile.data["data"]) == json.loads(json.dumps(data))
    assert "hacked = 1</script>" not in page
    assert len(page) - len(render(page_data(read_runs([tmp_path / "tame"]), None, ()))) < 300_000


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = render(page_data(read_runs([make_run(tmp_path / "run", 2)]), None, ()))
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", page.replace("<script>", "", 1)[:20_000])
    policy = re.search(r'Policy" content="([^"]*)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy[1].split("style-src")[0]


def test_report_writes_one_page_beside_one_run_and_in_this_folder_for_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = make_run(tmp_path / "one", 2), make_run(tmp_path / "two", 2, seed=2)
    assert run_report([one], None, None, []) == 0
    assert (one / "report.html").exists()
    assert run_report([one, two], None, 0, []) == 0
    assert (tmp_path / "report.html").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_accuracy_comes_from_outputs_of_evaluate(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    average = {"value": 0.5, "low": 0.4, "high": 0.6}
    for folder in (run / "evaluation", tmp_path / "before"):
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"benchmarks": {"math": {"average": average, "more": 1}}}))
    found = page_data(read_runs([run]), None, [tmp_path / "before"])["evaluations"]
    assert [(e["name"], e["benchmarks"]) for e in found] == [
        ("before", {"math": average}),
        ("run, evaluation", {"math": average}),
    ]


def test_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 2)
    empty, broken, select, torn = (make_run(tmp_path / n, 2) for n in ("empty", "broken", "select", "torn"))
    (empty / "metrics.jsonl").write_text('{"step": 0, "rew')
    (broken / "config.toml").write_text("run_dir = ")
    (select / "config.toml").write_text('run_dir = "x"\ncandidates = "y"\n')
    (torn / "metrics.jsonl").write_text('{"reward": 1}\n')
    cases: Sequence[tuple[list[str], str]] = (
        ([str(tmp_path / "none")], "none is no directory; name the run_dir"),
        ([str(tmp_path)], "has no config.toml, so it is no run directory"),
        ([str(empty)], "metrics.jsonl has no step yet; wait"),
        ([str(broken)], "config.toml is not valid TOML"),
        ([str(select)], "is not the configuration of a `megatron-rl train` or `sft`"),
        ([str(torn)], "metrics.jsonl, line 1 is no metrics of a step"),
        ([str(run), str(run / ".." / "run")], "is named twice"),
        ([str(run), "--steps-shown", "-1"], "--steps-shown must be at least 0, got -1"),
        ([str(run), "--output", str(tmp_path)], "--output must be a file in a folder that exists"),
        ([str(run), "--evaluation", str(run)], "results.json does not exist; name the --output"),
    )
    for arguments, message in cases:
        assert main(["report", *arguments]) == 2, arguments
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1, told


def test_help_of_report_imports_no_plotly_and_a_report_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    for arguments, heavy in ((["--help"], "{'torch', 'numpy', 'plotly', 'pydantic'}"), ([str(run)], "{'torch'}")):
        script = (
            f"import sys\nfrom megatron_rl import cli\ntry:\n    cli.main(['report', *{arguments}])\n"
            f"except SystemExit as end:\n    assert not end.code\nassert not {heavy} & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (run / "report.html").exists()


def the_run(folder: Path, rows: Sequence[dict[str, Any]]) -> Run:
    write_rows(folder / "metrics.jsonl", rows)
    return read_run(folder, folder.name)
