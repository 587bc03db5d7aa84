"""Predict step time, idle GPUs and throughput of a run on a cluster that one does not have yet.

    python tools/simulate_cluster.py CONFIG --rates RATES.toml [--lengths FILE_OR_RUN] [--gpus 8 64 512] [--weak]
        [--vary KEY=A,B ...] [--steps 200] [--output OUT]
    python tools/simulate_cluster.py --calibrate RUN --gpus 2 [--output RATES.toml]

The first takes CONFIG through steps with the trainer's own budget, selection and packing, for every combination of the
numbers of GPUs and what is varied: `--vary algorithm.name=grpo,c3po --vary rollout.partial=false,true` are four runs.
Writes OUT.json and OUT.png and prints a table. The second finds the rates in a run's metrics and lengths, writes them,
and says how well they give that run back. docs/simulator.md says what is modelled and how well it predicts.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from megatron_rl.c3po.packing import cost_model
from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.errors import exit_code
from megatron_rl.plan.shape import shape_of
from megatron_rl.simulation.calibrate import SETTLED, Replay, calibrate, replay
from megatron_rl.simulation.forecast import PARTS, forecast
from megatron_rl.simulation.rates import Rates
from megatron_rl.simulation.workload import Workload, assumed, group_correlation, read_lengths, scaled
from megatron_rl.train.run.metrics import console, read_metrics


def main(arguments: argparse.Namespace) -> int:
    if arguments.calibrate:
        return fit(arguments)
    if arguments.config is None or arguments.rates is None:
        raise ValueError("give a configuration and --rates RATES.toml, or --calibrate RUN")
    rates = load_config(Rates, arguments.rates)
    combinations = list(cases(arguments))
    found = []
    for name, gpus, overrides in track(
        combinations, "simulating", console=console, transient=True, disable=not console.is_terminal
    ):
        config = load_config(RlConfig, arguments.config, overrides)
        cluster = config.cluster or ClusterSection()
        architecture, _ = shape_of(config)
        workload = workload_of(arguments, config, cluster)
        result = forecast(config, architecture, cluster, rates, workload, arguments.steps, arguments.seed)
        found.append({"name": name, "gpus": gpus, "overrides": overrides, "lengths": workload.told, **result})
    told = {"config": str(arguments.config), "rates": rates.model_dump(mode="json"), "cases": found}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    draw(found, arguments.output.with_suffix(".png"))
    sys.stdout.write(table(found))
    return 0


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, int, list[str]]]:
    """Yield name, GPUs and overrides of every combination."""
    config = load_config(RlConfig, arguments.config, arguments.set)
    cluster = config.cluster or ClusterSection()
    own = cluster.nodes * cluster.gpus_per_node
    choices = []
    for varied in arguments.vary:
        key, equals, values = varied.partition("=")
        if not equals or not values:
            raise ValueError(f"--vary takes KEY=VALUE,VALUE..., got {varied!r}")
        choices.append([f"{key}={value}" for value in values.split(",")])
    for chosen in itertools.product(*choices):
        for gpus in arguments.gpus or [own]:
            name = ", ".join(chosen) or "as configured"
            yield name, gpus, [*arguments.set, *chosen, *sized(arguments, [*arguments.set, *chosen], gpus, own)]


def sized(arguments: argparse.Namespace, overrides: list[str], gpus: int, own: int) -> list[str]:
    """Return overrides for so many GPUs instead of `own`. ValueError when they are no whole nodes."""
    config = load_config(RlConfig, arguments.config, overrides)
    cluster = config.cluster or ClusterSection()
    per_node = min(cluster.gpus_per_node, gpus)
    if gpus < 1 or gpus % per_node:
        raise ValueError(f"--gpus {gpus} is no multiple of cluster.gpus_per_node = {per_node}")
    nodes = gpus // per_node
    serving = math.ceil(cluster.serving_nodes / cluster.nodes * nodes) if cluster.serving_nodes else 0
    found = [f"cluster.gpus_per_node={per_node}", f"cluster.nodes={nodes}", f"cluster.serving_nodes={serving}"]
    if arguments.weak:
        found.append(f"rollout.prompts_per_step={max(1, round(config.rollout.prompts_per_step * gpus / own))}")
        if config.budget.scope == "global":
            found.append(f"budget.tokens={max(1, round(config.budget.tokens * gpus / own))}")
    return found


def workload_of(arguments: argparse.Namespace, config: RlConfig, cluster: ClusterSection) -> Workload:
    if arguments.lengths is None:
        found = assumed(config, cluster, arguments.mean_length)
        options: dict[str, Any] = {"lengths": found.lengths, "told": found.told, "prompt_tokens": found.prompt_tokens}
    elif arguments.lengths.is_dir():
        had = Replay(arguments.lengths, load_config(RlConfig, arguments.lengths / "config.toml"))
        lengths = scaled(np.concatenate(had.groups), arguments.mean_length, config.rollout.max_response_tokens)
        options = {"lengths": lengths, "told": f"of the run {arguments.lengths}", "prompt_tokens": had.prompt_tokens}
        options |= {"correlation": group_correlation(had.groups), "uniform_share": had.uniform_share}
    else:
        raw = read_lengths(arguments.lengths)
        lengths = scaled(raw, arguments.mean_length, config.rollout.max_response_tokens)
        options = {"lengths": lengths, "told": str(arguments.lengths)}
        options["prompt_tokens"] = assumed(config, cluster).prompt_tokens
    for name in ("correlation", "uniform_share", "prompt_tokens"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    return Workload(**options)


def fit(arguments: argparse.Namespace) -> int:
    """Write the rates of a run, and print how well they reproduce it."""
    run = arguments.calibrate
    config = load_config(RlConfig, run / "config.toml", arguments.set)
    gpus = arguments.gpus[0] if arguments.gpus else 0
    if gpus < 1 or len(arguments.gpus) > 1:
        raise ValueError("--calibrate needs --gpus N, the training processes that the run had on all of its nodes")
    cluster = config.cluster or ClusterSection(nodes=1, gpus_per_node=gpus)
    architecture, _ = shape_of(config)
    config.parallel.layout(cluster.training_ranks).check(architecture)
    cost = cost_model(architecture)
    rates = calibrate(run, config, cluster, cost)
    output = arguments.output.with_suffix(".toml")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f"# Found by tools/simulate_cluster.py --calibrate {run}\n{dump_config(rates)}", encoding="utf-8")
    rows, steps = read_metrics(run / "metrics.jsonl")[SETTLED:], replay(run, config, cluster, cost, rates)[SETTLED:]
    sys.stdout.write(f"{'seconds of':<12}{'measured':>10}{'predicted':>11}{'ratio':>8}\n")
    for part in ("step", "rollout", "train"):
        measured = float(np.mean([row[f"{part}_seconds"] for row in rows]))
        predicted = float(np.mean([s.seconds if part == "step" else getattr(s, f"{part}_seconds") for s in steps]))
        sys.stdout.write(f"{part:<12}{measured:>10.3f}{predicted:>11.3f}{predicted / measured:>8.3f}\n")
    sys.stdout.write(f"rates are in {output}\n")
    return 0


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the cases."""
    lines = [
        "| case | GPUs | step, s | rollout | train | trained tokens/s | varying | per GPU | idle | most of it |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for case in found:
        speed, cause = case["tokens_per_second"], max(case["idle"], key=case["idle"].__getitem__)
        cells = [case["name"], f"{case['gpus']:,}"]
        cells += [f"{case[f'{part}_seconds']['mean']:,.3g}" for part in ("step", "rollout", "train")]
        cells += [f"{speed['mean']:,.0f}", f"{speed['variation']:.1%}", f"{case['tokens_per_second_per_gpu']:,.0f}"]
        cells += [f"{1 - case['busy']:.0%}", f"{cause.replace('_', ' ')} {case['idle'][cause]:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot seconds by part and idle shares of every case; with several numbers of GPUs, throughput over them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{case['name']}, {case['gpus']:,} GPUs" for case in found]
    figure, axes = pyplot.subplots(1, 3, figsize=(17, 2.5 + 0.3 * len(found)), constrained_layout=True)
    stacked(axes[0], labels, [{part: case[f"{part}_seconds"]["mean"] for part in PARTS} for case in found])
    axes[0].set_title("seconds of a step")
    shares = [case["idle"] | {"busy": case["busy"]} for case in found]
    stacked(axes[1], [""] * len(found), shares)
    axes[1].set_title("share of all GPU-seconds")
    names = list(dict.fromkeys(case["name"] for case in found))
    for name in names:
        own = [case for case in found if case["name"] == name]
        speed = np.array([case["tokens_per_second_per_gpu"] for case in own])
        spread = speed * [case["tokens_per_second"]["variation"] for case in own]
        axes[2].errorbar([case["gpus"] for case in own], speed, spread, marker="o", capsize=3, label=name)
    axes[2].set(title="trained tokens/s per GPU, ± deviation over steps", xscale="log", xlabel="GPUs", ylim=(0, None))
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def stacked(axis: Any, labels: Sequence[str], parts: Sequence[dict[str, float]]) -> None:
    places, left = np.arange(len(parts)), np.zeros(len(parts))
    for part in parts[0]:
        values = np.array([max(0.0, each[part]) for each in parts])
        if values.max() > 0:
            axis.barh(places, values, left=left, label=part.replace("_", " "))
            left += values
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    axis.legend(fontsize=8)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", help="of megatron-rl train")
    parser.add_argument("--rates", type=Path, help="TOML with the keys of megatron_rl/simulation/rates.py")
    parser.add_argument("--calibrate", type=Path, metavar="RUN", help="find the rates of a run instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a value of CONFIG")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=A,B", help="simulate each; may be repeated")
    parser.add_argument("--gpus", type=int, nargs="+", metavar="N", help="in all; default: the file's [cluster]")
    parser.add_argument("--weak", action="store_true", help="prompts per step, and a global budget, grow with the GPUs")
    parser.add_argument("--lengths", type=Path, help="one response length per line, or a run; else log-normal, assumed")
    parser.add_argument("--mean-length", type=float, metavar="TOKENS", help="scale them to it; default: as they are")
    parser.add_argument("--correlation", type=float, help="of lengths in a group; default 0.83, or the run's")
    parser.add_argument("--uniform-share", type=float, help="of groups with equal rewards; default 0, or the run's")
    parser.add_argument("--prompt-tokens", type=float, help="default 200, or the run's")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the lengths")
    parser.add_argument("--output", type=Path, default=Path("simulation"), help="without its ending")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(exit_code("simulate_cluster", lambda: main(parsed(sys.argv[1:]))))
