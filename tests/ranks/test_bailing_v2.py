"""Tests BailingMoeV2 against the plain fp64 model of reference.py: trainer, embedded server, files, and its router."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from alone import ALONE, world
from hypothesis import given
from hypothesis import strategies as st
from parallel import ALGORITHMS, make_spec, run_ranks, worst
from reference import _choose, forward, load_reference, policy_loss, routed_by, router_losses
from safetensors.torch import load_file, save_file
from test_convert import MODEL, assert_same, there_and_back
from test_embedded_model import DirectEngine
from tiny_model import TINY_V2, write_tiny_model

from megatron_rl.c3po.packing import cost_model, pack_micro_batches
from megatron_rl.checkpoint.convert import Job, convert
from megatron_rl.checkpoint.names import name_table
from megatron_rl.config.model import ModelSection, MoeSection
from megatron_rl.config.schema import SftConfig
from megatron_rl.expert_choice import top_experts
from megatron_rl.families import load_architecture
from megatron_rl.memory import stage_parameters
from megatron_rl.model.backends import problems
from megatron_rl.model.build import build_model
from megatron_rl.rollout.embedded.model import EmbeddedModel
from megatron_rl.rollout.routing import routed_shape
from megatron_rl.rollout.server import SglangServer
from megatron_rl.tensor_bytes import checksum

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
    ids = random.Random(1).choices(range(97), k=70)
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


def test_replayed_experts_have_the_gradient_of_the_reference(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["as published"]
    spec = make_spec(model, traced=[])
    spec["sequences"] = spec["sequences"][:4]
    rng = random.Random(1)
    for row in spec["sequences"]:
        row["routed_experts"] = [[[0, 0], *(rng.sample(range(8), 2) for _ in range(2))] for _ in row["token_ids"][:-1]]
    config, weights = load_reference(model)
    policy_loss(config, weights, spec, ALGORITHMS[0]).backward()
    expected = {f"grad/c3po/{name}": w.grad for name, w in weights.items() if w.grad is not None}
    found = run_ranks(2, spec | {"parallel": {"expert": 2, "tensor": 2}}, tmp_path / "run")
    assert worst(found, expected, "grad/") < (1e-4, "")


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a model as it is published, in bf16 but for the biases. Return its path and its tensors."""
    model = write_tiny_model(tmp_path_factory.mktemp("bf16") / "tiny", **SHAPE | {"torch_dtype": "bfloat16"})
    tensors = {n: t if n.endswith("expert_bias") else t.bfloat16() for n, t in load_file(model / MODEL).items()}
    biases = [t for name, t in tensors.items() if name.endswith("expert_bias")]
    assert len(biases) == 2 and not any(torch.equal(t, t.bfloat16().float()) for t in biases)
    save_file(tensors, model / MODEL, metadata={"format": "pt"})
    return model, tensors


