"""This module is the command `megatron-rl`, a thin layer over the package. Parsing and checking import neither torch
nor megatron."""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from megatron_rl import lifeline, versions
from megatron_rl.errors import (
    EXIT_INTERRUPTED,
    EXIT_UNREAD,
    end_rank,
    exit_code,
    flushed,
    interrupt_on_signals,
    speak_as,
)
from megatron_rl.launch import run_ranks
from megatron_rl.locales import use_utf8
from megatron_rl.open_files import raise_open_files
from megatron_rl.place import has_rank, own_place, remedy
from megatron_rl.terminal import LOG_LEVELS, configure_logging, say

_SET = "Override a configuration key. May be given several times."
_LONG = ("train", "sft", "evaluate", "rollout", "select", "serve")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (errors.py). One of several ranks ends its process here."""
    if argv is None:
        use_utf8()
    try:
        arguments = command_parser().parse_args(argv)
    except SystemExit as ended:  # --help, --version and mistakes
        raise SystemExit(flushed(int(ended.code or 0))) from None
    except BrokenPipeError:  # of what these print
        return flushed(EXIT_UNREAD)
    configure_logging(sys.stderr if getattr(arguments, "json", False) else sys.stdout)
    quieten_libraries()

    def run() -> int:
        check_environment()
        if arguments.command in _LONG and os.environ.get("RANK", "0") == "0" and not lifeline.is_own_rank():
            say(f"megatron-rl {arguments.command} {arguments.config}")  # what comes next may take a while
        lifeline.watch_parent()
        raise_open_files()
        interrupt_on_signals()
        return int(arguments.run(arguments))

    code = exit_code(f"megatron-rl {arguments.command}", run)
    if code == EXIT_INTERRUPTED and argv is None:
        end_rank(code)  # threads of torch that are cut off in the middle would abort the process
    if hasattr(arguments, "nproc") and has_rank():
        end_rank(code)
    return code


def check_environment() -> None:
    """Raise ValueError for a variable of ours with a value that would be ignored."""
    level, forced = os.environ.get("MEGATRON_RL_LOG", "").lower(), os.environ.get("MEGATRON_RL_DEVICE", "")
    for name, value, known in (("MEGATRON_RL_LOG", level, LOG_LEVELS), ("MEGATRON_RL_DEVICE", forced, ("cpu",))):
        if value and value not in known:
            raise ValueError(f"the variable {name} is {value!r}; set it to {' or '.join(known)}, or take it out")


def quieten_libraries() -> None:
    """Hide the deprecation warnings of torch, megatron-core and transformers, which are for their authors. Ours still
    show."""
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch|transformers)(\.|$)")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class _Version(argparse.Action):
    """Prints the versions and exits. argparse's own action wants the text before anybody asks for it, and wraps its
    lines."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(versions.describe() + "\n")
        parser.exit()


