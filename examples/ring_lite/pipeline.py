"""Run the paper's recipe in miniature, from distillation to evaluation: every stage is a command that also works alone.

    make ring-lite-mini             or   .venv/bin/python examples/ring_lite/pipeline.py
    .venv/bin/python examples/ring_lite/pipeline.py --only sft             one stage, if it is not done yet
    .venv/bin/python examples/ring_lite/pipeline.py --only sft --again     once more; later stages have to follow
    .venv/bin/python examples/ring_lite/pipeline.py --commands             print the commands of all stages, run nothing

Stages hand over by checkpoints under runs/ring_lite of the working directory. A pipeline that was killed goes on where
it stopped, a stage of training at its last checkpoint.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import stages
import tables

from megatron_rl import lifeline

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CONFIGS = HERE / "cpu_mini"
RUN = Path("runs/ring_lite")
# The models that are evaluated, in the order in which they are made.
MODELS = {
    "teacher": RUN / "teacher/hf",
    "distilled": RUN / "select/chosen",
    "stage 1": RUN / "stage1_math/hf",
    "stage 2": RUN / "stage2_code_science/hf",
    "final": RUN / "export",
}
# Settings of each configuration that make all stages end in a few minutes. They show that the stages run, no more.
SMOKE: dict[str, dict[str, object]] = {
    "teacher": {"train.steps": 300},
    "distill": {"rollout.prompts_per_step": 1200},
    "sft": {"train.epochs": 6},
    "select": {"prompts": 12, "rollout.samples_per_prompt": 4},
    "stage1_math": {"train.steps": 3},
    "stage2_code_science": {"train.steps": 3},
    # The student of a smoke test gets nothing right.
    "general_distill": {"rollout.prompts_per_step": 400, "model.path": RUN / "teacher/hf"},
    "general_sft": {"train.epochs": 1},
    "evaluate": {f"benchmarks.{name}.prompts": 40 for name in tables.DOMAINS},
}
# Almost the most probable token each time: two engines then say the same.
GREEDY = ("--set", "rollout.temperature=0.01")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Describes one stage. commands: of Python, one after the other. makes: below RUN, what is there once all have run.

    trains: the first command is one of megatron-rl's that trains in RUN/NAME, in as many processes as one likes.
    """

    name: str
    title: str
    commands: tuple[tuple[object, ...], ...]
    makes: str
    trains: bool = False