def test_conversions_keep_the_bias_in_float32(in_bf16: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    model, tensors = in_bf16
    assert_same(there_and_back(model, tmp_path, max_shard_bytes=40_000), tensors)
    convert(Job(source=tmp_path / "back", destination=tmp_path / "wide", to_megatron=True, dtype=torch.float32))
    convert(Job(source=tmp_path / "wide", destination=tmp_path / "narrow", to_megatron=False, dtype=torch.bfloat16))
    assert_same(tmp_path / "narrow", tensors)


def test_megatron_itself_opens_a_converted_model(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["as published"]
    convert(Job(source=model, destination=tmp_path / "converted", to_megatron=True))
    spec = make_spec(model, load_by_megatron=str(tmp_path / "converted"), parallel={"expert": 2}, traced=[])
    found = run_ranks(2, spec, tmp_path / "run")
    for i, row in enumerate(spec["sequences"]):
        expected = logprobs_of(model, row["token_ids"])[row["num_prompt_tokens"] - 1 :]
        assert (found[f"logprobs/{i}"] - expected).abs().max() < 2e-5


def test_training_in_bf16_leaves_the_bias_as_it_is_in_exports_and_checkpoints(
    in_bf16: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model, tensors = in_bf16
    options = {"dtype": "bfloat16", "whole_gradients": False}
    spec = make_spec(
        model, **options, parallel={"tensor": 2, "expert": 2}, save_to=str(tmp_path / "saved"), export=True
    )
    trained = run_ranks(2, spec, tmp_path / "trained")
    assert_same(tmp_path / "trained/hf", tensors)
    resumed = run_ranks(
        1, make_spec(model, **options, resume_from=str(tmp_path / "saved/step_1")), tmp_path / "resumed"
    )
    for found in (trained, resumed):
        assert {name for name in found if name.startswith("weight/")} == {f"weight/{name}" for name in tensors}
        changed = [name for name, tensor in tensors.items() if not torch.equal(found[f"weight/{name}"], tensor)]
        assert len(changed) > 20 and not any(name.endswith("expert_bias") for name in changed)


def test_a_push_carries_bf16_and_the_float32_bias(
    in_bf16: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model, tensors = in_bf16
    expected = {name: checksum(tensor) for name, tensor in tensors.items()}
    spec = {"model": str(model), "other": str(model), "damaged": str(model), "dtype": "bfloat16"}
    spec |= {"parallel": {"expert": 2}, "nodes": [0, 1]}
    run_ranks(2, spec | {"scenario": "gather"}, tmp_path / "gather", worker="push_worker.py")
    report = json.loads((tmp_path / "gather/report.json").read_text())
    assert report["checksums"] == [expected] * 2
    other = str(write_tiny_model(tmp_path / "other", 1, **SHAPE))
    spec |= {"scenario": "layouts", "other": other, "damaged": other}
    run_ranks(2, spec, tmp_path / "push", worker="push_worker.py")
    report = json.loads((tmp_path / "push/report.json").read_text())
    wide = ("lm_head.weight", "mlp.gate.weight")  # in the server's memory
    expected |= {name: checksum(tensor.float()) for name, tensor in tensors.items() if name.endswith(wide)}
    assert [push["checksums"] for push in report["pushes"]] == [[expected] * 2] * 2
    assert [push["sent"] for push in report["pushes"]] == [len(name_table(load_architecture(model))), 2]


def test_256_experts_fit_into_the_bytes_of_a_record(tmp_path: Path) -> None:
    sizes = {"num_experts": 256, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "num_hidden_layers": 2}
    model = write_tiny_model(tmp_path / "tiny", **SHAPE | sizes | {"moe_intermediate_size": 8})
    engine = DirectEngine(model, slots=2, context_length=64)
    ids = random.Random(3).choices(range(97), k=50)
    sequence = engine.add(ids, max_new_tokens=1, return_routed_experts=True)
    engine.run()
    found, expected = np.sort(sequence.routed_experts[: len(ids)], -1), routed_by(model, ids)
    assert (found == expected).all() and expected.max() > 240
    assert routed_shape(load_architecture(model)).num_experts == 256


def test_what_is_counted_is_what_the_files_hold(models: dict[str, Path]) -> None:
    for model in models.values():
        architecture = load_architecture(model)
        total = sum(tensor.numel() for tensor in load_file(model / MODEL).values())
        assert total == architecture.num_parameters() == sum(map(sum, stage_parameters(architecture, ALONE)))


def test_what_would_change_numbers_unseen_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["as published"]
    with pytest.raises(ValueError, match=r"SGLang leaves config.json's routed_scaling_factor 2.5 out on a CPU, so its"):
        SglangServer(model, tmp_path / "log", python=Path(sys.executable), context_length=64)
    section = ModelSection(path=model, dtype="bfloat16", router_dtype="bfloat16")
    (problem,) = problems(section, load_architecture(model), ALONE)
    assert problem.endswith("whose routers compute in float32; set model.router_dtype = 'float32'")


# The choice ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_the_choice_among_groups_is_the_references_where_nothing_ties_and_as_good_where_something_does(
    data: st.DataObject,
) -> None:
    num_groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 4))
    top_groups = data.draw(st.integers(1, num_groups))
    topk = data.draw(st.integers(1, top_groups * size))
    levels = st.integers(0, data.draw(st.sampled_from([3, 10**6])))
    row = data.draw(st.lists(levels, min_size=num_groups * size, max_size=num_groups * size))
    scores = torch.tensor([row], dtype=torch.float32) / 2**20
    values, chosen = top_experts(scores, topk, num_groups, top_groups)
    assert torch.equal(values, scores.gather(1, chosen))
    config = {"n_group": num_groups, "topk_group": top_groups, "num_experts_per_tok": topk}
    expected = _choose(config, scores[0], None)
    sums = [sum(sorted(row[i : i + size])[-2:]) for i in range(0, len(row), size)]
    if len(set(row)) == len(row) and len(set(sums)) == num_groups:
        assert chosen[0].tolist() == expected
    else:
        used = {int(expert) // size for expert in chosen[0]}
        assert len(set(chosen[0].tolist())) == topk and len(used) <= top_groups
        worst_allowed = sorted(sums, reverse=True)[top_groups - 1]
        assert all(sums[group] >= worst_allowed for group in used)


@pytest.fixture(scope="module")
def routers(models: dict[str, Path]) -> Iterator[Callable[[torch.Tensor, torch.Tensor], list[dict[int, float]]]]:
    """Yield a function that routes one token by the trainer and by the server.

    It takes the token's logits [8] and a bias [8] and returns, for each of the two, the weights of the chosen experts.
    """
    config = SftConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"path": models["as published"]},
            "train": {"steps": 1, "micro_batch_tokens": 64},
            "data": {"train": "unused", "batch_tokens": 1},
        }
    )
    architecture = load_architecture(models["as published"])
    served = EmbeddedModel(architecture, dtype=torch.float32, context_length=64)

    def weights(logits: torch.Tensor, bias: torch.Tensor) -> list[dict[int, float]]:
        trained.expert_bias.copy_(bias)
        trained.replay(None)
        probs, chosen = trained.routing(logits[None, None])
        top, experts = served._routing(torch.nn.functional.pad(torch.eye(8), (0, 24)), bias, logits[None])
        of_trainer = {int(expert): float(probs[0, expert]) for expert in chosen[0].nonzero()[:, 0]}
        return [of_trainer, dict(zip(experts[0].tolist(), top[0].tolist(), strict=True))]

    with world():
        model = build_model(architecture, config.model, MoeSection(), ALONE)
        trained = model.routers[0]
        yield weights