Commands = Any  # argparse has no public name for it


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. tools/docs_reference.py reads the reference from it."""
    parser = argparse.ArgumentParser(
        prog="megatron-rl", description="Reinforcement learning of language models with C3PO on megatron-core."
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        help="Print the versions of this package, torch, megatron-core and sglang.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, text in (
        ("train", _train, "Reinforcement learning: rollout and train phases under a token budget."),
        ("sft", _sft, "Supervised fine-tuning (SFT) on packed chats."),
        ("evaluate", _evaluate, "Evaluate a model on benchmarks: avg@k, pass@k and maj@k."),
        (
            "rollout",
            _rollout,
            "Run the rollout phase alone: sample responses to prompts, score them and write them to a file.",
        ),
        ("select", _select, "Choose one of several models by the token entropy of its policy."),
        ("serve", _serve, "Run generation servers for a training run on other machines, until SIGTERM."),
        (
            "plan",
            _plan,
            "Show the layout, token budget, memory per GPU and start command of a configuration, without a GPU.",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, help="Configuration file (TOML).")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=_SET)
        command.set_defaults(run=run)
        _add_options(name, command)
    _add_checkpoints(commands)
    _add_reports(commands)
    _add_looks(commands)
    return parser


def _add_options(name: str, command: argparse.ArgumentParser) -> None:
    """Add the options of a command that takes a configuration file."""
    if name in ("evaluate", "rollout"):
        command.add_argument("--model", type=Path, help="Model to use instead of model.path.")
    if name == "evaluate":
        command.add_argument("--output", type=Path, required=True, help="Folder for responses and results.")
        command.add_argument(
            "--benchmark", nargs="+", default=[], metavar="NAME", help="Benchmarks to evaluate. Default: all."
        )
        command.add_argument("--resume", action="store_true", help="Continue an evaluation in the output folder.")
    elif name == "rollout":
        command.add_argument("--prompts", type=int, help="Number of prompts. Default: rollout.prompts_per_step.")
        command.add_argument("--output", type=Path, help="File for the responses. Default: rollouts.jsonl in run_dir.")
        command.add_argument("--resume", action="store_true", help="Continue an output file of an interrupted run.")
    elif name == "select":
        command.add_argument("--resume", action="store_true", help="Continue a selection in run_dir.")
    elif name == "serve":
        command.add_argument(
            "--register",
            type=Path,
            required=True,
            metavar="DIR",
            help="Shared folder in which the servers register. `train --servers DIR` reads it.",
        )
        command.add_argument(
            "--of",
            type=int,
            default=1,
            metavar="N",
            help="Number of `serve` processes that register in this folder in all. Default: 1.",
        )
    elif name == "plan":
        _add_plan(command)
    else:
        command.add_argument("--resume", action="store_true", help="Continue from the last checkpoint in run_dir.")
        command.add_argument(
            "--nproc", type=int, metavar="N", help="Number of training ranks to start on this machine. Default: 1."
        )
    if name == "train":
        command.add_argument(
            "--rollouts",
            type=Path,
            help="Train on the responses in this file of `megatron-rl rollout`, without servers.",
        )
        command.add_argument(
            "--servers",
            type=Path,
            metavar="DIR",
            help="Use the servers that `megatron-rl serve` registers in DIR, and wait for them.",
        )


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nodes", type=int, metavar="N", help="Number of machines. Default: cluster.nodes, else 1.")
    command.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help="Number of GPUs of one machine. Default: cluster.gpus_per_node, else 8.",
    )
    command.add_argument(
        "--serving-nodes",
        type=int,
        metavar="N",
        help="Number of these machines that only run generation servers. 0: every machine trains and serves. Default: "
        "cluster.serving_nodes, or 0 where that is not set or --nodes is given.",
    )
    command.add_argument(
        "--gpu-memory-gb",
        type=float,
        metavar="GB",
        help="Memory of one GPU, in GiB (2^30 bytes). 0: no comparison. Default: cluster.gpu_memory_gb, else 80.",
    )
    command.add_argument(
        "--rates",
        type=Path,
        metavar="FILE",
        help="File of rates (docs/simulator.md) to predict the time of a step. Default: cluster.rates.",
    )
    command.add_argument(
        "--suggest", action="store_true", help="Search the fastest layouts that fit, and show the keys to set."
    )
    command.add_argument("--json", action="store_true", help="Print the plan as JSON.")


def _add_checkpoints(commands: Commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="Convert between a Hugging Face directory and a Megatron checkpoint.",
        description="Convert a Hugging Face directory to a Megatron distributed checkpoint that the trainer opens in "
        "any parallel layout. Or convert such a checkpoint, a step_N of a run, or a run (its newest step) to a Hugging "
        "Face directory, with LoRA adapters merged. Or convert its adapters to a directory for peft.",
    )
    convert.add_argument(
        "source", type=Path, help="Hugging Face directory, Megatron checkpoint, step_N or run directory."
    )
    convert.add_argument("destination", type=Path, help="New directory for the result.")
    convert.add_argument("--to", choices=("megatron", "hf", "peft"), required=True, help="Format of the destination.")
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="Data type of the result. Default: that of each tensor.",
    )
    convert.add_argument(
        "--max-shard-size", default="5GB", help="Maximum size of one file, in bytes, MB or GB. Default: 5GB."
    )
    convert.add_argument("--dry-run", action="store_true", help="Print what would be done, and write nothing.")
    convert.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="Read the result back and compare checksums. Default: yes for a Hugging Face directory, else no.",
    )
    convert.add_argument(
        "--fold-norm-head",
        action="store_true",
        help="Write the LM head divided by its norm, and norm_head = false, for runtimes that do not normalise it.",
    )
    convert.set_defaults(run=_convert)
    verify = commands.add_parser(
        "compare",
        help="Compare two checkpoints of either kind tensor by tensor. Exit code 1 when they differ.",
        description="Compare two checkpoints, each Hugging Face or Megatron, by tensor. Exit code 1 when they differ.",
    )
    verify.add_argument("first", type=Path, help="First checkpoint.")
    verify.add_argument("second", type=Path, help="Second checkpoint.")
    verify.add_argument(
        "--tolerance", type=float, default=0.0, help="Largest absolute difference of equal values. Default: 0."
    )
    verify.add_argument("--text", help="Also compare the log-probs of this text under both models, in float32.")
    verify.set_defaults(run=_compare)


def _add_reports(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="Write one HTML page with curves and responses of runs.",
        description="Write one HTML page of one or several runs, which a browser shows without a network: "
        "configuration, curves, comparison over seeds, stages in their order, and responses by token (docs/report.md).",
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="Run directory of train or sft.")
    report.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="File of the page. Default: report.html in the run directory; for several runs in this folder.",
    )
    report.add_argument(
        "--steps-shown",
        type=int,
        metavar="N",
        help="Number of steps whose responses are in the page. 0: none. Default: 20, or fewer with many runs.",
    )
    report.add_argument(
        "--evaluation",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="Output folders of `evaluate`, to show accuracy.",
    )
    report.add_argument(
        "--follow", action="store_true", help="Serve the page on this machine only, and update it after each step."
    )
    report.add_argument("--port", type=int, default=0, metavar="N", help="Port for --follow. Default: a free port.")
    report.set_defaults(run=_report)
    status = commands.add_parser(
        "status",
        help="Show state, step, time left, last metrics and alarms of runs.",
        description="Show state, step, time left, last metrics and alarms of runs, from their files alone: "
        "while they run, after they have ended, or after a kill.",
    )
    status.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="Run directory of train or sft.")
    status.add_argument("--json", action="store_true", help="Print the state as JSON.")
    status.set_defaults(run=_status)


def _add_looks(commands: Commands) -> None:
    """Add the commands that look at something before a run: data, a configuration, the keys."""
    inspect = commands.add_parser(
        "inspect",
        help="Guess the layout of a data file, and write the mapping for tools/prepare_data.py.",
        description="Guess the layout of a file (.jsonl, .jsonl.gz, .json, .parquet, .csv), show three rows as they "
        "would be read and what would be dropped and why, and write the mapping. docs/data.md has layouts and reasons.",
    )
    inspect.add_argument("file", help="Data file, or a glob of files of one layout.")
    inspect.add_argument(
        "--preset",
        default="",
        metavar="NAME",
        help="Known layout to read the file by (docs/data.md). Default: a guess.",
    )
    inspect.add_argument(
        "--output", type=Path, metavar="TOML", help="File for the mapping. Default: FILE.curation.toml in this folder."
    )
    inspect.set_defaults(run=_inspect)
    check = commands.add_parser(
        "check",
        help="Check a configuration before a start, with remedies. Exit code 2 where something is wrong.",
        description="Check a configuration file of any kind: files, rows and their lengths, layout, memory, ports, "
        "disk, limits, versions, the reward on a row, servers. What is on other machines is not checked.",
    )
    check.add_argument("config", type=Path, help="Configuration file (TOML).")
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=_SET)
    check.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="Number of training ranks on this machine. Default: those of [cluster], else 1.",
    )
    check.add_argument("--resume", action="store_true", help="Check a start with --resume.")
    check.add_argument("--json", action="store_true", help="Print the results as JSON.")
    check.set_defaults(run=_check)
    keys = commands.add_parser(
        "keys",
        help="Print the keys of configuration files, with type, default and description.",
        description="Print the configuration keys whose name has PATTERN in it, or whose name in TRL, slime, verl, "
        "prime-rl or another trainer is PATTERN. If there is none, print those whose description has it.",
    )
    keys.add_argument(
        "pattern",
        nargs="?",
        default="",
        metavar="PATTERN",
        help="Part of a name, or a regular expression. Default: all keys.",
    )
    keys.set_defaults(run=_keys)


def _check(arguments: argparse.Namespace) -> int:
    from megatron_rl.preflight.show import run_check

    return run_check(arguments)


def _keys(arguments: argparse.Namespace) -> int:
    from megatron_rl.config.show import run_keys

    return run_keys(arguments.pattern)


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_rl.data.curation.preview import run_inspect

    sys.stdout.write(run_inspect(arguments.file, arguments.preset, arguments.output) + "\n")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from megatron_rl.report.build import run_report

    if arguments.follow and arguments.output:
        raise ValueError("--follow serves the page and --output writes it; leave one out")
    return run_report(
        arguments.runs, arguments.output, arguments.steps_shown, arguments.evaluation, arguments.follow, arguments.port
    )


def _status(arguments: argparse.Namespace) -> int:
    from megatron_rl.report.status import run_status

    return run_status(arguments.runs, arguments.json)


def _convert(arguments: argparse.Namespace) -> int:
    from megatron_rl.checkpoint.show import run_convert

    return run_convert(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from megatron_rl.checkpoint.show import run_compare

    code = run_compare(arguments)
    if arguments.text is not None:
        from megatron_rl.train.score import text_logprobs

        (ids, first), (other_ids, second) = (
            text_logprobs(p, arguments.text) for p in (arguments.first, arguments.second)
        )
        if ids != other_ids:
            raise ValueError(f"the tokenizers differ: {arguments.text!r} is {len(ids)} tokens and {len(other_ids)}")
        largest = float((first - second).abs().max())
        sys.stdout.write(f"log-probs of {len(first)} tokens differ by up to {largest:.3g}\n")
    return code


def _train(arguments: argparse.Namespace) -> int:
    from megatron_rl.config.schema import RlConfig

    return _run_training(arguments, RlConfig)


def _sft(arguments: argparse.Namespace) -> int:
    from megatron_rl.config.schema import SftConfig

    return _run_training(arguments, SftConfig)


def _run_training(arguments: argparse.Namespace, kind: Any) -> int:
    from megatron_rl.config.kinds import load_for
    from megatron_rl.config.schema import RlConfig
    from megatron_rl.preflight.checks import check_start
    from megatron_rl.preflight.registry import Start

    if arguments.nproc is not None and arguments.nproc < 1:
        raise ValueError(f"--nproc must be at least 1, got {arguments.nproc}")
    if arguments.nproc is not None and has_rank():
        raise ValueError(f"--nproc starts ranks, and RANK or WORLD_SIZE says that this is one already; {remedy()}")
    place = own_place()
    if lifeline.has_launcher():
        speak_as(place.rank)
    config = load_for(arguments.command, kind, arguments.config, arguments.set)
    keys = None
    if getattr(arguments, "servers", None):
        from megatron_rl.rollout.serve import check_registered_torch, registered_keys

        keys = registered_keys(arguments.servers, config.rollout.ready_deadline_seconds)
        config = load_for(arguments.command, kind, arguments.config, [*arguments.set, f"rollout.urls={list(keys)!r}"])
        check_registered_torch(arguments.servers, config)
    rollouts = getattr(arguments, "rollouts", None)
    if place.world_size == 1:
        num_ranks = arguments.nproc or 1
        check_start(Start(config=config, world_size=num_ranks, resume=arguments.resume, rollouts=rollouts))
        if num_ranks > 1:
            return run_ranks(_same_command(arguments), num_ranks)
    if isinstance(config, RlConfig):
        from megatron_rl.train.driver import run_rl

        return run_rl(config, arguments.resume, rollouts, keys)
    from megatron_rl.train.sft.run import run_sft

    return run_sft(config, arguments.resume)


def _same_command(arguments: argparse.Namespace) -> list[str]:
    overrides = [part for override in arguments.set for part in ("--set", override)]
    rollouts = ["--rollouts", str(arguments.rollouts)] if getattr(arguments, "rollouts", None) else []
    resume = ["--resume"] if arguments.resume else []
    servers = ["--servers", str(arguments.servers)] if getattr(arguments, "servers", None) else []
    return [arguments.command, str(arguments.config), *overrides, *resume, *rollouts, *servers]


def _serve(arguments: argparse.Namespace) -> int:
    from megatron_rl.config.kinds import load_for
    from megatron_rl.config.schema import RlConfig
    from megatron_rl.rollout.serve import run_serve

    return run_serve(load_for("train", RlConfig, arguments.config, arguments.set), arguments.register, arguments.of)


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_rl.plan.show import run_plan

    return run_plan(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from megatron_rl.config.evaluation import EvaluateConfig
    from megatron_rl.config.kinds import load_for
    from megatron_rl.evaluation.evaluate import run_evaluation
    from megatron_rl.preflight.checks import check_start
    from megatron_rl.preflight.registry import Start

    model = [f"model.path={json.dumps(str(arguments.model))}"] if arguments.model else []
    config = load_for("evaluate", EvaluateConfig, arguments.config, [*arguments.set, *model])
    check_start(Start(config=config, model=config.model.path))
    return run_evaluation(config, arguments.output, arguments.benchmark, arguments.resume)


def _select(arguments: argparse.Namespace) -> int:
    from megatron_rl.config.kinds import load_for
    from megatron_rl.config.selection import SelectConfig
    from megatron_rl.preflight.checks import check_start
    from megatron_rl.preflight.registry import Start
    from megatron_rl.selection.select import run_selection

    config = load_for("select", SelectConfig, arguments.config, arguments.set)
    check_start(Start(config=config))
    return run_selection(config, arguments.resume)


def _rollout(arguments: argparse.Namespace) -> int:
    from megatron_rl.config.kinds import kind_of, load_for
    from megatron_rl.config.load import read_values
    from megatron_rl.config.schema import RlConfig, SamplingConfig
    from megatron_rl.gateway.sampler import agent_sampling
    from megatron_rl.preflight.checks import check_start
    from megatron_rl.preflight.registry import Start
    from megatron_rl.rollout.sample import run_rollout
    from megatron_rl.rollout.standalone import sampling

    kind = RlConfig if kind_of(read_values(arguments.config, arguments.set)) is RlConfig else SamplingConfig
    config = load_for("rollout", kind, arguments.config, arguments.set)
    if arguments.prompts is not None and arguments.prompts < 1:
        raise ValueError(f"--prompts must be at least 1, got {arguments.prompts}")
    if config.teacher is not None and arguments.model:
        raise ValueError("--model names a checkpoint and teacher an endpoint, and only one can answer; leave one out")
    model = None if config.teacher is not None or config.model is None else arguments.model or config.model.path
    check_start(Start(config=config, model=model))
    return run_rollout(
        config,
        model,
        arguments.prompts or config.rollout.prompts_per_step,
        arguments.output or config.run_dir / "rollouts.jsonl",
        arguments.resume,
        agent_sampling if config.rollout.has_agent else sampling,
    )


if __name__ == "__main__":
    sys.exit(main())
