"""Tests the recipe of examples/ring_lite: its problems, the handing over between its stages, and its tables."""

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from sandboxed import why_not

from megatron_rl.cli import command_parser
from megatron_rl.config.kinds import kind_of
from megatron_rl.config.load import load_config, read_values
from megatron_rl.config.schema import RlConfig, SamplingConfig, SftConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.reward.code import judge_code
from megatron_rl.reward.math import judge_boxed, settle_math
from megatron_rl.reward.sandbox import Sandbox
from megatron_rl.reward.stem import judge_value, settle_stem

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/ring_lite"
sys.path.insert(0, str(EXAMPLE))

import compare  # noqa: E402
import domains  # noqa: E402
import joint  # noqa: E402
import pipeline  # noqa: E402
import stages  # noqa: E402
import tables  # noqa: E402

MISSING = why_not(Sandbox)
RULES = {"math": (settle_math, judge_boxed), "science": (settle_stem, judge_value)}


def score(domain: str, response: str, answer: str) -> float:
    settle, judge = RULES[domain]
    found = settle(response, answer)
    return (judge(found, answer) if isinstance(found, str) else found).score


def changed(text: str, rng: random.Random) -> str:
    """Return the text with another digit in its last box."""
    head, _, answer = text.rpartition("{")
    places = [i for i, c in enumerate(answer) if c.isdigit()]
    i = rng.choice(places)
    return f"{head}{{{answer[:i]}{(int(answer[i]) + 1) % 10 or 1}{answer[i + 1 :]}"


@pytest.mark.parametrize("domain", RULES)
def test_solutions_are_right_and_their_reward_can_tell(domain: str) -> None:
    rng = random.Random(0)
    for problem in domains.problems(domain, 300, "a"):
        number, _, unit = problem.answer.partition(" ")
        assert score(domain, problem.response, problem.answer) == 1, problem
        assert score(domain, f"\\boxed{{{2 * int(number) + 1} {unit}}}", problem.answer) == 0
        if int(number) < 100:  # larger ones have a tolerance in science
            assert score(domain, changed(problem.response, rng), problem.answer) == 0
        if domain == "science":
            assert score(domain, f"\\boxed{{{number} K}}", problem.answer) == 0


def test_steps_are_counted_without_a_mistake() -> None:
    """Check that counts go 1, 2, 3, ... and values by equal steps. The last value or its count is the answer."""
    for domain in ("math", "science"):
        for problem in domains.problems(domain, 300, "b"):
            runs = [part for part in problem.response.split(",")[:-1] if part[0].isdigit()]
            assert runs
            for run in runs:
                pairs = [tuple(map(int, pair.split("."))) for pair in run.split(" ")]
                assert [count for _, count in pairs] == list(range(1, len(pairs) + 1))
                assert len({after - before for (before, _), (after, _) in pairwise(pairs)}) <= 1
            number = int(problem.answer.split()[0])
            assert number == pairs[-1][problem.kind in ("equation", "inverse")]


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_programs_pass_their_tests_and_others_fail() -> None:
    found = domains.problems("code", 6, "a")
    for problem in found:
        assert judge_code(problem.response, problem.answer).score == 1, problem
    assert sum(judge_code(found[0].response, other.answer).score for other in found[1:]) == 0


def test_no_test_question_is_trained_on_and_lengths_differ_by_an_order_of_magnitude(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLE / "domains.py", tmp_path, "--worked", "400", "--train", "400", "--test", "60"]
    subprocess.run(command, check=True, capture_output=True)
    lengths = []
    for domain in domains.DOMAINS:
        rows = {
            name: [json.loads(line) for line in (tmp_path / f"{domain}_{name}.jsonl").read_text().splitlines()]
            for name in ("worked", "train", "test")
        }
        assert [len(rows[name]) for name in ("worked", "train", "test")] == [400, 400, 60]
        questions = {row["prompt"] for row in rows["test"]}
        assert len(questions) == 60
        assert not questions & {row["prompt"] for row in rows["train"]}
        assert not questions & {row["messages"][0]["content"] for row in rows["worked"]}
        lengths += [len(row["messages"][1]["content"]) for row in rows["worked"] if domain != "general"]
    assert max(lengths) >= 10 * min(lengths)


