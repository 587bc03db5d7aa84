"""Run the laptop demo: a tiny Ling-lite is warm-started on written-out solutions and trained by C3PO, stage by stage.

    make demo                       or   .venv/bin/python examples/ring_lite/demo.py --run runs/demo
    make demo NPROC=2 TP=2          divides training over two processes
    make demo ENGINE=sglang         trains against a real SGLang server (make install-sglang)
    .venv/bin/python examples/ring_lite/demo.py --family bailing_moe_v2 --router-replay

Every stage is a command that also works alone. A demo that was killed goes on where it stopped; one that had finished
is moved aside, never deleted.
"""

import argparse
import json
import statistics
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import figures
import stages

from megatron_rl import lifeline
from megatron_rl.families.registry import FAMILIES

ROOT = Path(__file__).parents[2]
CONFIGS = Path(__file__).parent / "demo"
# The task: kinds and difficulties of megatron_rl/data/tasks.py, chosen so that the warm start leaves room to learn.
KINDS = ["sort", "filter"]
DIFFICULTIES = ["1"]
# Options of tools/make_tiny_model.py, so that a tiny model has what the large ones of its family have.
OPTIONS_OF = {
    "bailing_moe_v2": [
        *("--expert-groups", "4", "--top-expert-groups", "2", "--shared-experts", "1", "--first-k-dense-replace", "1"),
        *("--moe-intermediate-size", "96", "--routed-scaling-factor", "2.5"),
    ],
    "glm4_moe": ["--shared-experts", "1", "--first-k-dense-replace", "1", "--routed-scaling-factor", "2.5"],
    "olmoe": ["--kv-heads", "4"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nproc", type=int, default=1, help="training processes")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--family", choices=FAMILIES, default="bailing_moe")
    parser.add_argument("--router-replay", action="store_true", help="train with the experts that the server chose")
    parser.add_argument("--engine", choices=("embedded", "sglang"), default="embedded")
    parser.add_argument("--steps", type=int, help="steps of reinforcement learning; default: those of rl.toml")
    parser.add_argument("--sft-steps", type=int, help="steps of the warm start; default: those of sft.toml")
    arguments = parser.parse_args()
    lifeline.watch_parent()  # the Makefile names make as the process to follow
    return stages.exit_code(Demo(arguments).run)


class Demo:
    """Runs the stages in order; each leaves a file by which a later run knows that it is done."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder: Path = arguments.run
        layout = {f"parallel.{name}": getattr(arguments, name) for name in ("tensor", "expert", "pipeline")}
        self.common = stages.settings({"seed": arguments.seed, **layout})

    def run(self) -> int:
        self.prepare_folder()
        folder, seed = self.folder, str(self.arguments.seed)
        if not (folder / "model").exists():
            flags = ["--seed", seed, "--family", self.arguments.family, *OPTIONS_OF.get(self.arguments.family, [])]
            stages.run_python("a tiny model", ROOT / "tools/make_tiny_model.py", folder / "model", *flags)
        if not (folder / "data/test.jsonl").exists():
            options = ["--kinds", *KINDS, "--difficulties", *DIFFICULTIES, "--num-test", "1024", "--seed", seed]
            stages.run_python("a task", ROOT / "tools/make_task_data.py", folder / "data", *options)
        self.train("warm start", "sft", self.arguments.sft_steps, model=folder / "model")
        before = self.evaluate("before", folder / "sft/hf")
        self.train("reinforcement learning", "rl", self.arguments.steps, model=folder / "sft/hf")
        after = self.evaluate("after", folder / "rl/hf")
        rows = [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        plot(rows, folder / "plot.png")
        self.publish(before, after, rows)
        return 0

    def prepare_folder(self) -> None:
        """Return a folder for these arguments: a new one, or the one that an unfinished demo left."""
        wanted = {k: str(v) for k, v in vars(self.arguments).items()}
        record = self.folder / "demo.json"
        if self.folder.exists():
            same = record.exists() and json.loads(record.read_text(encoding="utf-8")) == wanted
            if same and not (self.folder / "summary.json").exists():
                print(f"continuing the unfinished demo in {self.folder}")
                return
            aside = self.folder.with_name(f"{self.folder.name}-until-{datetime.now():%Y%m%d-%H%M%S}")
            self.folder.rename(aside)
            print(f"an earlier demo is now in {aside}")
        self.folder.mkdir(parents=True)
        record.write_text(json.dumps(wanted, indent=1), encoding="utf-8")

    def train(self, title: str, stage: str, steps: int | None, model: Path) -> None:
        run_dir = self.folder / stage
        if (run_dir / "hf").exists():
            return
        command = {"sft": "sft", "rl": "train"}[stage]
        data = self.folder / "data" / {"sft": "sft.jsonl", "rl": "train.jsonl"}[stage]
        paths = {"run_dir": run_dir, "model.path": model, "data.train": data}
        options = stages.settings(paths | ({"train.steps": steps} if steps else {}))
        if stage == "rl" and self.arguments.router_replay:
            options += stages.settings({"rollout.router_replay": "true"})
        if stage == "rl" and self.arguments.engine == "sglang":
            # The Python file that SGLang has to run is the one that make_tiny_model.py wrote.
            options += stages.settings({"rollout.engine": "sglang", "model.trust_remote_code": "true"})
        if (run_dir / "checkpoints/latest").exists():
            options.append("--resume")
        if self.arguments.nproc > 1:
            options += ["--nproc", str(self.arguments.nproc)]
        stages.run_python(title, "-m", "megatron_rl.cli", command, CONFIGS / f"{stage}.toml", *self.common, *options)

    def evaluate(self, when: str, model: Path) -> dict:
        output = self.folder / f"accuracy_{when}"
        if not (output / "results.json").exists():
            paths = {"benchmarks.unseen.path": self.folder / "data/test.jsonl", "seed": self.arguments.seed}
            options = [*stages.settings(paths), "--model", model, "--output", output, "--resume"]
            stages.run_python(
                f"accuracy {when}", "-m", "megatron_rl.cli", "evaluate", CONFIGS / "evaluate.toml", *options
            )
        return json.loads((output / "results.json").read_text(encoding="utf-8"))["benchmarks"]["unseen"]

    def publish(self, before: dict, after: dict, rows: list[dict]) -> None:
        """Copy the run's files to where a reader looks for them, write summary.json, and print the result in words."""
        seconds = sum(row["step_seconds"] for row in rows)
        tokens = [row["num_loss_tokens"] for row in rows]
        summary = {
            "accuracy_before": before["average"]["value"],
            "accuracy_before_interval": [before["average"]["low"], before["average"]["high"]],
            "accuracy_after": after["average"]["value"],
            "accuracy_after_interval": [after["average"]["low"], after["average"]["high"]],
            "accuracy_before_by_kind": {kind: found["value"] for kind, found in before["by_kind"].items()},
            "accuracy_after_by_kind": {kind: found["value"] for kind, found in after["by_kind"].items()},
            "num_test_prompts": after["num_prompts"],
            "rl_steps": len(rows),
            "rl_seconds": seconds,
            "generated_tokens_per_second": sum(r["num_generated_tokens"] for r in rows)
            / sum(r["rollout_seconds"] for r in rows),
            "trained_tokens_per_second": sum(r["num_forward_tokens"] for r in rows)
            / sum(r["train_seconds"] for r in rows),
            "tokens_per_step_cv": statistics.pstdev(tokens) / statistics.mean(tokens),
            "logprob_difference_p999": max(row["logprob_difference_p999"] for row in rows),
            "max_logprob_difference": max(row["logprob_difference_max"] for row in rows),
            "total_seconds": stages.seconds(),
            "seed": self.arguments.seed,
            "git_commit": git_commit(),
        }
        for name in ("config.toml", "metrics.jsonl", "tensorboard", "rollouts"):
            link = self.folder / name
            if not link.is_symlink():
                link.symlink_to(Path("rl") / name)
        report = self.report()
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        print(
            f"[{stages.seconds():5.0f} s] done: accuracy {interval(before)} before, {interval(after)} after "
            f"{len(rows)} steps, on {after['num_prompts']} unseen prompts\n"
            f"summary {self.folder / 'summary.json'}, plot {self.folder / 'plot.png'}\n"
            f"report for a browser: {report}"
        )

    def report(self) -> Path:
        """Write one page of both stages, with the accuracy before and after."""
        path = self.folder / "report.html"
        runs = [self.folder / stage for stage in ("sft", "rl")]
        accuracy = [self.folder / f"accuracy_{when}" for when in ("before", "after")]
        options = ["--evaluation", *accuracy, "--output", path]
        stages.run_python("run report", "-m", "megatron_rl.cli", "report", *runs, *options)
        return path


def interval(result: dict) -> str:
    average = result["average"]
    return f"{average['value']:.3f} [{average['low']:.3f}, {average['high']:.3f}]"


def git_commit() -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        errors="replace",
    )
    return answer.stdout.strip() or "unknown"


def plot(rows: list[dict], path: Path) -> None:
    """Plot reward, entropy, gradient norm, tokens per step and step time over the steps."""
    titles = {
        "reward": "reward (mean of the rollouts)",
        "entropy": "policy entropy (nats)",
        "grad_norm": "gradient norm",
        "num_loss_tokens": "tokens that carry loss",
        "response_tokens_mean": "response length (tokens)",
        "step_seconds": "seconds per step",
    }
    with figures.panels(titles, path) as panels:
        for name, axis in panels.items():
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], color="tab:blue", linewidth=1.4)
            axis.set_xlabel("step", fontsize=9)
            if name in ("num_loss_tokens", "step_seconds", "reward"):
                axis.set_ylim(bottom=0)


if __name__ == "__main__":
    sys.exit(main())
