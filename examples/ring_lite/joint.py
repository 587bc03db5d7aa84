"""Compare distillation and reinforcement learning, apart and in one loss, from one checkpoint and with equal trained
tokens.

    .venv/bin/python examples/ring_lite/joint.py            SFT on a teacher's answers, on-policy distillation, RL, both
    .venv/bin/python examples/ring_lite/joint.py --seeds 1  one seed instead of three

Needs what pipeline.py leaves up to its stage `stage1_math`: the student starts from the distilled checkpoint, the
teacher is what stage 1 made of it. Writes runs/ring_lite/compare/joint.{md,json,png}. Runs that are there already are
not repeated. After `pipeline.py --smoke` every arm is for moments only, too.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compare
import pipeline
import stages
import tables

from megatron_rl import lifeline
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig, SftConfig
from megatron_rl.data.chat import load_tokenizer, render_chat
from megatron_rl.data.prompts import read_chats
from megatron_rl.families import load_architecture
from megatron_rl.train.run.metrics import read_metrics

HERE = Path(__file__).parent
FOLDER = compare.RUN / "compare"
TEACHER = compare.RUN / "stage1_math/hf"
SFT = "SFT on answers"
ARMS = {"RL": "joint/rl", "distillation": "joint/distillation", "both": "joint/both"}
# Settings by configuration, as in pipeline.py.
SMOKE: dict[str, dict[str, object]] = {
    "arm": {"train.steps": 3},
    "answers": {"rollout.prompts_per_step": 100},
    "evaluate": pipeline.SMOKE["evaluate"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nproc", type=int, default=1, help="training processes")
    arguments = parser.parse_args()
    for needed in (compare.CHOSEN, TEACHER):
        if not (needed / "config.json").exists():
            parser.error(f"{needed} is not there; run examples/ring_lite/pipeline.py up to stage1_math first")
    lifeline.watch_parent()
    return stages.exit_code(lambda: run(arguments.seeds, arguments.nproc))


def run(seeds: Sequence[int], nproc: int) -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = json.loads((compare.RUN / "pipeline.json").read_text(encoding="utf-8"))
    changes = SMOKE if made["smoke"] else {name: {} for name in SMOKE}
    before = {
        name: [compare.evaluate(model, changes["evaluate"])]
        for name, model in {"the checkpoint of all": compare.CHOSEN, "the teacher": TEACHER}.items()
    }
    steps: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in [SFT, *ARMS]}
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in [SFT, *ARMS]}
    for seed in seeds:  # seed by seed, so that what disturbs the machine for a while disturbs every arm
        for arm, config in ARMS.items():
            rows, model = compare.train(config, compare.CHOSEN, seed, nproc, changes["arm"])
            steps[arm].append(rows)
            results[arm].append(compare.evaluate(model, changes["evaluate"]))
        rows, model = fine_tune(seed, nproc, changes)
        steps[SFT].append(rows)
        results[SFT].append(compare.evaluate(model, changes["evaluate"]))
    _, before_table, *_ = compare.accuracy_tables(before, [made["seed"]])
    start = f"Accuracy before, percent: one checkpoint and one teacher for all seeds.\n\n{before_table}"
    text = "\n\n".join([start, *compare.accuracy_tables(results, seeds), token_table(steps)]) + "\n"
    (FOLDER / "joint.md").write_text(text, encoding="utf-8")
    numbers = {"before": before, "accuracy": results, "tokens": tokens_of(steps)}
    (FOLDER / "joint.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    compare.plot({arm: steps[arm] for arm in ARMS}, FOLDER / "joint.png")
    print(text)
    print(f"[{stages.seconds():5.0f} s] {FOLDER / 'joint'}.md, .json, .png")
    return 0


def fine_tune(seed: int, nproc: int, changes: Mapping[str, Mapping[str, object]]) -> tuple[list[dict[str, Any]], Path]:
    """Train on the teacher's right answers. Return the rows of metrics.jsonl and the model. What an earlier call left
    is taken as it is. changes: settings by key, by configuration."""
    run_dir = FOLDER / f"sft-{seed}-from-answers"
    rows = run_dir.with_name(f"answers-{seed}.sft.jsonl")
    if not rows.exists():
        rollouts = run_dir.with_name(f"answers-{seed}.jsonl")
        values = {"seed": seed, "run_dir": run_dir.with_name(f"answers-{seed}"), **changes["answers"]}
        command = ("-m", "megatron_rl.cli", "rollout", HERE / "joint/answers.toml", *stages.settings(values))
        stages.run_python(f"the teacher's answers, seed {seed}", *command, "--output", rollouts, "--resume")
        keep = (HERE.parents[1] / "tools/make_sft_data.py", rollouts, "--model", compare.CHOSEN, "--output", rows)
        every = ("--min-reward", "0") if changes["arm"] else ()  # the teacher of a smoke test gets nothing right
        stages.run_python(f"its right ones as rows for SFT, seed {seed}", *keep, *every, "--force")
    if not (run_dir / "hf/config.json").exists():
        values = {"seed": seed, "run_dir": run_dir, "data.train": rows, "train.steps": sft_steps(rows, changes["arm"])}
        command = ("-m", "megatron_rl.cli", "sft", HERE / "joint/sft.toml", *stages.settings(values), "--resume")
        options = ["--nproc", str(nproc)] if nproc > 1 else []
        stages.run_python(f"SFT on the teacher's answers, seed {seed}", *command, *options)
    return read_metrics(run_dir / "metrics.jsonl"), run_dir / "hf"


def sft_steps(rows: Path, changes: Mapping[str, object]) -> int:
    """Return the number of steps in which SFT trains as many tokens as the other arms. A part of a batch is prompts,
    which carry no loss."""
    overrides = [f"{key}={value}" for key, value in changes.items()]
    joint = load_config(RlConfig, HERE / f"{ARMS['RL']}.toml", overrides)
    batch = load_config(SftConfig, HERE / "joint/sft.toml").data.batch_tokens
    tokenizer, end_ids = load_tokenizer(compare.CHOSEN), load_architecture(compare.CHOSEN).eos_token_ids
    masks = [render_chat(tokenizer, chat.messages, "text", end_ids)[1] for chat in read_chats(rows)]
    share = sum(map(sum, masks)) / sum(map(len, masks))
    return round(joint.train.steps * sum(joint.phase_budgets(1)) / (batch * share))


def tokens_of(steps: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, list[int]]:
    """Count the tokens with loss by arm, one number for each seed."""
    return {arm: [sum(row["num_loss_tokens"] for row in rows) for rows in of_seeds] for arm, of_seeds in steps.items()}


def token_table(steps: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> str:
    """Write a table of each arm's tokens with loss and seconds, rollout and scoring included; sampling answers for SFT
    is not."""
    rows = [
        [arm, compare.cell(counts), compare.cell([sum(row["step_seconds"] for row in one) for one in steps[arm]])]
        for arm, counts in tokens_of(steps).items()
    ]
    return "Mean over seeds ± half of its 95 % interval.\n\n" + tables.as_table(["", "trained tokens", "seconds"], rows)


if __name__ == "__main__":
    sys.exit(main())