def recipe(seed: int, smoke: bool = False) -> tuple[Stage, ...]:
    """Return the stages in order. smoke: each goes only as far as `SMOKE` says."""

    def rl(command: str, config: str, *options: object) -> tuple[object, ...]:
        values = {"seed": seed} | (SMOKE.get(config, {}) if smoke else {})
        return ("-m", "megatron_rl.cli", command, CONFIGS / f"{config}.toml", *stages.settings(values), *options)

    def training(command: str, name: str, title: str) -> Stage:
        return Stage(name=name, title=title, commands=(rl(command, name),), makes=f"{name}/hf/config.json", trains=True)

    def distillation(name: str, title: str) -> Stage:
        """Sample by NAME.toml, and keep what is right as rows for SFT."""
        rollouts, rows = RUN / name / "rollouts.jsonl", RUN / name / "sft.jsonl"
        keep = (ROOT / "tools/make_sft_data.py", rollouts, "--model", RUN / "base", "--output", rows, "--force")
        validation = ("--validation", RUN / name / "validation.jsonl", "--validation-share", "0.04")
        sample = rl("rollout", name, "--output", rollouts, "--resume")
        return Stage(name=name, title=title, commands=(sample, (*keep, *validation)), makes=f"{name}/sft.jsonl")

    def evaluation(model: str, *options: object, name: str = "") -> Stage:
        name = name or f"evaluation/{model.replace(' ', '_')}"
        command = rl("evaluate", "evaluate", "--model", MODELS[model], "--output", RUN / name, "--resume", *options)
        return Stage(name=name, title=f"evaluation of {model}", commands=(command,), makes=f"{name}/results.json")

    sglang = ("--set", "rollout.engine=sglang", "--set", "model.trust_remote_code=true")
    return (
        Stage(
            name="base",
            title="a tiny BailingMoE with random weights",
            commands=((ROOT / "tools/make_tiny_model.py", RUN / "base", "--init-std", "0.06", "--seed", seed),),
            makes="base/config.json",
        ),
        Stage(
            name="data",
            title="three domains of problems, and a fourth",
            commands=((HERE / "domains.py", RUN / "data", "--seed", seed),),
            makes="data/general_worked.jsonl",
        ),
        training("sft", "teacher", "the teacher, from written-out solutions"),
        evaluation("teacher"),
        distillation("distill", "distillation: the teacher's right answers"),
        training("sft", "sft", "SFT of the student on them, a checkpoint per epoch"),
        Stage(
            name="select",
            title="choice of the checkpoint by its entropy",
            commands=(rl("select", "select", "--resume"),),
            makes="select/chosen/config.json",
        ),
        evaluation("distilled"),
        training("train", "stage1_math", "RL stage 1: mathematics"),
        evaluation("stage 1"),
        training("train", "stage2_code_science", "RL stage 2: code and science"),
        evaluation("stage 2"),
        distillation("general_distill", "the reasoner's own right answers"),
        training("sft", "general_sft", "general SFT"),
        Stage(
            name="export",
            title="export of the last checkpoint to Hugging Face",
            commands=(("-m", "megatron_rl.cli", "convert", "--to", "hf", RUN / "general_sft", RUN / "export"),),
            makes="export/config.json",
        ),
        evaluation("final"),
        evaluation("final", *GREEDY, name="evaluation/embedded"),
        evaluation("final", *GREEDY, *sglang, name="evaluation/sglang"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="its name; --commands lists them")
    parser.add_argument(
        "--again", action="store_true", help="with --only: even if it is done; later stages have to follow"
    )
    parser.add_argument("--nproc", type=int, default=1, help="training processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--without-sglang", action="store_true", help="leave out the evaluation on a real SGLang server"
    )
    parser.add_argument("--smoke", action="store_true", help="every stage for moments only: does it run?")
    parser.add_argument("--commands", action="store_true", help="print the commands of all stages, run nothing")
    arguments = parser.parse_args()
    everything = recipe(arguments.seed, arguments.smoke)
    known = [stage.name for stage in everything]
    if unknown := [name for name in arguments.only if name not in known]:
        parser.error(f"no stage is called {unknown[0]}; there are {', '.join(known)}")
    if arguments.again and not arguments.only:
        parser.error("--again needs --only: to do everything once more, move runs/ring_lite away")
    chosen = [stage for stage in everything if stage.name in (arguments.only or known)]
    if arguments.without_sglang:
        chosen = [stage for stage in chosen if not stage.name.endswith("sglang")]
    if arguments.commands:
        for stage in chosen:
            print(f"# {stage.name}: {stage.title}")
            for command in stage.commands:
                print("python", shlex.join(map(str, command)))
        return 0
    lifeline.watch_parent()
    later = known[min(known.index(stage.name) for stage in chosen) :] if arguments.again else []
    return stages.exit_code(lambda: run(chosen, later, arguments))


def run(chosen: list[Stage], again: list[str], arguments: argparse.Namespace) -> int:
    """Run the chosen stages that are not done. again: stages whose work is out of date."""
    claim_folder({"seed": arguments.seed, "smoke": arguments.smoke})
    move_aside(again)
    for stage in chosen:
        if not (RUN / stage.makes).exists():
            do(stage, arguments)
    tables.write(RUN, list(MODELS))
    return 0


def move_aside(names: list[str]) -> None:
    """Move aside what these stages made: the first is to be repeated, and the later ones were made from it."""
    seconds = tables.seconds(RUN)
    aside = RUN.with_name(f"{RUN.name}-until-{datetime.now():%Y%m%d-%H%M%S}")
    for name in names:
        seconds.pop(name, None)
        if (RUN / name).exists():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (RUN / name).rename(aside / name)
            print(f"the earlier {name} is now in {aside / name}")
    tables.write_seconds(RUN, seconds)


def claim_folder(wanted: dict[str, object]) -> None:
    """Claim RUN for one seed and one size. Exit where it holds another pipeline."""
    record = RUN / "pipeline.json"
    if record.exists() and (before := json.loads(record.read_text(encoding="utf-8"))) != wanted:
        sys.exit(f"{RUN} holds a pipeline of {before}, not {wanted}; move it away, or work in another directory")
    RUN.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(wanted), encoding="utf-8")


def do(stage: Stage, arguments: argparse.Namespace) -> None:
    """Run a stage's commands, and add to RUN/seconds.json how long they took. A stage that is cut short and goes on has
    taken both times."""
    started = stages.seconds()
    try:
        for command in stage.commands:
            options: list[object] = []
            if stage.trains:
                options = ["--resume", *(["--nproc", arguments.nproc] if arguments.nproc > 1 else [])]
            stages.run_python(f"{stage.name}: {stage.title}", *command, *options)
    finally:
        seconds = tables.seconds(RUN)
        seconds[stage.name] = seconds.get(stage.name, 0.0) + stages.seconds() - started
        tables.write_seconds(RUN, seconds)


if __name__ == "__main__":
    sys.exit(main())
