"""Tests a whole run with adapters, as a user starts it."""

import json
import math
import os
import sys
from pathlib import Path

import forked
import pytest
import torch
from tiny_model import tensors_of

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, model: Path, name: str, steps: int) -> Path:
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "domain": "math"} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.toml"
    path.write_text(f"""
run_dir = "{folder}/{name}"
threads = 1
model.path = "{model}"
data.train = "{folder}/train.jsonl"
rollout = {{prompts_per_step = 4, samples_per_prompt = 4, max_prompt_tokens = 48, max_response_tokens = 24}}
algorithm = {{entropy_coefficient = 0.01, kl_coefficient = 0.1}}
budget.tokens = 300
optimizer.learning_rate = 1e-2
train = {{steps = {steps}, save_every = 2, micro_batch_tokens = 256}}
sync.probe_every = 1
lora = {{rank = 4}}
""")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    flags = ["--family", "qwen3", "--layers", "2", "--hidden-size", "64", "--init-std", "0.1"]
    forked.run([sys.executable, ROOT / "tools/make_tiny_model.py", folder, *flags]).check_returncode()
    return folder


def test_a_run_with_adapters_serves_merged_weights_and_goes_on_bit_by_bit(model: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, model, "run", steps=4)
    command = [sys.executable, "-m", "megatron_rl.cli", "train", config]
    done = forked.run(command, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(row["logprob_difference_p999"] for row in metrics) < 1e-4  # servers have each step's merged weights
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)  # B is zero: the policy is the base
    assert metrics[-1]["kl"] > 0
    whole = tensors_of(tmp_path / "run/hf")
    changed = {name for name, tensor in tensors_of(model).items() if not torch.equal(tensor, whole[name])}
    assert changed == {name for name in whole if "proj" in name}
    # A kill after the second step leaves this.
    (tmp_path / "run/checkpoints/latest").write_text("step_2")
    done = forked.run([*command, "--resume"], timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    again = tensors_of(tmp_path / "run/hf")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_supervised_training_of_adapters_learns_goes_on_bit_by_bit_and_leaves_a_merged_model(
    model: Path, tmp_path: Path
) -> None:
    chats = [
        [{"role": "user", "content": f"{i}+1="}, {"role": "assistant", "content": f"it is {i + 1}"}] for i in range(8)
    ]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    config, run = tmp_path / "sft.toml", tmp_path / "sft"
    config.write_text(
        f'run_dir = "{run}"\nthreads = 1\nmodel.path = "{model}"\nlora = {{rank = 4}}\noptimizer.learning_rate = 1e-2\n'
        f'data = {{train = "{tmp_path}/sft.jsonl", batch_tokens = 300}}\n'
        "train = {steps = 12, save_every = 6, micro_batch_tokens = 400}\n"
    )
    command = [sys.executable, "-m", "megatron_rl.cli", "sft", config]
    done = forked.run(command, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5
    whole = tensors_of(run / "hf")
    changed = {name for name, tensor in tensors_of(model).items() if not torch.equal(tensor, whole[name])}
    assert changed == {name for name in whole if "proj" in name}
    # What a kill after the sixth step leaves.
    (run / "checkpoints/latest").write_text("step_6")
    done = forked.run([*command, "--resume"], timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(torch.equal(again, whole[name]) for name, again in tensors_of(run / "hf").items())


def test_the_benchmark_of_adapters_at_a_tiny_size(model: Path) -> None:
    command = [sys.executable, ROOT / "tools/bench_lora.py", model, "--ranks", "4", "--rates", "1e-2", "--rounds", "1"]
    command += ["--steps", "1", "3", "--tokens", "64", "--length", "32", "--dtype", "bfloat16"]
    done = forked.run(command, timeout=800, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    whole, adapted = found["training"]
    assert (whole["rank"], adapted["rank"]) == (None, 4)
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    assert whole["trained_parameters"] == sum(math.prod(shape) for shape in sizes.values())
    # In each layer A is [4, inputs] and B [outputs, 4]; queries, keys and values share an A, and so do gate and up.
    layer = "model.layers.0."
    shape = {name.removeprefix(layer).removesuffix(".weight"): one for name, one in sizes.items() if layer in name}
    outputs = sum(rows for name, (rows, _) in ((n, s) for n, s in shape.items() if "proj" in n))
    inputs = sum(shape[f"{name}_proj"][1] for name in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down"))
    assert adapted["trained_parameters"] == 2 * 4 * (inputs + outputs)
    first, last = found["rounding"]
    assert (first["step"], last["step"]) == (1, 3)
    assert last["moved_mean"] > first["moved_mean"] > 0
    assert 0 < last["lora_update_kept"] < 1.5
