"""Measure seconds and tokens per second of whole training steps, at the size that a user of TRL would run on a CPU.

    python tools/bench_step.py [--steps 12] [--trl-python VENV/bin/python --trl-script trl_baseline.py]

A 1.9M-parameter mixture of experts (4 layers, hidden 128, 8 experts, 2 active, vocabulary 512), 8 prompts x 8 samples,
64 new tokens, fp32: rollout on the embedded server, reward, plan, megatron-core step, weights back. Prints one JSON
object of medians over the steps after the first two. With --trl-python the script runs TRL's GRPOTrainer at the same
shape right after, in that interpreter, and adds the ratios.
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

ROOT = Path(__file__).parents[1]
CONFIG = """
run_dir = "{folder}/run"
[model]
path = "{folder}/model"
[data]
train = "{folder}/data/train.jsonl"
[rollout]
prompts_per_step = 8
samples_per_prompt = 8
max_prompt_tokens = 64
max_response_tokens = 64
[budget]
tokens = 4096
under_full = "short"
[algorithm]
name = "grpo"
[optimizer]
learning_rate = 1e-4
[train]
steps = {steps}
micro_batch_tokens = 8192
"""
MEASURED = (
    "step_seconds",
    "rollout_seconds",
    "train_seconds",
    "update_weights_seconds",
    "num_generated_tokens",
    "num_forward_tokens",
    "generated_tokens_per_second",
    "trained_tokens_per_second",
    "end_to_end_tokens_per_second",
)


def measure(steps: int, folder: Path, nproc: int) -> dict[str, float]:
    """Return the medians of a real `megatron-rl train` run."""
    python: list[str | Path] = [sys.executable]
    subprocess.run(
        [*python, ROOT / "tools/make_tiny_model.py", folder / "model", "--vocab-size", "512"],
        check=True,
        stdout=sys.stderr,
    )
    data = [*python, ROOT / "tools/make_task_data.py", folder / "data", "--num-sft", "1", "--num-train", "400"]
    subprocess.run([*data, "--num-test", "1"], check=True, stdout=sys.stderr)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder, steps=steps), encoding="utf-8")
    environment = os.environ | {"MEGATRON_RL_PARENT": str(os.getpid())}
    train = [*python, "-m", "megatron_rl.cli", "train", folder / "config.toml", "--nproc", str(nproc)]
    subprocess.run(train, check=True, env=environment)
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()][2:]
    return {name: round(statistics.median(row[name] for row in rows), 4) for name in MEASURED}


def measure_trl(python: str, script: str, steps: int) -> dict[str, float]:
    answer = subprocess.run(
        [python, script, "--steps", str(steps)],
        check=True,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    # TRL prints a dict per step before it; the result starts on a line of its own.
    return json.loads(answer.stdout[answer.stdout.index("{\n") :])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--nproc", type=int, default=min(2, os.cpu_count() or 1), help="data-parallel training ranks")
    parser.add_argument("--trl-python", help="an interpreter with trl 1.16.0")
    parser.add_argument("--trl-script", help="a script that trains the same by trl; needed with --trl-python")
    arguments = parser.parse_args(argv)
    if bool(arguments.trl_python) != bool(arguments.trl_script):
        parser.error("--trl-python and --trl-script go together")
    with tempfile.TemporaryDirectory(prefix="megatron_rl-bench-") as folder:
        result: dict[str, Any] = {"benchmark": "step", "cpu_count": os.cpu_count(), "load_average": os.getloadavg()}
        result["megatron_rl"] = ours = measure(arguments.steps, Path(folder), arguments.nproc)
    if arguments.trl_python:
        trl = measure_trl(arguments.trl_python, arguments.trl_script, arguments.steps)
        result["trl"] = trl
        result["ratio_to_trl"] = {
            "end_to_end": ours["end_to_end_tokens_per_second"] / trl["end_to_end_generated_tok_s"],
            "generation": ours["generated_tokens_per_second"] / trl["generated_tok_s"],
            "training": ours["trained_tokens_per_second"] / trl["trained_tok_s"],
        }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
