"""Curate prompts for reinforcement learning, or chats for fine-tuning: read JSONL, JSON, CSV, Parquet or Hugging Face
datasets, and write kept and dropped rows.

    python tools/prepare_data.py CONFIG.toml [--set key=value] [--force]

Writes kept.jsonl (data/prompts.py reads it), dropped.jsonl (each row with its file, line and reason) and report.json.
docs/data.md says what the configuration can hold and what each rule catches.
"""

import argparse
import sys
import time
from pathlib import Path

from megatron_rl.config.load import load_config
from megatron_rl.data.curation.config import CurationConfig
from megatron_rl.data.curation.pipeline import curate
from megatron_rl.errors import exit_code
from megatron_rl.locales import use_utf8

_TELL_EVERY_SECONDS = 5.0


class Progress:
    """Writes lines on stderr: often enough to see that it goes on, seldom enough for a log file."""

    def __init__(self) -> None:
        self._started = self._told = time.monotonic()

    def __call__(self, stage: str, count: int) -> None:
        now = time.monotonic()
        if stage != "rows" or now - self._told > _TELL_EVERY_SECONDS:
            self._told = now
            print(f"{now - self._started:6.0f} s  {count:>12,} {stage}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    parser.add_argument("--force", action="store_true", help="overwrite the result of an earlier run")
    arguments = parser.parse_args(argv)
    return exit_code("prepare_data", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    config = load_config(CurationConfig, arguments.config, arguments.set)
    report = curate(config, arguments.force, Progress())
    print(report.table())
    print(f"{config.output}: kept.jsonl, dropped.jsonl, report.json")
    return 0


if __name__ == "__main__":
    use_utf8()
    sys.exit(main(sys.argv[1:]))
