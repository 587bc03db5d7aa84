"""Makes a tiny model and data for runs of the command line."""

import subprocess
import sys
from pathlib import Path

import forked

ROOT = Path(__file__).parents[1]


def make_inputs(folder: Path, num_sft: int, num_train: int, num_test: int, *model: str) -> Path:
    """Write `folder/model` and `folder/data`. model: further flags of tools/make_tiny_model.py."""
    sizes = ["--hidden-size", "32", "--layers", "2", "--experts", "4", "--moe-intermediate-size", "32"]
    data = ["--num-sft", str(num_sft), "--num-train", str(num_train), "--num-test", str(num_test)]
    forked.run([sys.executable, ROOT / "tools/make_tiny_model.py", folder / "model", *sizes, *model]).check_returncode()
    subprocess.run([sys.executable, ROOT / "tools/make_task_data.py", folder / "data", *data], check=True)
    return folder
