"""Write prompts of three tasks of the package reasoning-gym, with their own graded scores in rewards.py.

python examples/reasoning_gym/prepare.py OUT [--num 2000] [--seed 1]
"""

import argparse
import json
from pathlib import Path

import reasoning_gym

TASKS = ("chain_sum", "letter_counting", "number_sorting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num", type=int, default=2000, help="prompts of each task")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "train.jsonl").open("w", encoding="utf-8") as file:
        for task in TASKS:
            for index, entry in enumerate(reasoning_gym.create_dataset(task, size=arguments.num, seed=arguments.seed)):
                row = {
                    "id": f"{task}-{arguments.seed}-{index}",
                    "domain": task,
                    "prompt": entry["question"],
                    "answer": entry["answer"],
                    "meta": {"entry": entry},  # what the task's own score looks at
                }
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
