"""Train SmolLM2 here and by TRL's GRPOTrainer, on the same model, prompts and reward, and compare speed and learning.

    make smollm2, and when it has ended, on an idle machine
    .venv/bin/python tools/bench_trl.py --trl-python VENV/bin/python [--run runs/smollm2/seed_1] [--steps 12]

VENV is an environment with torch 2.13.0, transformers, trl 1.16.0, accelerate and datasets. Ours runs
examples/smollm2/rl.toml, with as many processes as it would; TRL's side takes its model, prompts, response limit,
learning rate and optimizer, and as many prompts as make about as many tokens of responses a step. Responses are as
long as they come. Prints one JSON object: medians over the steps after the first, ratios, and the reward beside the
tokens that were generated until then. --trl-dtype and --trl-backend choose how TRL computes; float32 with --autocast
is what its own defaults do. Weights in bfloat16 are faster, but small updates round away in them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.errors import exit_code

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples/smollm2/rl.toml"
RATES = {
    "end_to_end": ("num_generated_tokens", "step_seconds"),
    "generation": ("num_generated_tokens", "rollout_seconds"),
    "training": ("num_forward_tokens", "train_seconds"),
}
Rows = list[dict[str, Any]]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2/seed_1"), help="whose warm start and questions")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of rl.toml")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--nproc", type=int, default=min(2, os.cpu_count() or 1), help="training processes of ours")
    parser.add_argument("--trl-python", required=True, help="an interpreter with trl 1.16.0")
    parser.add_argument("--trl-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--autocast", action="store_true", help="let TRL train in bfloat16 on weights in float32")
    parser.add_argument("--trl-backend", choices=("generate", "continuous"), default="generate")
    parser.add_argument("--micro-batch", type=int, default=32, help="responses that TRL trains on at once")
    arguments = parser.parse_args(argv)
    if arguments.trl_backend == "continuous" and arguments.trl_dtype == "float32":
        parser.error("continuous batching of TRL 1.16.0 returns empty responses for weights in float32; take bfloat16")
    return exit_code("bench_trl", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    settings = [f"train.steps={arguments.steps}", "train.save_every=0", f"model.path={arguments.run / 'sft/hf'}"]
    settings += [f"data.train={arguments.run / 'data/train.jsonl'}", *arguments.set]
    with tempfile.TemporaryDirectory(prefix="megatron_rl-bench-") as folder:
        config = load_config(RlConfig, CONFIG, [*settings, f"run_dir={folder}/ours"])
        sides = {
            "megatron_rl": ours(arguments, settings, Path(folder) / "ours"),
            "trl": trls(arguments, config, Path(folder) / "trl"),
        }
    speed = {name: {rate: tokens_per_second(rows[1:], rate) for rate in RATES} for name, rows in sides.items()}
    result = {
        "benchmark": "trl",
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg(),
        "trl": {name: getattr(arguments, name) for name in ("trl_dtype", "autocast", "trl_backend", "micro_batch")},
        "tokens_per_second": speed,
        "ratio_to_trl": {rate: round(speed["megatron_rl"][rate] / speed["trl"][rate], 3) for rate in RATES},
        "curves": {name: curve(rows) for name, rows in sides.items()},
    }
    print(json.dumps(result, indent=1))
    return 0


def ours(arguments: argparse.Namespace, settings: list[str], run_dir: Path) -> Rows:
    """Return the metrics of each step of `megatron-rl train`."""
    options = [part for setting in [*settings, f"run_dir={run_dir}"] for part in ("--set", setting)]
    command = [sys.executable, "-m", "megatron_rl.cli", "train", CONFIG, "--nproc", arguments.nproc, *options]
    environment = os.environ | {"MEGATRON_RL_PARENT": str(os.getpid())}
    subprocess.run([str(part) for part in command], check=True, env=environment, stdout=sys.stderr)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def trls(arguments: argparse.Namespace, config: RlConfig, output: Path) -> Rows:
    """Return the same of TRL, whose script tools/trl_grpo.py runs by its own interpreter."""
    output.mkdir()
    settings = trl_settings(config, arguments.steps, arguments.micro_batch) | {
        "output": str(output),
        "dtype": arguments.trl_dtype,
        "autocast": arguments.autocast,
        "backend": arguments.trl_backend,
    }
    command = [arguments.trl_python, str(ROOT / "tools/trl_grpo.py"), json.dumps(settings)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=sys.stderr)
    return json.loads((output / "rows.json").read_text(encoding="utf-8"))


def trl_settings(config: RlConfig, steps: int, micro_batch: int) -> dict[str, Any]:
    """Return what TRL's side shares with a run of ours."""
    if config.reward.kind != "exact" or not config.data.train or len(config.data.train) != 1:
        raise ValueError("TRL's side has the reward 'exact' and one file of prompts; name a configuration with these")
    optimizer, samples = config.optimizer, config.rollout.samples_per_prompt
    prompts = config.rollout.prompts_per_step
    if prompts * samples % micro_batch:
        raise ValueError(f"--micro-batch {micro_batch} does not divide the {prompts * samples} responses of a step")
    return {
        "model": str(config.model.path),
        "data": str(next(iter(config.data.train))),
        "steps": steps,
        "prompts": prompts,
        "samples": samples,
        "response_tokens": config.rollout.max_response_tokens,
        "learning_rate": optimizer.learning_rate,
        "warmup_steps": optimizer.warmup_steps,
        "beta1": optimizer.beta1,
        "beta2": optimizer.beta2,
        "clip_grad": optimizer.clip_grad,
        "seed": config.seed,
        "threads": os.cpu_count() or 1,
        "micro_batch": micro_batch,
    }


def tokens_per_second(rows: Rows, rate: str) -> float:
    tokens, seconds = RATES[rate]
    return round(statistics.median(row[tokens] / row[seconds] for row in rows), 1)


def curve(rows: Rows) -> list[dict[str, float]]:
    """Return the reward of each step beside the tokens generated before it."""
    tokens, points = 0, []
    for row in rows:
        points.append({"tokens": tokens, "reward": round(row["reward"], 4)})
        tokens += row["num_generated_tokens"]
    return points


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
