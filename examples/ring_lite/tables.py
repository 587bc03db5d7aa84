"""This module writes the results of the miniature: tables.md, tables.json and rl.png in its folder, from the files that
the stages left."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import figures

from megatron_rl.train.run.metrics import read_metrics

DOMAINS = ("math", "code", "science", "general")
RL_STAGES = ("stage1_math", "stage2_code_science")
# Keys of metrics.jsonl with their titles; the first is drawn for each domain.
PANELS = {
    "reward": "reward",
    "entropy": "policy entropy (nats)",
    "grad_norm": "gradient norm",
    "num_loss_tokens": "tokens that carry loss",
    "response_tokens_mean": "response length (tokens)",
    "step_seconds": "seconds per step",
}


def write(run: Path, models: list[str]) -> None:
    """Write the results. models: names of evaluations, in the order of their stages. What has not run yet is left
    out."""
    folders = {name: run / "evaluation" / name.replace(" ", "_") for name in models}
    found = {name: results(folder) for name, folder in folders.items()}
    found = {name: benchmarks for name, benchmarks in found.items() if benchmarks}
    engines = {name: results(run / "evaluation" / name) for name in ("embedded", "sglang")}
    parts = []
    if found:
        parts += ["## Accuracy after each stage (percent, 95 % interval)", accuracy_table(found)]
        parts += ["## What each stage should do", "\n".join(f"- {line}" for line in verdicts(found, folders))]
    choice = run / "select/results.md"
    if choice.exists():
        parts += ["## Choice of the distilled checkpoint", choice.read_text(encoding="utf-8")]
    if all(engines.values()):
        parts += ["## The export on two engines, at temperature 0.01", engine_table(run, engines)]
    if took := seconds(run):
        parts += ["## Seconds of each stage", cost_table(took)]
    (run / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (run / "tables.json").write_text(json.dumps({"accuracy": found, "engines": engines}, indent=1), encoding="utf-8")
    rows = {
        name: read_metrics(run / name / "metrics.jsonl")
        for name in RL_STAGES
        if (run / name / "metrics.jsonl").exists()
    }
    if rows:
        plot(rows, run / "rl.png")
    print("\n\n".join(parts))
    print(f"\n{run / 'tables.md'}, {run / 'rl.png'}")


def results(folder: Path) -> dict[str, Any]:
    """Return the results by benchmark; nothing where the evaluation has not run."""
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))["benchmarks"] if path.exists() else {}


def seconds(run: Path) -> dict[str, float]:
    """Return how long each stage took, by its name."""
    path = run / "seconds.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_seconds(run: Path, took: dict[str, float]) -> None:
    (run / "seconds.json").write_text(json.dumps(took, indent=1), encoding="utf-8")


def as_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def percent(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def accuracy_table(found: dict[str, dict[str, Any]]) -> str:
    header = ["after", *DOMAINS, "with an answer", "tokens"]
    rows = []
    for name, benchmarks in found.items():
        told = [benchmarks[domain] for domain in DOMAINS]
        reasoning = told[:-1]
        answered = 1 - sum(b["no_answer_share"] for b in reasoning) / len(reasoning)
        tokens = sum(b["response_tokens_mean"] for b in reasoning) / len(reasoning)
        rows.append([name, *(percent(b["average"]) for b in told), f"{100 * answered:.1f}", f"{tokens:.0f}"])
    return as_table(header, rows)


def difference(before: Path, after: Path, domain: str) -> tuple[float, float]:
    """Return the difference of the accuracies on the same prompts, and half of its 95 % interval (normal, of paired
    differences)."""
    first, second = (responses(folder)[domain] for folder in (before, after))
    changes = [second[position]["score"] - first[position]["score"] for position in first]
    return statistics.mean(changes), 1.96 * statistics.stdev(changes) / len(changes) ** 0.5


def verdicts(found: dict[str, dict[str, Any]], folders: dict[str, Path]) -> list[str]:
    """Say the results in words, with yes or no in front. A gain is one whose interval is above 0."""

    def change(before: str, after: str, domain: str) -> tuple[float, float, str]:
        mean, half = difference(folders[before], folders[after], domain)
        return mean, half, f"{100 * mean:+.1f} ± {100 * half:.1f} points"

    def gain(before: str, after: str, domain: str) -> str:
        mean, half, told = change(before, after, domain)
        return f"{'yes' if mean > half else 'NO'}: {after} raises {domain}: {told}"

    lines = []
    if "distilled" in found:
        answered = min(1 - found["distilled"][domain]["no_answer_share"] for domain in DOMAINS[:3])
        told = f"distilled responses hold an answer or a program in {100 * answered:.1f} % of the worst domain"
        lines.append(f"{'yes' if answered >= 0.9 else 'NO'}: {told}")
    if {"distilled", "stage 1"} <= found.keys():
        lines.append(gain("distilled", "stage 1", "math"))
    if {"stage 1", "stage 2"} <= found.keys():
        lines += [gain("stage 1", "stage 2", domain) for domain in ("code", "science")]
        mean, _, told = change("stage 1", "stage 2", "math")
        lines.append(f"{'yes' if mean >= -0.05 else 'NO'}: stage 2 loses at most 5 points on math: {told}")
    if {"stage 2", "final"} <= found.keys():
        lines.append(gain("stage 2", "final", "general"))
    return lines


def engine_table(run: Path, engines: dict[str, dict[str, Any]]) -> str:
    texts = {name: responses(run / "evaluation" / name) for name in engines}
    rows = []
    for domain in DOMAINS:
        one, other = (texts[name][domain] for name in engines)
        same = sum(one[key]["response"] == other[key]["response"] for key in one) / len(one)
        verdict = sum(one[key]["score"] == other[key]["score"] for key in one) / len(one)
        scores = [percent(benchmarks[domain]["average"]) for benchmarks in engines.values()]
        rows.append([domain, *scores, f"{100 * same:.1f}", f"{100 * verdict:.1f}"])
    return as_table(["benchmark", *engines, "same text", "same verdict"], rows)


def responses(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the responses by benchmark and position."""
    found = {}
    for domain in DOMAINS:
        lines = (folder / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        found[domain] = {row["position"]: row for row in map(json.loads, lines)}
    return found


def cost_table(took: dict[str, float]) -> str:
    rows = [[name, f"{one:.0f}"] for name, one in took.items()]
    return as_table(["stage", "seconds"], [*rows, ["all", f"{sum(took.values()):.0f}"]])


def plot(stages: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot both stages one after the other over the optimizer steps."""
    with figures.panels(PANELS, path) as panels:
        first = 0
        for name, rows in stages.items():
            steps = range(first, first + len(rows))
            # A row lacks the reward of a domain of which a step needed nothing new.
            rewards = sorted({key for row in rows for key in row if key.startswith("reward/")}) or ["reward"]
            for key in rewards:
                label = key.partition("/")[2] or name.partition("_")[2]
                figures.draw(panels["reward"], steps, [row.get(key, math.nan) for row in rows], label)
            for quantity, axis in panels.items():
                if quantity != "reward":
                    figures.draw(axis, steps, [row.get(quantity, math.nan) for row in rows], name)
                axis.axvline(first, color="grey", linewidth=0.6, linestyle=":")
            first += len(rows)
        panels["reward"].legend(fontsize=8)
        for axis in list(panels.values())[3:]:
            axis.set_xlabel("optimizer step (stage 1, then stage 2)", fontsize=9)
