"""The recipe of examples/ring_lite: its problems, the way its stages hand over, and what its tables say."""

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from sandboxed import why_not

from megatron_rl.cli import _parser
from megatron_rl.config.kinds import kind_of
from megatron_rl.config.load import load_config, read_values
from megatron_rl.config.schema import RlConfig, SamplingConfig, SftConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.reward.code import score_code
from megatron_rl.reward.math import judge_boxed, settle_math
from megatron_rl.reward.sandbox import Sandbox
from megatron_rl.reward.stem import judge_value, settle_stem

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/ring_lite"
sys.path.insert(0, str(EXAMPLE))

import compare  # noqa: E402
import domains  # noqa: E402
import pipeline  # noqa: E402
import tables  # noqa: E402

MISSING = why_not(Sandbox)
RULES = {"math": (settle_math, judge_boxed), "science": (settle_stem, judge_value)}


def score(domain: str, response: str, answer: str) -> float:
    settle, judge = RULES[domain]
    found = settle(response, answer)
    return (judge(found, answer) if isinstance(found, str) else found).score


def changed(text: str, rng: random.Random) -> str:
    """With another digit in its last box."""
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
    """Counts go 1, 2, 3, ...; values go by equal steps, and the last one or its count is the answer."""
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
        assert score_code(problem.response, problem.answer).score == 1, problem
    assert sum(score_code(found[0].response, other.answer).score for other in found[1:]) == 0


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
    for stage in pipeline.recipe(seed=3):
        for command in stage.commands:
            words = [str(word) for word in command]
            if words[0] != "-m":
                assert Path(words[0]).is_file()
                made |= {word for word in words[1:] if word.startswith("runs/")}
                continue
            arguments = _parser().parse_args(words[2:])
            if arguments.command == "convert":
                assert str(arguments.source) in made
                made.add(str(arguments.destination))
                continue
            config = load_config(kind_of(read_values(arguments.config)), arguments.config, arguments.set)
            assert config.seed == 3
            model = arguments.model if arguments.command == "evaluate" else None
            needs = [model or (config.candidates if isinstance(config, SelectConfig) else config.model.path)]
            if isinstance(config, SftConfig):
                needs += [*config.data.weights, *([config.data.validation] if config.data.validation else [])]
            elif isinstance(config, RlConfig | SamplingConfig | SelectConfig):
                needs += config.data.train_files
            for path in needs:
                assert any(str(path) == one or str(path).startswith(f"{one}/") for one in made), (stage.name, path)
            if hasattr(config, "run_dir"):
                assert str(config.run_dir) == f"runs/ring_lite/{stage.name}"
                made.add(str(config.run_dir))
    assert {str(path) for path in pipeline.MODELS.values()} <= made | {
        f"{one}/{n}" for one in made for n in ("hf", "chosen")
    }


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


def test_intervals_over_seeds_are_students() -> None:
    from scipy import stats

    for values in ([1.0, 2.0], [0.3, 0.5, 0.1], [1.0, 1.5, 0.5, 2.0, 3.0]):
        mean, half = compare.mean_and_interval(values)
        low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)
    assert compare.cell([0.25]) == "0.25"


def benchmark(value: float, no_answer: float = 0.0) -> dict:
    average = {"value": value, "low": value - 0.04, "high": value + 0.04}
    return {"average": average, "no_answer_share": no_answer, "response_tokens_mean": 10.0}


def test_the_verdicts_say_no_where_a_stage_does_not_improve() -> None:
    def scores(math: float, code: float, science: float, general: float) -> dict:
        return dict(zip(tables.DOMAINS, map(benchmark, (math, code, science, general)), strict=True))

    found = {
        "distilled": scores(0.2, 0.5, 0.2, 0.0),
        "stage 1": scores(0.3, 0.45, 0.2, 0.0),
        "stage 2": scores(0.24, 0.6, 0.26, 0.0),
        "final": scores(0.3, 0.6, 0.3, 0.8),
    }
    said = [line.partition(":")[0] for line in tables.verdicts(found)]
    # Formats, math; code, science (0.06 is within both intervals), math lost; general.
    assert said == ["yes", "yes", "yes", "NO", "NO", "yes"]
    found["distilled"]["code"] = benchmark(0.5, no_answer=0.2)
    assert tables.verdicts(found)[0].startswith("NO: distilled responses hold an answer or a program in 80.0 %")
    assert tables.verdicts({"distilled": found["distilled"]})[1:] == []