def test_every_stage_gets_what_an_earlier_one_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made: set[str] = set()

    def is_there(path: object, places: set[str]) -> bool:
        return any(str(path) == one or str(path).startswith(f"{one}/") for one in places)

    for stage in pipeline.recipe(seed=3):
        makes: set[str] = set()
        for command in stage.commands:
            needs, outputs = of_tool(command) if command[0] != "-m" else of_command(command, stage.name)
            for path in needs:
                assert is_there(path, made | makes), (stage.name, path)
            makes |= {str(path) for path in outputs}
        assert is_there(f"runs/ring_lite/{stage.makes}", makes), stage.name
        made |= makes
    for path in pipeline.MODELS.values():
        assert is_there(path, made)


def of_tool(command: tuple[object, ...]) -> tuple[list[object], list[object]]:
    """Return the files that a tool reads and those that it writes: --output and --validation, or its first argument."""
    assert Path(str(command[0])).is_file()
    named = [command[command.index(option) + 1] for option in ("--output", "--validation") if option in command]
    outputs = named or [command[1]]
    return [word for word in command[1:] if str(word).startswith("runs/") and word not in outputs], outputs


def of_command(command: tuple[object, ...], stage: str) -> tuple[list[object], list[object]]:
    """Return what a command of megatron-rl reads and writes. Check that it has the seed of the pipeline."""
    arguments = command_parser().parse_args([str(word) for word in command[2:]])
    if arguments.command == "convert":
        return [arguments.source], [arguments.destination]
    config = load_config(kind_of(read_values(arguments.config)), arguments.config, arguments.set)
    assert config.seed == 3
    if arguments.command == "evaluate":
        return [arguments.model, *(section.path for section in config.benchmarks.values())], [arguments.output]
    assert str(config.run_dir) == f"runs/ring_lite/{stage}"
    needs = [config.candidates if isinstance(config, SelectConfig) else config.model.path]
    return [*needs, *(config.data.files if isinstance(config, SftConfig) else config.data.train_files)], [
        *([arguments.output] if arguments.command == "rollout" else [config.run_dir])
    ]


def test_ablations_differ_from_their_stage_in_what_their_name_says() -> None:
    stage = load_config(RlConfig, EXAMPLE / "cpu_mini/stage1_math.toml").model_dump()
    differing = {
        "grpo": {("algorithm", "name")},
        "dapo": {("algorithm", "name")},
        "budget_half": {("budget", "tokens"), ("train", "steps")},
        "budget_double": {("budget", "tokens"), ("train", "steps")},
        "cut_response": {("budget", "cut")},
        "under_full_short": {("budget", "under_full")},
        "partial": {("rollout", "partial")},
        "icepop": {("algorithm", "correction")},
    }
    for name, expected in differing.items():
        other = load_config(RlConfig, EXAMPLE / f"ablations/{name}.toml").model_dump()
        sections = [key for key in stage if isinstance(stage[key], dict)]
        found = {(s, key) for s in sections for key in stage[s] if stage[s][key] != other[s][key]}
        assert found == expected, name
        assert (
            stage["budget"]["tokens"] * stage["train"]["steps"] == other["budget"]["tokens"] * other["train"]["steps"]
        )
    # Two stages and the mixture train as many tokens of every domain.
    second, mixed = (
        load_config(RlConfig, EXAMPLE / f"{name}.toml") for name in ("cpu_mini/stage2_code_science", "ablations/mixed")
    )
    of_stages = {"math": stage["budget"]["tokens"] * stage["train"]["steps"]}
    for domain, share in second.budget.domains.items():
        of_stages[domain] = share * second.budget.tokens * second.train.steps
    of_mixture = {d: share * mixed.budget.tokens * mixed.train.steps for d, share in mixed.budget.domains.items()}
    assert of_mixture == of_stages


def test_every_comparison_names_configurations_that_are_there() -> None:
    for arms in compare.COMPARISONS.values():
        for configs in arms.values():
            assert all((EXAMPLE / f"{config}.toml").is_file() for config in configs)