# Scores of the groups {0, 1}, ..., {6, 7}, of which a token sees two, and two experts in them.
SCORES = [0.50, 0.40, 0.60, 0.10, 0.30, 0.55, 0.20, 0.15]
CHOICES: dict[str, tuple[dict[int, float], list[float], set[int]]] = {
    # The two best of each group add up to 0.90, 0.70, 0.85, 0.35. Expert 2 is the best, but its group is not chosen.
    "groups shut out the best expert": ({}, SCORES, {0, 5}),
    "a bias opens a group": ({3: 0.25}, SCORES, {0, 2}),
    "a bias turns the choice in a group": ({1: 0.16}, SCORES, {1, 5}),
    "a bias that is just too small": ({1: 0.10 - 1e-6}, SCORES, {0, 5}),
    "a bias that is just large enough": ({1: 0.10 + 1e-6}, SCORES, {1, 5}),
    "a bias that shuts an expert out": ({0: -0.2, 1: 0.2}, SCORES, {1, 5}),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_bias_moves_the_choice_and_never_the_weights(
    case: str, routers: Callable[[torch.Tensor, torch.Tensor], list[dict[int, float]]]
) -> None:
    biases, scores, expected = CHOICES[case]
    bias = torch.zeros(8)
    for expert, value in biases.items():
        bias[expert] = value
    total = sum(scores[expert] for expert in expected)
    weights = {expert: 2.5 * scores[expert] / total for expert in expected}
    for found in routers(torch.tensor(scores).logit(), bias):
        assert found == pytest.approx(weights, rel=1e-5)


def test_experts_that_tie_are_chosen_alike_by_trainer_and_server(
    routers: Callable[[torch.Tensor, torch.Tensor], list[dict[int, float]]],
) -> None:
    for logits in (torch.zeros(8), torch.tensor([0.0, 1.0] * 4), torch.full((8,), -200.0)):
        of_trainer, of_server = routers(logits, torch.zeros(8))
        assert of_trainer.keys() == of_server.keys() and len(of_trainer) == 2
        assert of_trainer == pytest.approx(of_server)
