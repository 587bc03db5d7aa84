"""Checks that real SGLang loads an exported model and gives the trainer's log-probs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel import run_ranks
from served import input_logprobs

from megatron_rl.checkpoint.convert import Job, convert
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.rollout.server import SglangServer, find_sglang

ROOT = Path(__file__).parents[2]
PYTHON = find_sglang(
    RolloutSection(
        prompts_per_step=1, samples_per_prompt=2, sglang_python=ROOT / ".venv-sglang/bin/python", max_response_tokens=64
    )
)


def sglang_logprobs(model: Path, sequences: list[list[int]], log: Path) -> list[list[float | None]]:
    """Return SGLang's log-probs of all tokens but the first of each sequence."""
    server = SglangServer(model, log, python=PYTHON, max_running_requests=8, context_length=128)
    return [found[1:] for found in input_logprobs(server, sequences, max_new_tokens=1, seconds=900)]


@pytest.mark.parametrize("norm_head", [False, True])
def test_an_exported_checkpoint_gives_the_trainers_log_probs(norm_head: bool, tmp_path: Path) -> None:
    flags = ["--norm-head"] if norm_head else []
    subprocess.run([sys.executable, ROOT / "tools/make_tiny_model.py", tmp_path / "hf", *flags], check=True)
    rng = np.random.default_rng(0)
    rows = [
        {
            "token_ids": rng.integers(3, 90, size=n).tolist(),
            "num_prompt_tokens": 1,
            "advantage": float(rng.normal()),
            "rollout_logprobs": [-1.0] * (n - 1),
            "num_stale_tokens": 0,
        }
        for n in (5, 17, 60)
    ]
    convert(Job(source=tmp_path / "hf", destination=tmp_path / "megatron", to_megatron=True))
    spec = {"model": str(tmp_path / "megatron"), "sequences": rows, "token_cap": 128, "budget": 80}
    spec |= {"parallel": {"tensor": 2}, "whole_gradients": False, "algorithms": [{"name": "c3po"}]}
    # One step of training, so that the export is of weights that no file held before.
    trained = run_ranks(2, spec | {"save_to": str(tmp_path / "checkpoints")}, tmp_path / "train")
    assert trained
    step = tmp_path / "checkpoints" / "step_1"
    found = run_ranks(1, spec | {"model": str(step), "parallel": {}}, tmp_path / "score")
    convert(Job(source=step, destination=tmp_path / "exported", to_megatron=False, verify=True))
    served = sglang_logprobs(tmp_path / "exported", [row["token_ids"] for row in rows], tmp_path / "sglang.log")
    for i, expected in enumerate(served):
        difference = (found[f"logprobs/{i}"] - torch.tensor(expected, dtype=torch.float64)).abs().max()
        assert float(difference) <= 2e-5
    if norm_head:
        convert(Job(source=step, destination=tmp_path / "folded", to_megatron=False, fold_norm_head=True))
        folded = sglang_logprobs(tmp_path / "folded", [row["token_ids"] for row in rows], tmp_path / "folded.log")
        for expected, other in zip(served, folded, strict=True):
            assert np.abs(np.array(expected) - np.array(other)).max() <= 2e-5
