"""Write a generated, verifiable task as data files: sft.jsonl (chats), train.jsonl and test.jsonl (RL prompts).

    python tools/make_task_data.py OUT --kinds count sort --difficulties 1 2 --num-sft 20000 --num-train 20000

Questions of the three files are disjoint; the same flags give the same files.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.data.prompts import Chat, Prompt
from megatron_rl.data.tasks import TASK_KINDS, as_chat, as_prompt, make_dataset


def as_line(row: Prompt | Chat) -> str:
    return json.dumps(asdict(row, dict_factory=_said)) + "\n"


def _said(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return what a row, or a message of it, says. What it leaves open has no column."""
    return {name: value for name, value in fields if value not in ("", None)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["count", "sort"], choices=sorted(TASK_KINDS))
    parser.add_argument("--difficulties", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--num-sft", type=int, default=20000)
    parser.add_argument("--num-train", type=int, default=20000)
    parser.add_argument("--num-test", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    try:
        data = make_dataset(
            arguments.kinds,
            arguments.difficulties,
            arguments.num_sft + arguments.num_train,
            arguments.num_test,
            arguments.seed,
        )
    except ValueError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[Any]] = {
        "sft.jsonl": [as_chat(problem) for problem in data.train[: arguments.num_sft]],
        "train.jsonl": [as_prompt(problem) for problem in data.train[arguments.num_sft :]],
        "test.jsonl": [as_prompt(problem) for problem in data.test],
    }
    for name, rows in files.items():
        (arguments.out / name).write_text("".join(as_line(row) for row in rows), encoding="utf-8")
        print(f"{arguments.out / name}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