@pytest.mark.parametrize("folder", ["cpu_mini", "joint", "ablations"])
def test_tables_by_domain_name_domains_that_the_rows_have(folder: str) -> None:
    """Check what a start would refuse: files of rows are named by their domain (domains.py)."""
    for path in sorted((EXAMPLE / folder).glob("*.toml")):
        config = load_config(kind_of(read_values(path)), path)
        if isinstance(config, SamplingConfig):
            there = {file.name.partition("_")[0] for file in config.data.train_files}
            assert config.reward.domains.keys() <= there, path


def test_intervals_over_seeds_are_students() -> None:
    # Half of it is t(n - 1) s / sqrt(n), with t from a printed table and s^2 the sum of squares over n - 1.
    for values, expected in (
        ([1.0, 2.0], (1.5, 12.706 * (0.5 / 2) ** 0.5)),
        ([0.3, 0.5, 0.1], (0.3, 4.303 * (0.08 / 2 / 3) ** 0.5)),
        ([1.0, 1.5, 0.5, 2.0, 3.0], (1.6, 2.776 * (3.7 / 4 / 5) ** 0.5)),
    ):
        assert compare.mean_and_interval(values) == pytest.approx(expected, rel=1e-3)
    assert compare.cell([0.25]) == "0.25"


def test_arms_are_compared_seed_by_seed() -> None:
    def scores(math: float, code: float) -> dict:
        return {d: {"average": {"value": v}} for d, v in zip(tables.DOMAINS, (math, code, 0.0), strict=False)}

    results = {"c3po": [scores(0.5, 0.2), scores(0.7, 0.2)], "grpo": [scores(0.52, 0.2), scores(0.74, 0.17)]}
    _, accuracies, _, differences = compare.accuracy_tables(results, [1, 2])
    assert "| c3po | 60 ± 127 | 20 ± 0 |" in accuracies  # 12.706 x 14.14 / sqrt(2)
    # The seeds are 20 points apart and the arms of a seed 2 and 4: 3 ± 12.706 x 1.414 / sqrt(2).
    assert "| grpo | +3 ± 13 | -1.5 ± 19 | +0 ± 0 | +0.5 ± 2.1 |" in differences
    assert "c3po" not in differences


