"""Tests short runs of the command line with the trainer on the device: rollout, budget, steps, pushes, export."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from inputs import make_inputs

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.gpus import visible_gpus
from megatron_rl.rollout.server import find_sglang

ROOT = Path(__file__).parents[2]
CONFIG = """
run_dir = "{folder}/run"
[model]
path = "{inputs}/model"
dtype = "{dtype}"
trust_remote_code = true
[data]
train = "{inputs}/data/train.jsonl"
[rollout]
engine = "{engine}"
servers = 1
prompts_per_step = 4
samples_per_prompt = 4
max_prompt_tokens = 48
max_response_tokens = 24
max_running_requests = 16
ready_deadline_seconds = 300
[sync]
transport = "{transport}"
[budget]
tokens = 300
[optimizer]
learning_rate = 1e-3
[algorithm]
kl_coefficient = 1e-3
[train]
steps = 3
save_every = 2
micro_batch_tokens = 128
phase_deadline_seconds = 300
"""
pytestmark = pytest.mark.timeout(1200)  # several command lines each, and torch compiles at the first step
# Between the log-probs of server and trainer for tokens that the trainer's weights sampled, the mean of a step. fp32:
# rounding; a step that left the servers behind would be off by its learning, about 1e-2. bf16: two roundings, and
# routers that choose otherwise where they are undecided.
MEAN_DIFFERENCE = {"float32": 1e-5, "bfloat16": 0.05}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), 1, 100, 1)


def call(*arguments: str | Path, code: int = 0) -> str:
    command = [sys.executable, "-m", "megatron_rl.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("engine", "dtype", "transport"),
    [
        ("embedded", "float32", "distributed"),
        ("embedded", "bfloat16", "disk"),
        ("sglang", "float32", "distributed"),
        ("sglang", "bfloat16", "disk"),
        ("sglang", "bfloat16", "ipc"),
    ],
)
def test_a_run_trains_its_budget_reaches_its_servers_and_exports(
    engine: str, dtype: str, transport: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # where .venv-sglang is looked for
    # Trainer and server on one GPU, as ipc wants it on a machine with several, and NCCL would refuse: weights of
    # "distributed" go over gloo.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(visible_gpus()[:1]))
    if engine == "sglang":
        try:
            find_sglang(RolloutSection(prompts_per_step=1, samples_per_prompt=2, max_response_tokens=64))
        except ValueError as error:
            pytest.skip(str(error))
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(folder=tmp_path, inputs=inputs, engine=engine, dtype=dtype, transport=transport))
    # Trainer and server in turns, each with all of the memory.
    options = ["rollout.release_memory=true", "train.offload_while_generating=true"] if transport == "ipc" else []
    turns = [part for option in options for part in ("--set", option)]
    said = call("train", config, *turns)
    assert transport != "distributed" or "weights go to the servers over gloo" in said
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["num_loss_tokens"] for row in rows] == [300, 300, 300]
    assert max(row["logprob_difference_mean"] for row in rows) < MEAN_DIFFERENCE[dtype]
    assert all(row["num_lost_servers"] == 0 for row in rows)
    assert not any(row["num_skipped_steps"] for row in rows)
    # The exported model is the saved one, bit for bit, and not the one that the run began with.
    call("compare", run / "checkpoints/step_3", run / "hf")
    call("compare", inputs / "model", run / "hf", code=1)
    # And the run goes on from there.
    call("train", config, *turns, "--resume", "--set", "train.steps=4")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
