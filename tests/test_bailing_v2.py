"""BailingMoeV2 against the plain fp64 model of reference.py: trainer, embedded server, files; and its router alone."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel import run_ranks
from reference import _choose, forward, load_reference, policy_loss, routed_by, router_losses
from safetensors.torch import load_file, save_file
from test_convert import MODEL, assert_same, there_and_back
from test_embedded_model import DirectEngine
from test_parallel import ALGORITHMS, assert_exported, make_spec, worst
from tiny_model import TINY_V2, tensors_of, write_tiny_model

from megatron_rl.c3po.packing import cost_model, pack_micro_batches
from megatron_rl.checkpoint.convert import Job, convert
from megatron_rl.expert_choice import top_experts
from megatron_rl.families import load_architecture

SHAPE = {**TINY_V2, "vocab_size": 97, "num_hidden_layers": 3}
CASES = {
    "as published": {},
    "three of three experts in one group": {"num_experts": 9, "n_group": 3, "topk_group": 1, "num_experts_per_tok": 3},
    "no groups, no bias, no scaling": {
        "n_group": 1,
        "topk_group": 1,
        "moe_router_enable_expert_bias": False,
        "routed_scaling_factor": 1.0,
    },
    "one expert, all of the head rotated, no norms": {
        "num_experts_per_tok": 1,
        "partial_rotary_factor": 1.0,
        "use_qk_norm": False,
        "num_shared_experts": 0,
        "first_k_dense_replace": 0,
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "TP2-EP2": (2, {"tensor": 2, "expert": 2}),
    "TP2-ETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "CP2-EP2": (2, {"context": 2, "expert": 2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("v2")
    return {case: write_tiny_model(folder / str(i), **SHAPE | own) for i, (case, own) in enumerate(CASES.items())}


def logprobs_of(model: Path, ids: list[int]) -> torch.Tensor:
    config, weights = load_reference(model)
    with torch.no_grad():
        logits = forward(config, weights, ids).log_softmax(-1)[:-1]
    return logits[range(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("case", CASES)
def test_the_embedded_server_has_the_logprobs_and_the_experts_of_the_reference(
    case: str, models: dict[str, Path]
) -> None:
    engine = DirectEngine(models[case], slots=4, context_length=128)
    ids = [random.Random(1).randrange(97) for _ in range(70)]
    sequence = engine.add(ids, max_new_tokens=1, input_logprob_start=0, return_routed_experts=True)
    engine.run()
    found = torch.tensor(sequence.input_logprobs[1:])
    assert (found - logprobs_of(models[case], ids)).abs().max() < 2e-5
    experts = torch.from_numpy(sequence.routed_experts).long().sort(-1).values
    assert torch.equal(experts[: len(ids)], torch.from_numpy(routed_by(models[case], ids)))


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_has_the_logprobs_and_gradients_of_the_reference(
    case: str, models: dict[str, Path], tmp_path: Path
) -> None:
    losses = {"load_balance_coefficient": 0.05, "z_loss_coefficient": 0.02}
    spec = make_spec(models[case], moe=losses, token_cap=60, traced=[])
    spec["sequences"] = spec["sequences"][:5]
    config, weights = load_reference(models[case])
    lengths = [len(row["token_ids"]) for row in spec["sequences"]]
    ((*micro_batches,),) = pack_micro_batches(lengths, 1, 60, cost_model(load_architecture(models[case])))
    balance, z = router_losses(config, weights, spec, [list(m) for m in micro_batches])
    (policy_loss(config, weights, spec, ALGORITHMS[0]) + 0.05 * balance + 0.02 * z).backward()
    expected = {
        f"grad/c3po/{name}": torch.zeros_like(w) if w.grad is None else w.grad  # of experts that nobody chose
        for name, w in weights.items()
        if not name.endswith("expert_bias")
    }
    expected |= {
        f"logprobs/{i}": logprobs_of(models[case], row["token_ids"])[row["num_prompt_tokens"] - 1 :]
        for i, row in enumerate(spec["sequences"])
    }
    for layout, (num_ranks, parallel) in {"alone": (1, {}), **LAYOUTS}.items():
        if layout != "alone" and case != "as published":
            continue
        cap = 60 // parallel.get("context", 1)
        found = run_ranks(num_ranks, spec | {"parallel": parallel, "token_cap": cap}, tmp_path / layout)
        for i in range(5):
            assert (found[f"logprobs/{i}"] - expected[f"logprobs/{i}"]).abs().max() < 2e-5, layout
        assert worst(found, expected, "grad/") < (1e-4, ""), layout
