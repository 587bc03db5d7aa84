"""Every way to divide the work gives the same gradient, the same step, and the same checkpoint: real gloo ranks."""

import random
from pathlib import Path

import pytest
import torch
from parallel import run_ranks
from reference import c3po_loss, load_reference, logprobs_and_entropy
from safetensors.torch import load_file
from tiny_model import write_tiny_model

# 97 rows of vocabulary: padded under tensor parallelism. Four layers, the first dense, for two pipeline stages.
SHAPE = {"vocab_size": 97, "num_hidden_layers": 4, "norm_head": True}
LAYOUTS = {
    "DP2": {},
    "TP2": {"tensor": 2},
    "TP2-ETP2": {"tensor": 2, "expert_tensor": 2},
    "EP2": {"expert": 2},
    "PP2": {"pipeline": 2},
}


def make_spec(model: Path, **changes: object) -> dict:
    rng = random.Random(0)
    rows = []
    for _ in range(9):
        length = rng.randint(9, 40)
        rows.append(
            {
                "token_ids": [rng.randrange(97) for _ in range(length)],
                "num_prompt_tokens": rng.randint(1, 8),
                "advantage": rng.uniform(-2, 2),
            }
        )
    return {
        "model": str(model),
        "sequences": rows,
        "token_cap": 80,
        "denominator": 150.0,
        "entropy_coefficient": 0.01,
        **changes,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **SHAPE)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run_ranks(1, make_spec(model), tmp_path_factory.mktemp("alone") / "run")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], prefix: str) -> tuple[float, str]:
    names = [name for name in expected if name.startswith(prefix)]
    assert names
    assert {name for name in found if name.startswith(prefix)} == set(names)
    return max((relative(found[name], expected[name]), name) for name in names)


def test_one_process_matches_the_formula_in_plain_torch(model: Path, alone: dict[str, torch.Tensor]) -> None:
    spec = make_spec(model)
    config, weights = load_reference(model)
    for i, row in enumerate(spec["sequences"]):
        expected = logprobs_and_entropy(config, weights, row)[0].detach()
        assert float((alone[f"logprobs/{i}"] - expected).abs().max()) < 2e-5
    c3po_loss(config, weights, spec).backward()
    gradients = {f"grad/{name}": w.grad for name, w in weights.items()}
    assert worst(alone, gradients, "grad/") < (1e-4, "")
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert float(alone["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_give_the_gradient_and_the_step_of_one(
    name: str, model: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    spec = make_spec(model, parallel=LAYOUTS[name])
    found = run_ranks(2, spec, tmp_path / "run")
    for prefix in ("logprobs/", "grad/", "weight/"):
        assert worst(found, alone, prefix) < (1e-4, ""), prefix
    assert float(found["grad_norm"]) == pytest.approx(float(alone["grad_norm"]), rel=1e-4)


def test_gradient_does_not_depend_on_the_micro_batch_cap(
    model: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    everything = run_ranks(1, make_spec(model, token_cap=10_000), tmp_path / "run")
    assert worst(everything, alone, "grad/") < (1e-5, "")


@pytest.mark.parametrize("parallel", [{}, {"expert": 2}], ids=["DP2", "EP2"])
def test_distributed_optimizer_takes_the_same_step(
    parallel: dict, model: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    found = run_ranks(2, make_spec(model, whole_gradients=False, parallel=parallel), tmp_path / "run")
    assert worst(found, alone, "weight/") < (1e-4, "")


def test_bfloat16_trains_close_to_float32(model: Path, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    spec = make_spec(model, dtype="bfloat16", whole_gradients=False, parallel={"tensor": 2})
    found = run_ranks(2, spec, tmp_path / "run")
    for i in range(9):
        assert float((found[f"logprobs/{i}"] - alone[f"logprobs/{i}"]).abs().mean()) < 0.05
    assert worst(found, alone, "weight/") < (0.02, "")


def test_a_checkpoint_continues_in_another_layout_as_if_nothing_had_happened(model: Path, tmp_path: Path) -> None:
    sharded = {"whole_gradients": False}
    whole = run_ranks(1, make_spec(model, **sharded, steps=2), tmp_path / "whole")
    save = str(tmp_path / "checkpoints")
    run_ranks(2, make_spec(model, **sharded, parallel={"expert": 2}, save_to=save), tmp_path / "first")
    spec = make_spec(model, **sharded, parallel={"pipeline": 2}, resume_from=f"{save}/step_1")
    second = run_ranks(2, spec, tmp_path / "second")
    assert worst(second, whole, "weight/") < (1e-4, "")


@pytest.mark.parametrize(
    ("name", "parallel"), [("TP2", {"tensor": 2}), ("PP2-EP1", {"pipeline": 2}), ("EP2", {"expert": 2})]
)
def test_hugging_face_to_megatron_and_back_is_bit_exact(name: str, parallel: dict, model: Path, tmp_path: Path) -> None:
    run_ranks(2, make_spec(model, parallel=parallel, export=True), tmp_path / "run")
    exported: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "run" / "hf").glob("*.safetensors"):
        exported |= load_file(file)
    original = load_file(model / "model.safetensors")
    assert exported.keys() == original.keys()
    for tensor_name, tensor in original.items():
        assert torch.equal(exported[tensor_name], tensor), tensor_name


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_rank_without_sequences_takes_part_and_spoils_nothing(tensor: int, model: Path, tmp_path: Path) -> None:
    # One sequence for two data-parallel ranks, with the auxiliary losses on: their mean over no tokens must not be NaN.
    spec = make_spec(
        model, parallel={"tensor": tensor}, moe={"load_balance_coefficient": 1e-2, "z_loss_coefficient": 1e-3}
    )
    spec["sequences"] = spec["sequences"][:1]
    found = run_ranks(2 * tensor, spec, tmp_path / "run")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    assert float(found["grad_norm"]) > 0
