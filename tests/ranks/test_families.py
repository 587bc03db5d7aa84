"""Tests every family against transformers' own classes: log-probs, gradients, files, and what config.json must say."""

import json
import random
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch
from family_models import CASES, make, transformers_gradient, transformers_logprobs, transformers_model
from parallel import make_spec, relative, run_ranks
from reference import load_reference, policy_loss
from safetensors.torch import save_file
from test_convert import assert_same, there_and_back
from test_embedded_model import DirectEngine
from tiny_model import tensors_of

from megatron_rl.checkpoint.read import open_checkpoint
from megatron_rl.families import load_architecture, tensor_shapes
from megatron_rl.rollout.embedded.load import load_weights

ROOT = Path(__file__).parents[2]
LAYOUTS = {"alone": (1, {}), "TP2": (2, {"tensor": 2}), "PP2": (2, {"pipeline": 2}), "CP2": (2, {"context": 2})}
# Two ranks share each key-value head.
OF_HEADS = {"TP4": (4, {"tensor": 4})}
OF_EXPERTS = {"EP2": (2, {"expert": 2}), "TP2-ETP2": (2, {"tensor": 2, "expert_tensor": 2})}
# Each family whole, and divided; scaled rotary embeddings beyond the original length.
DIVIDED = [
    "llama",
    "llama, tied, one key-value head, llama3",
    "qwen2, tied, yarn",
    "qwen3",
    "qwen3-moe, not renormalised, some layers dense",
    "mistral",
    "mixtral-moe",
    "glm4-moe, groups, biases, no norm of queries",
    "olmo2",
    "olmoe-moe",
    "phi3",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {case: make(case, tmp_path_factory.mktemp("families") / "model") for case in CASES}


def spec_of(model: Path, **changes: object) -> dict:
    """Return a spec as in test_parallel. Its recorded log-probs are near the model's, so that ratios are near 1."""
    spec = make_spec(model, token_cap=400, traced=[], **changes)
    rng = random.Random(5)
    spec["sequences"].append(
        {
            "token_ids": [rng.randrange(97) for _ in range(120)],
            "num_prompt_tokens": 3,
            "advantage": 0.7,
            "rollout_logprobs": [-1000 / 256] * 117,
            "num_stale_tokens": 0,
        }
    )
    return spec


@pytest.mark.parametrize("case", CASES)
def test_the_embedded_server_has_the_logprobs_of_transformers(case: str, models: dict[str, Path]) -> None:
    engine = DirectEngine(models[case], slots=4, context_length=256)
    ids = random.Random(1).choices(range(97), k=130)
    sequence = engine.add(ids, max_new_tokens=1, input_logprob_start=0)
    engine.run()
    with torch.no_grad():
        expected = transformers_logprobs(transformers_model(models[case]), ids)
    found = torch.tensor(sequence.input_logprobs[1:])
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_has_the_logprobs_and_gradients_of_transformers(
    case: str, models: dict[str, Path], tmp_path: Path
) -> None:
    spec = spec_of(models[case])
    model = transformers_model(models[case])
    with torch.no_grad():
        logprobs = [transformers_logprobs(model, row["token_ids"]) for row in spec["sequences"]]
    gradient = transformers_gradient(model, spec)
    more = OF_EXPERTS if "moe" in case else OF_HEADS if case == "olmo2" else {}
    for layout, (num_ranks, parallel) in (LAYOUTS | more).items():
        if layout != "alone" and case not in DIVIDED:
            continue
        found = run_ranks(num_ranks, spec | {"parallel": parallel}, tmp_path / layout)
        for i, (row, expected) in enumerate(zip(spec["sequences"], logprobs, strict=True)):
            own = expected[row["num_prompt_tokens"] - 1 :]
            assert (found[f"logprobs/{i}"] - own).abs().max() < 2e-5, (layout, i)
        for name, expected in gradient.items():
            assert relative(found[f"grad/c3po/{name}"], expected) < 1e-5, (layout, name)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_the_gradient_is_that_of_a_plain_fp64_reference_over_layouts(
    case: str, models: dict[str, Path], tmp_path: Path
) -> None:
    spec = make_spec(models[case], dtype="float64", traced=[])
    config, weights = load_reference(models[case])
    policy_loss(config, weights, spec, spec["algorithms"][0]).backward()
    # TP4 is also under the norms of queries and keys.
    for layout in ("alone", "TP2", "CP2", *(["TP4"] if case == "qwen3" else [])):
        num_ranks, parallel = (LAYOUTS | OF_HEADS)[layout]
        found = run_ranks(num_ranks, spec | {"parallel": parallel}, tmp_path / layout)
        for name, tensor in weights.items():
            assert relative(found[f"grad/c3po/{name}"], tensor.grad) < 1e-8, (layout, name)


@pytest.mark.parametrize("case", CASES)
def test_files_go_to_megatron_and_back_bit_by_bit_and_transformers_opens_them(
    case: str, models: dict[str, Path], tmp_path: Path
) -> None:
    back = there_and_back(models[case], tmp_path, max_shard_bytes=40_000)
    assert len(list(back.glob("*.safetensors"))) > 1
    assert_same(back, tensors_of(models[case]))
    ids = random.Random(2).choices(range(97), k=40)
    with torch.no_grad():
        found, expected = (transformers_logprobs(transformers_model(folder), ids) for folder in (back, models[case]))
    assert torch.equal(found, expected)


def test_a_copy_of_the_tied_head_and_old_rotary_buffers_are_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = tensors_of(models["qwen2, tied, yarn"])
    embedding = tensors["model.embed_tokens.weight"]
    old = {"lm_head.weight": embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    shutil.copytree(models["qwen2, tied, yarn"], tmp_path / "old")
    save_file(tensors | old, tmp_path / "old/model.safetensors")
    architecture = load_architecture(tmp_path / "old")
    with open_checkpoint(tmp_path / "old") as found:
        assert set(found.dtypes) == set(tensor_shapes(architecture)) == set(tensors)
    assert load_weights(tmp_path / "old", architecture, torch.float32).head.shape == embedding.t().shape
    save_file(tensors | {"lm_head.weight": embedding + 1}, tmp_path / "old/model.safetensors")
    for read in (open_checkpoint, lambda path: load_weights(path, architecture, torch.float32)):
        with pytest.raises(ValueError, match="lm_head.weight is not model.embed_tokens.weight, but tie"):
            read(tmp_path / "old")


def test_layers_that_predict_further_tokens_are_left_out_and_none_in_a_copy(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tensors = tensors_of(models["glm4-moe"])
    further = {f"model.layers.3.{name}": torch.ones(48) for name in ("enorm.weight", "input_layernorm.weight")}
    shutil.copytree(models["glm4-moe"], tmp_path / "model")
    values = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": 1}))
    save_file(tensors | further, tmp_path / "model/model.safetensors")
    architecture = load_architecture(tmp_path / "model")
    assert set(tensor_shapes(architecture)) == set(tensors)
    load_weights(tmp_path / "model", architecture, torch.float32)
    back = there_and_back(tmp_path / "model", tmp_path)
    assert_same(back, tensors)
    assert json.loads((back / "config.json").read_text()) == values
    # No more layers than config.json says.
    save_file(tensors | {"model.layers.4.enorm.weight": torch.ones(48)}, tmp_path / "model/model.safetensors")
    for read in (open_checkpoint, lambda path: load_weights(path, architecture, torch.float32)):
        with pytest.raises(ValueError, match="model.layers.4.enorm.weight"):
            read(tmp_path / "model")


def test_a_dense_model_is_trained_and_served_by_one_command(tmp_path: Path) -> None:
    model = tmp_path / "model"
    flags = ["--family", "qwen3", "--layers", "2", "--hidden-size", "64", "--init-std", "0.1"]
    forked.run([sys.executable, ROOT / "tools/make_tiny_model.py", model, *flags]).check_returncode()
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "domain": "math"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.toml").write_text(f"""
run_dir = "{tmp_path}/run"
threads = 1
model.path = "{model}"
data.train = "{tmp_path}/train.jsonl"
rollout = {{prompts_per_step = 4, samples_per_prompt = 4, max_prompt_tokens = 48, max_response_tokens = 24}}
algorithm.entropy_coefficient = 0.01
budget.tokens = 300
optimizer.learning_rate = 1e-3
train = {{steps = 2, save_every = 2, micro_batch_tokens = 256}}
sync.probe_every = 1
parallel.tensor = 2
""")
    command = [sys.executable, "-m", "megatron_rl.cli", "train", tmp_path / "config.toml", "--nproc", "2"]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["num_loss_tokens"] for row in metrics] == [300, 300]
    assert min(row["grad_norm"] for row in metrics) > 0
    assert max(row["logprob_difference_p999"] for row in metrics) < 1e-4  # the second step's servers have new weights
    assert load_architecture(tmp_path / "run/hf") == load_architecture(model)
    assert transformers_model(tmp_path / "run/hf").config.num_hidden_layers == 2
