"""Run the arms of a comparison from the miniature's distilled checkpoint, over several seeds: tables, intervals, a
figure.

    .venv/bin/python examples/ring_lite/compare.py algorithms              C3PO, GRPO, DAPO        (the paper's Fig. 7)
    .venv/bin/python examples/ring_lite/compare.py stages                  two stages or a mixture (Table 4)
    .venv/bin/python examples/ring_lite/compare.py checkpoints --seeds 1   stage 1 from every epoch (Table 2)
    .venv/bin/python examples/ring_lite/compare.py budgets | cut | refill | partial | icepop

Needs what pipeline.py leaves up to its stage `select`. An arm is one configuration or several that follow each other,
each from the model that the one before made; arms of one seed take the same prompts in the same order. Writes
runs/ring_lite/compare/NAME.{md,json,png}. Runs that are there already are not repeated.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import figures
import stages
import tables

from megatron_rl import lifeline
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.evaluation.statistics import student_95
from megatron_rl.rollout.provenance import model_settings
from megatron_rl.train.run.metrics import read_metrics

HERE = Path(__file__).parent
RUN = Path("runs/ring_lite")
CHOSEN = RUN / "select/chosen"
STAGE_1, STAGE_2 = "cpu_mini/stage1_math", "cpu_mini/stage2_code_science"
C3PO = {"c3po": [STAGE_1]}
COMPARISONS: dict[str, dict[str, list[str]]] = {
    "algorithms": C3PO | {"grpo": ["ablations/grpo"], "dapo": ["ablations/dapo"]},
    "budgets": C3PO | {"half": ["ablations/budget_half"], "double": ["ablations/budget_double"]},
    "cut": C3PO | {"whole responses": ["ablations/cut_response"]},
    "refill": C3PO | {"short": ["ablations/under_full_short"]},
    "partial": C3PO | {"c3po++": ["ablations/partial"]},
    "icepop": C3PO | {"icepop": ["ablations/icepop"]},
    "stages": {"two-stage": [STAGE_1, STAGE_2], "mixed": ["ablations/mixed"]},
}
# The quantities of Figure 7, by their names in metrics.jsonl.
QUANTITIES = {
    "num_loss_tokens": "tokens per step",
    "grad_norm": "gradient norm",
    "step_seconds": "seconds per step",
    "tokens_per_second": "throughput (generated tokens/s, end to end)",
    "response_tokens_mean": "response length (tokens)",
    "reward": "reward",
}
SETTLED = 5  # the first steps warm up the learning rate and the machine, and are left out of the table
AT_AN_END = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*COMPARISONS, "checkpoints"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nproc", type=int, default=1, help="training processes")
    arguments = parser.parse_args()
    if not (CHOSEN / "config.json").exists():
        parser.error(f"{CHOSEN} is not there; run examples/ring_lite/pipeline.py first")
    lifeline.watch_parent()
    return stages.exit_code(lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> int:
    name, seeds = arguments.name, arguments.seeds
    if name == "checkpoints":
        arms = {arm: ([STAGE_1], path) for arm, path in candidates().items()}
    else:
        arms = {arm: (configs, CHOSEN) for arm, configs in COMPARISONS[name].items()}
    steps: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in arms}
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in seeds:  # seed by seed, so that what disturbs the machine for a while disturbs every arm
        for arm, (configs, start) in arms.items():
            rows, model = [], start
            for config in configs:
                one, model = train(config, model, seed, arguments.nproc)
                rows += one
            steps[arm].append(rows)
            results[arm].append(evaluate(model))
    folder = RUN / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    # Steps of two stages and of a mixture train on other domains, so only the accuracies compare.
    parts = [*accuracy_tables(results, seeds), *([step_table(steps)] if name != "stages" else [])]
    text = "\n\n".join(parts) + "\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.json").write_text(
        json.dumps({"accuracy": results, "steps": summary(steps)}, indent=1), encoding="utf-8"
    )
    plot(steps, folder / f"{name}.png")
    print(text)
    print(f"[{stages.seconds():5.0f} s] {folder / name}.md, .json, .png")
    return 0


def candidates() -> dict[str, Path]:
    """Return the epochs of the distilled model, by names that tell the entropy of the policy; the chosen one has a
    star."""
    record = json.loads((RUN / "select/results.json").read_text(encoding="utf-8"))
    found = {}
    for name, measured in record["candidates"].items():
        entropy, star = measured["entropy"]["value"], "*" if name == record["chosen"] else ""
        found[f"{name}{star}, entropy {entropy:.3f}"] = RUN / "sft/epochs" / name
    return found


def train(
    config: str, model: Path, seed: int, nproc: int, changes: Mapping[str, object] = MappingProxyType({})
) -> tuple[list[dict[str, Any]], Path]:
    """Train one configuration. Return the rows of metrics.jsonl and the model that it made, from an earlier call if
    they are there. changes: settings by key."""
    source = "_".join(model.relative_to(RUN).parts).removesuffix("_hf").replace("compare_", "")
    run_dir = RUN / "compare" / f"{Path(config).name}-{seed}-from-{source}"
    values = {"run_dir": run_dir, "model.path": model, "seed": seed, **changes}
    wanted = load_config(RlConfig, HERE / f"{config}.toml", [f"{key}={value}" for key, value in values.items()])
    # The same path may be another model by now, and `chosen` is a link.
    origin, record = model_settings(model, "float32"), run_dir / "started_from.json"
    if (run_dir / "config.toml").exists():  # a kill may have come before a run began in the folder
        same = (
            load_config(RlConfig, run_dir / "config.toml") == wanted
            and json.loads(record.read_text(encoding="utf-8")) == origin
        )
        if not same:
            sys.exit(
                f"{run_dir} was run with another configuration or model; move it away, or work in another directory"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(origin), encoding="utf-8")
    if not (run_dir / "hf/config.json").exists():
        options = [*stages.settings(values), "--resume", *(["--nproc", str(nproc)] if nproc > 1 else [])]
        stages.run_python(
            f"{Path(config).name}, seed {seed}, from {model}",
            "-m",
            "megatron_rl.cli",
            "train",
            HERE / f"{config}.toml",
            *options,
        )
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [
        row | {"tokens_per_second": row["num_generated_tokens"] / row["step_seconds"]} for row in rows
    ], run_dir / "hf"


def evaluate(model: Path, changes: Mapping[str, object] = MappingProxyType({})) -> dict[str, Any]:
    folder = model.parent / "evaluation"
    if not tables.results(folder):
        command = ("-m", "megatron_rl.cli", "evaluate", HERE / "cpu_mini/evaluate.toml", *stages.settings(changes))
        stages.run_python(f"evaluation of {model}", *command, "--model", model, "--output", folder, "--resume")
    return tables.results(folder)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds, and half the width of its 95 % interval; nan for one seed, of which nothing is
    known."""
    if len(values) == 1:
        return values[0], math.nan
    return statistics.mean(values), student_95(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def cell(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Write the mean and its interval; sign "+" shows the sign of positive means too."""
    mean, half = mean_and_interval(values)
    shown = f"{mean:{sign},.0f}" if mean >= 1000 else f"{mean:{sign}.{digits}g}"
    if math.isnan(half):
        return shown
    return f"{shown} ± {half:,.0f}" if max(mean, half) >= 100 else f"{shown} ± {half:.2g}"


def accuracy_tables(results: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> list[str]:
    """Write tables in the shape of the paper's tables 2 and 4: an arm per row, a benchmark per column, in percent. A
    second one says how the arms differ from the first, seed by seed: both had the same prompts in training and in the
    test."""
    domains = tables.DOMAINS[:3]
    header = ["", *domains, "average"]
    scores = {}
    for arm, of_seeds in results.items():
        columns = [[100 * found[domain]["average"]["value"] for found in of_seeds] for domain in domains]
        scores[arm] = [*columns, [statistics.mean(one) for one in zip(*columns, strict=True)]]
    first, *others = scores
    differences = {
        arm: [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(scores[first], scores[arm], strict=True)]
        for arm in others
    }
    interval = f"mean over seeds {', '.join(map(str, seeds))} ± half of its 95 % interval"
    return [
        f"Accuracy after training, percent: {interval}.",
        tables.as_table(header, [[arm, *map(cell, columns)] for arm, columns in scores.items()]),
        f"Less that of {first} of the same seed, points: {interval}.",
        tables.as_table(header, [[arm, *(cell(c, sign="+") for c in columns)] for arm, columns in differences.items()]),
    ]


def summary(steps: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return, by arm, quantity and statistic, a value for each seed, over its steps."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for arm, of_seeds in steps.items():
        found[arm] = {}
        for name in QUANTITIES:
            # A step that was skipped has no gradient norm.
            columns = [[float(row[name]) for row in rows[SETTLED:] if row[name] is not None] for rows in of_seeds]
            means, deviations = [*map(statistics.mean, columns)], [*map(statistics.pstdev, columns)]
            found[arm][name] = {
                "mean": means,
                "cv": [d / m if m else 0.0 for d, m in zip(deviations, means, strict=True)],
                "max": [max(column) for column in columns],
                "first": [statistics.mean(column[:AT_AN_END]) for column in columns],
                "last": [statistics.mean(column[-AT_AN_END:]) for column in columns],
            }
    return found


def step_table(steps: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> str:
    found = summary(steps)
    rows = []
    for name, title in QUANTITIES.items():
        rows.append([title, *(cell(arm[name]["mean"], 4) for arm in found.values())])
        if name != "reward":
            variation = [cell([100 * value for value in arm[name]["cv"]], 2) for arm in found.values()]
            rows.append([f"{title}: variation over steps, %", *variation])
    rows.append(["largest gradient norm", *(cell(arm["grad_norm"]["max"]) for arm in found.values())])
    for end in ("first", "last"):
        rows.append([f"reward of the {end} {AT_AN_END} steps", *(cell(arm["reward"][end]) for arm in found.values())])
    told = f"Over the steps of a run after the first {SETTLED}: mean over seeds ± half of its 95 % interval."
    return told + "\n\n" + tables.as_table(["", *found], rows)


def plot(steps: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Plot every quantity over the steps: the mean of the seeds, and the range of the seeds as a band."""
    import numpy as np

    with figures.panels(QUANTITIES, path) as panels:
        for name, axis in panels.items():
            for arm, of_seeds in steps.items():
                values = np.array([[row[name] for row in rows] for rows in of_seeds], float)  # None becomes nan
                known = np.ma.masked_invalid(values)
                mean, low, high = (found.filled(np.nan) for found in (known.mean(0), known.min(0), known.max(0)))
                color = figures.draw(axis, range(values.shape[1]), mean, arm)
                axis.fill_between(range(values.shape[1]), low, high, color=color, alpha=0.12, linewidth=0)
            axis.set_xlabel("step", fontsize=9)
        next(iter(panels.values())).legend(fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