def evaluation(folder: Path, **right: int) -> tuple[dict, Path]:
    """Write an evaluation of 100 prompts of each domain, of which the first so many are right."""
    folder.mkdir()
    found = {}
    for domain in tables.DOMAINS:
        count = right.get(domain, 0)
        rows = [{"position": i, "score": float(i < count), "response": ""} for i in range(100)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[domain] = {"average": {"value": count / 100, "low": 0.0, "high": 1.0}, "no_answer_share": 0.0}
    return found, folder


def test_the_verdicts_say_no_where_a_stage_does_not_improve(tmp_path: Path) -> None:
    made = {
        "distilled": evaluation(tmp_path / "a", math=20, code=50, science=20),
        "stage 1": evaluation(tmp_path / "b", math=30, code=45, science=20),
        "stage 2": evaluation(tmp_path / "c", math=24, code=60, science=21),
        "final": evaluation(tmp_path / "d", math=30, code=60, science=30, general=80),
    }
    found, folders = ({name: one[i] for name, one in made.items()} for i in range(2))
    # One more right of 100 is within chance; ten more of the same prompts are not.
    said = [line.partition(":")[0] for line in tables.verdicts(found, folders)]
    assert said == ["yes", "yes", "yes", "NO", "NO", "yes"]
    assert "+10.0 ± 5.9 points" in tables.verdicts(found, folders)[1]  # 1.96 sqrt(0.1 x 0.9 / 99)
    found["distilled"]["code"]["no_answer_share"] = 0.2
    assert tables.verdicts(found, folders)[0].startswith(
        "NO: distilled responses hold an answer or a program in 80.0 %"
    )
    assert len(tables.verdicts({"distilled": found["distilled"]}, folders)) == 1


def test_a_comparison_survives_a_skipped_step_and_says_large_numbers_in_full(tmp_path: Path) -> None:
    def run(start: int) -> list[dict]:
        rows = [dict.fromkeys(compare.QUANTITIES, float(start + i)) | {"num_loss_tokens": 12000.0} for i in range(40)]
        rows[9]["grad_norm"] = None
        return rows

    steps = {"one": [run(0), run(2)], "other": [run(1), run(3)]}
    found = compare.summary(steps)["one"]
    assert found["reward"]["mean"] == [pytest.approx(22.0), pytest.approx(24.0)]  # of steps 5 to 39
    assert found["grad_norm"]["max"] == [39.0, 41.0]
    table = compare.step_table(steps)
    assert "| tokens per step | 12,000 ± 0 | 12,000 ± 0 |" in table
    assert "| reward | 23 ± 13 | 24 ± 13 |" in table  # 12.706 x 2 / sqrt(2) / sqrt(2)
    compare.plot(steps, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_arms_of_the_joint_comparison_train_one_after_the_other_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for model in (compare.CHOSEN, joint.TEACHER):
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    (compare.RUN / "pipeline.json").write_text(json.dumps({"seed": 1, "smoke": True}))
    monkeypatch.setattr(joint, "sft_steps", lambda rows, changes: 2)
    asked: list[tuple[str, str]] = []

    def run_python(title: str, *command: object) -> None:
        words = [str(word) for word in command]
        values = dict(value.split("=", 1) for word, value in pairwise(words) if word == "--set")
        out = Path(words[words.index("--output") + 1]) if "--output" in words else Path(values["run_dir"])
        kind = words[2] if words[0] == "-m" else "keep"
        asked.append((kind, out.parent.name if kind == "evaluate" else out.name))
        if kind == "evaluate":
            out.mkdir(parents=True)
            found = {"benchmarks": {domain: {"average": {"value": 0.25}} for domain in tables.DOMAINS}}
            (out / "results.json").write_text(json.dumps(found))
        elif kind in ("train", "sft"):
            (out / "hf").mkdir(parents=True)
            (out / "hf/config.json").write_text("{}")
            row = dict.fromkeys(compare.QUANTITIES, 2.0) | {"num_generated_tokens": 9, "num_loss_tokens": 12000}
            lines = [json.dumps(row | {"step": step}) + "\n" for step in range(int(values["train.steps"]))]
            (out / "metrics.jsonl").write_text("".join(lines))
        else:
            assert kind == "rollout" or words[words.index("--min-reward") + 1] == "0"
            out.write_text("")

    monkeypatch.setattr(stages, "run_python", run_python)
    assert joint.run([1], 1) == 0
    runs = [f"{arm}-1-from-select_chosen" for arm in ("rl", "distillation", "both")]
    assert asked == [
        *(("evaluate", name) for name in ("select", "stage1_math")),
        *((kind, run) for run in runs for kind in ("train", "evaluate")),
        ("rollout", "answers-1.jsonl"),
        ("keep", "answers-1.sft.jsonl"),
        *((kind, "sft-1-from-answers") for kind in ("sft", "evaluate")),
    ]
    told = (joint.FOLDER / "joint.md").read_text()
    assert "| the teacher | 25 | 25 | 25 | 25 |" in told
    assert "| both | +0 | +0 | +0 | +0 |" in told
    assert "| RL | 36,000 | 6 |" in told
    assert "| SFT on answers | 24,000 | 4 |" in told
    assert (joint.FOLDER / "joint.png").stat().st_size > 10_000
    asked.clear()
    assert joint.run([1], 1) == 0
    assert asked == []


def test_a_stage_that_is_repeated_moves_the_later_ones_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "select", "stage1_math", "evaluation/final"):
        (pipeline.RUN / name).mkdir(parents=True)
    (pipeline.RUN / "seconds.json").write_text(json.dumps({"base": 1.0, "select": 2.0, "stage1_math": 3.0}))
    names = [stage.name for stage in pipeline.recipe(1)]
    pipeline.move_aside(names[names.index("select") :])
    assert {str(path.relative_to(pipeline.RUN)) for path in pipeline.RUN.iterdir()} == {
        "base",
        "evaluation",
        "seconds.json",
    }
    (aside,) = (path for path in pipeline.RUN.parent.iterdir() if path != pipeline.RUN)
    assert (aside / "select").is_dir()
    assert (aside / "evaluation/final").is_dir()
    assert json.loads((pipeline.RUN / "seconds.json").read_text()) == {"base": 1.0}
