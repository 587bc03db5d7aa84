"""The paper's comparison in miniature: C3PO, GRPO and DAPO from one checkpoint, in the shape of its Figure 7.

    make reproduce-mini       or   .venv/bin/python examples/ring_lite/reproduce.py --run runs/reproduce

One tiny model is warm-started on problems of very different lengths; each algorithm then trains it with several seeds,
on the same prompts in the same order, with the same learning rate and about as many tokens per step. Writes table.md,
table.json and figure.png. Runs that are there already are not repeated.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import stages

from megatron_rl import lifeline

ROOT = Path(__file__).parents[2]
CONFIGS = Path(__file__).parent / "demo"
ALGORITHMS = ("c3po", "grpo", "dapo")
# What Figure 7 shows, by the names of metrics.jsonl.
QUANTITIES = {
    "response_tokens_mean": "response length (tokens)",
    "num_loss_tokens": "tokens per step",
    "grad_norm": "gradient norm",
    "step_seconds": "seconds per step",
    "tokens_per_second": "throughput (generated tokens/s, end to end)",
    "reward": "reward",
}
AT_AN_END = 20
SETTLED = 5  # the first steps warm up the learning rate and the machine, and are left out of the table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nproc", type=int, default=1, help="training processes")
    arguments = parser.parse_args()
    lifeline.watch_parent()
    return stages.exit_code(lambda: reproduce(arguments))


def reproduce(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.run
    nproc = ["--nproc", arguments.nproc] if arguments.nproc > 1 else []
    if not (folder / "model").exists():
        stages.run_python("a tiny model", ROOT / "tools/make_tiny_model.py", folder / "model")
    if not (folder / "data/test.jsonl").exists():
        difficulties = [str(d) for d in range(1, 6)]
        options = ["--kinds", "sort", "filter", "--difficulties", *difficulties, "--num-test", "256"]
        stages.run_python("problems of all lengths", ROOT / "tools/make_task_data.py", folder / "data", *options)
    if not (folder / "sft/hf").exists():
        options = stages.settings(
            {
                "run_dir": folder / "sft", "model.path": folder / "model", "data.train": folder / "data/sft.jsonl",
                "train.steps": 170,
            }
        )  # fmt: skip
        stages.run_python("warm start", "-m", "megatron_rl.cli", "sft", CONFIGS / "sft.toml", *nproc, *options)
    runs = {
        name: [train(folder, name, seed, arguments.steps, nproc) for seed in arguments.seeds] for name in ALGORITHMS
    }
    table = {name: summarise(of_seeds) for name, of_seeds in runs.items()}
    (folder / "table.json").write_text(json.dumps(table, indent=1))
    ends = {name: rewards_at_the_ends(of_seeds) for name, of_seeds in runs.items()}
    (folder / "table.md").write_text(as_markdown(table, ends))
    plot(runs, folder / "figure.png")
    print(as_markdown(table, ends))
    print(f"[{stages.seconds():5.0f} s] {folder / 'table.md'}, {folder / 'figure.png'}")
    return 0


def train(folder: Path, name: str, seed: int, steps: int, nproc: list) -> list[dict]:
    """The rows of metrics.jsonl of one run, from an earlier call if it is there."""
    run_dir = folder / f"{name}-{seed}"
    if not (run_dir / "hf").exists():
        options = stages.settings(
            {
                "run_dir": run_dir, "seed": seed, "model.path": folder / "sft/hf", "algorithm.name": name,
                "data.train": folder / "data/train.jsonl", "train.steps": steps,
            }
        )  # fmt: skip
        if (run_dir / "checkpoints/latest").exists():
            options.append("--resume")
        config = CONFIGS / "reproduce.toml"
        stages.run_python(f"{name}, seed {seed}", "-m", "megatron_rl.cli", "train", config, *nproc, *options)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row | {"tokens_per_second": row["num_generated_tokens"] / row["step_seconds"]} for row in rows]


def summarise(of_seeds: list[list[dict]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and its ratio to the mean, over the steps of a run, averaged over seeds."""
    table = {}
    for name in QUANTITIES:
        columns = [[row[name] for row in rows[SETTLED:]] for rows in of_seeds]
        means = [statistics.mean(column) for column in columns]
        deviations = [statistics.pstdev(column) for column in columns]
        table[name] = {
            "mean": statistics.mean(means),
            "std": statistics.mean(deviations),
            "cv": statistics.mean(d / m if m else 0.0 for d, m in zip(deviations, means, strict=True)),
            "max": max(map(max, columns)),
        }
    return table


def rewards_at_the_ends(of_seeds: list[list[dict]]) -> tuple[float, float]:
    """Mean reward of the first and of the last steps, over all seeds. Single steps draw problems of other lengths."""
    first = [row["reward"] for rows in of_seeds for row in rows[:AT_AN_END]]
    last = [row["reward"] for rows in of_seeds for row in rows[-AT_AN_END:]]
    return statistics.mean(first), statistics.mean(last)


def as_markdown(table: dict[str, dict[str, dict[str, float]]], ends: dict[str, tuple[float, float]]) -> str:
    lines = ["| | " + " | ".join(table) + " |", "|---|" + "---|" * len(table)]
    for name, title in QUANTITIES.items():
        lines.append(f"| {title} | " + " | ".join(_cell(rows[name]) for rows in table.values()) + " |")
    largest = " | ".join(f"{rows['grad_norm']['max']:.3g}" for rows in table.values())
    rewards = " | ".join(f"{first:.3f} -> {last:.3f}" for first, last in ends.values())
    lines += [f"| largest gradient norm | {largest} |", f"| reward, first -> last {AT_AN_END} steps | {rewards} |"]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, float]) -> str:
    return f"{row['mean']:.4g} ± {row['std']:.3g} (CV {100 * row['cv']:.1f} %)"


def plot(runs: dict[str, list[list[dict]]], path: Path) -> None:
    """Every quantity over the steps: the mean of the seeds, and the range of the seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    for axis, (name, title) in zip(axes.flat, QUANTITIES.items(), strict=True):
        for algorithm, of_seeds in runs.items():
            values = np.array([[row[name] for row in rows] for rows in of_seeds])
            (line,) = axis.plot(values.mean(0), label=algorithm, linewidth=1.4)
            axis.fill_between(range(values.shape[1]), values.min(0), values.max(0), color=line.get_color(), alpha=0.18)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
