"""Make SFT rows from rollouts: the responses of a teacher that are right and ended by themselves.

    python tools/make_sft_data.py ROLLOUTS... --model STUDENT --output sft.jsonl
        [--per-prompt N [--shortest]] [--validation FILE] [--by-domain]

ROLLOUTS are what `megatron-rl rollout` wrote, from a checkpoint or an endpoint, or a training run's
rollouts/step_N.jsonl. docs/distillation.md says why a response is dropped.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.cli import quieten_libraries
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.distillation import Distillation, Selection
from megatron_rl.data.distillation_report import table, total
from megatron_rl.data.prompts import Prompt, read_prompts
from megatron_rl.data.sft_files import SftFiles
from megatron_rl.data.student import student_of
from megatron_rl.errors import exit_code
from megatron_rl.locales import use_utf8

_TELL_EVERY_SECONDS = 5.0


class Progress:
    """Writes a line on stderr now and then."""

    def __init__(self) -> None:
        self._started = self._told = time.monotonic()

    def __call__(self, stage: str, done: int, num_bytes: int) -> None:
        now = time.monotonic()
        if now - self._told > _TELL_EVERY_SECONDS:
            self._told = now
            text = f"{now - self._started:6.0f} s  {done / 1e9:.2f} of {num_bytes / 1e9:.2f} GB {stage}"
            print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("rollouts", type=Path, nargs="+", metavar="ROLLOUTS")
    add("--model", type=Path, required=True, help="the student: a Hugging Face directory, for its tokenizer")
    add("--output", type=Path, required=True, help="JSONL of chats")
    add("--min-reward", type=float, default=1.0, help="the least reward that stays (default: %(default)s)")
    add("--per-prompt", type=int, metavar="N", help="at most so many responses of a prompt, chosen by the seed")
    add("--shortest", action="store_true", help="with --per-prompt: the shortest ones instead")
    add("--max-tokens", type=int, metavar="N", help="drop conversations that are longer for the student")
    add("--no-reasoning", action="store_true", help="leave out what a reasoning model thought before its answer")
    add("--validation", type=Path, metavar="FILE", help="put a share of the prompts here instead")
    add("--validation-share", type=float, default=0.02, help="of the prompts (default: %(default)s)")
    add("--by-domain", action="store_true", help="a file for each domain: OUTPUT_DOMAIN.jsonl")
    add("--prompts", type=Path, nargs="+", default=[], metavar="FILE", help="data files of a training run's rollouts")
    add("--seed", type=int, default=1, help="of --per-prompt and --validation")
    add("--force", action="store_true", help="overwrite what is there")
    return parser


def _selection(arguments: argparse.Namespace) -> Selection:
    share = arguments.validation_share if arguments.validation else 0.0
    if arguments.validation and not 0 < share < 1:
        raise ValueError(f"--validation-share must be between 0 and 1, got {share:g}")
    for name in ("per_prompt", "max_tokens"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.shortest and arguments.per_prompt is None:
        raise ValueError("--shortest says which responses --per-prompt N leaves; give N")
    if arguments.seed < 0:
        raise ValueError(f"--seed must not be negative, got {arguments.seed}")
    return Selection(
        min_reward=arguments.min_reward,
        per_prompt=arguments.per_prompt,
        shortest_first=arguments.shortest,
        seed=arguments.seed,
        validation_share=share,
        with_reasoning=not arguments.no_reasoning,
        max_tokens=arguments.max_tokens,
    )


def _prompts(paths: list[Path]) -> dict[str, Prompt]:
    found: dict[str, Prompt] = {}
    for prompt in (prompt for path in paths for prompt in read_prompts(path)):
        other = found.setdefault(prompt.id, prompt)
        if (other.domain, other.prompt) != (prompt.domain, prompt.prompt):
            raise ValueError(f"--prompts: id {prompt.id!r} is two different prompts; name the files of one run")
    return found


def _run(arguments: argparse.Namespace) -> int:
    selection = _selection(arguments)
    student = student_of(load_tokenizer(arguments.model))
    inputs = (*arguments.rollouts, *arguments.prompts)
    work = Distillation(arguments.rollouts, selection, student, _prompts(arguments.prompts), Progress())
    with SftFiles(arguments.output, arguments.validation, arguments.by_domain, arguments.force, inputs) as files:
        work.write(files)
        files.finish()
    domains = dict(sorted(work.domains.items()))
    summary: dict[str, Any] = {
        "rollouts": [str(path) for path in arguments.rollouts],
        "selection": asdict(selection),
        "files": {str(path): count for path, count in files.num_rows.items()},
        "all": total(domains.values()).as_json(),
        "domains": {name: count.as_json() for name, count in domains.items()},
    }
    path = arguments.output.with_name(f"{arguments.output.name}.summary.json")
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(table(domains))
    for name, count in summary["files"].items():
        print(f"{name}: {count:,} rows")
    print(path)
    return 0


def main(argv: list[str]) -> int:
    quieten_libraries()
    arguments = _parser().parse_args(argv)
    return exit_code("make_sft_data", lambda: _run(arguments))


if __name__ == "__main__":
    use_utf8()
    sys.exit(main(sys.argv[1:]))
