"""Tests that every way to divide the work gives the same gradient, step and checkpoint, on real gloo ranks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parallel import (
    ALGORITHMS,
    EVERYTHING,
    EXACT,
    LAYOUTS,
    SHAPE,
    TRACED,
    exact_spec,
    make_spec,
    moe,
    relative,
    run_ranks,
    worst,
)
from reference import load_reference, logprobs_and_entropy, policy_loss, router_losses, rows_by_sample
from safetensors.torch import load_file
from tiny_model import tensors_of, write_tiny_model

from megatron_rl.c3po.packing import cost_model, pack_micro_batches
from megatron_rl.config.layout import Layout
from megatron_rl.families import load_architecture

# For a model of seven layers, over stages of 1, 2, 1, 1, 1, 1.
INTERLEAVED: dict[str, tuple[int, dict[str, int]]] = {
    "PP3-VPP2": (3, {"pipeline": 3, "virtual_pipeline": 2}),
    "TP2xPP3-VPP2": (6, {"tensor": 2, "pipeline": 3, "virtual_pipeline": 2}),
}
WHOLE_LAYERS = EVERYTHING | {"train": {"overlap": "on", "overlap_bucket_parameters": 10**7}}
NEW_KERNELS = {"attention": "fa4", "expert_weight_gradient": "quack"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **SHAPE)


@pytest.fixture(scope="module")
def after_two_steps(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run_ranks(1, make_spec(model, whole_gradients=False, steps=2), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run_ranks(1, make_spec(model), tmp_path_factory.mktemp("alone") / "run")


def assert_exported(model: Path, directory: Path) -> None:
    exported = tensors_of(directory)
    original = load_file(model / "model.safetensors")
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name


@pytest.mark.parametrize("layout", ["TP2-EP2", "PP2"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    layout: str, model: Path, tmp_path: Path
) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    options = {"parallel": parallel, "whole_gradients": False}
    once = run_ranks(num_ranks, make_spec(model, **options), tmp_path / "once")
    # The last rank's first gradient is poisoned; the second step is then the first that counts.
    spec = make_spec(model, **options, steps=2, poisoned_rank=num_ranks - 1)
    found = run_ranks(num_ranks, spec, tmp_path / "poisoned")
    for name in (name for name in once if name.startswith("weight/")):
        assert torch.equal(found[name], once[name]), name


def test_a_run_whose_steps_were_all_skipped_is_saved_and_goes_on(model: Path, tmp_path: Path) -> None:
    options = {"whole_gradients": False}
    run_ranks(1, make_spec(model, **options, poisoned_rank=0, save_to=str(tmp_path / "saved")), tmp_path / "skipped")
    resumed = make_spec(model, **options, resume_from=str(tmp_path / "saved/step_1"))
    found = run_ranks(1, resumed, tmp_path / "resumed")
    once = run_ranks(1, make_spec(model, **options), tmp_path / "once")
    assert all(torch.equal(found[name], once[name]) for name in once if name.startswith("weight/"))


def test_a_loss_that_is_not_finite_skips_the_step(model: Path, tmp_path: Path) -> None:
    spec = make_spec(model, whole_gradients=False)
    spec["sequences"][3]["advantage"] = float("nan")
    found = run_ranks(2, spec, tmp_path / "run")
    start = load_file(model / "model.safetensors")
    assert all(torch.equal(found[f"weight/{name}"], tensor) for name, tensor in start.items())
    assert json.loads((tmp_path / "run/result.json").read_text())["skipped"] is True


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_step_without_loss_tokens_leaves_the_weights_as_they_are(overlap: str, model: Path, tmp_path: Path) -> None:
    # Adam's moments would move them, and so would the z-loss of tokens that are context alone.
    options = {"whole_gradients": False, "moe": {"load_balance_coefficient": 0.0, "z_loss_coefficient": 0.02}}
    options |= {"parallel": {"expert": 2}, "train": {"overlap": overlap}}
    once = run_ranks(2, make_spec(model, **options), tmp_path / "once")
    found = run_ranks(2, make_spec(model, **options, steps_without_tokens=2), tmp_path / "found")
    for name in (name for name in once if name.startswith("weight/")):
        assert torch.equal(found[name], once[name]), name


def test_one_process_matches_the_formula_in_plain_torch(model: Path, alone: dict[str, torch.Tensor]) -> None:
    spec = make_spec(model)
    config, weights = load_reference(model)
    by_token = []
    for i, row in enumerate(spec["sequences"]):
        logprobs, entropy = (x.detach() for x in logprobs_and_entropy(config, weights, row))
        assert float((alone[f"logprobs/{i}"] - logprobs).abs().max()) < 2e-5
        if i in TRACED:
            assert float((alone[f"traced/{i}"] - logprobs).abs().max()) < 2e-5
        by_token.append(torch.stack([-logprobs, entropy]))
    # Fine-tuning validates by the cross-entropy and the entropy per loss token over all sequences.
    measured = {"measured": torch.cat(by_token, dim=1).mean(dim=1)}
    assert worst(alone, measured, "measured") < (1e-6, "")
    policy_loss(config, weights, spec, ALGORITHMS[0]).backward()
    gradients = {f"grad/c3po/{name}": w.grad for name, w in weights.items()}
    assert worst(alone, gradients, "grad/") < (1e-4, "")
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert float(alone["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("name", ["DP2", "TP2", "CP2"])
def test_two_ranks_give_the_gradient_and_the_step_of_one(
    name: str, model: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    num_ranks, parallel = LAYOUTS[name]
    found = run_ranks(num_ranks, make_spec(model, parallel=parallel), tmp_path / "run")
    for prefix in ("logprobs/", "grad/", "weight/"):
        assert worst(found, alone, prefix) < (1e-4, ""), prefix
    assert float(found["grad_norm"]) == pytest.approx(float(alone["grad_norm"]), rel=1e-4)


@pytest.fixture(scope="module")
def exact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], dict[str, torch.Tensor]]:
    """Return a function that runs one process in fp64, with auxiliary losses that the layout can be compared with."""
    runs: dict[str, dict[str, torch.Tensor]] = {}

    def run(layout: Layout) -> dict[str, torch.Tensor]:
        losses = moe(layout)
        key = json.dumps(losses)
        if key not in runs:
            spec = exact_spec(model, moe=losses)
            runs[key] = run_ranks(1, spec, tmp_path_factory.mktemp("exact") / "run")
        return runs[key]

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_gradient_of_one_process_to_rounding(
    name: str, model: Path, exact: Callable[[Layout], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    num_ranks, parallel = LAYOUTS[name]
    layout = Layout(world_size=num_ranks, **parallel)
    # The ranks of a context-parallel group share the cap of one process.
    spec = exact_spec(model, moe=moe(layout), parallel=parallel, token_cap=80 // layout.context)
    found, expected = run_ranks(num_ranks, spec, tmp_path / "run"), exact(layout)
    for prefix in ("logprobs/", "traced/", "measured", "grad/", "weight/"):
        assert worst(found, expected, prefix) < (EXACT, ""), prefix
    # Megatron computes the norm in fp32.
    assert float(found["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 2], ids=["alone", "TP2-ETP2"])
def test_grouped_experts_train_what_sequential_ones_do(
    num_ranks: int, model: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    parallel = {"tensor": num_ranks, "expert_tensor": num_ranks}
    spec = make_spec(model, experts="grouped", recompute="full", parallel=parallel)
    found = run_ranks(num_ranks, spec, tmp_path / "grouped")
    for prefix in ("logprobs/", "grad/", "weight/"):
        assert worst(found, alone, prefix)[0] < 1e-5, prefix


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Make a deeper model, and return it with the results of one process in fp64."""
    folder = tmp_path_factory.mktemp("deep")
    model = write_tiny_model(folder / "tiny", **SHAPE | {"num_hidden_layers": 7})
    spec = exact_spec(model, moe=moe(Layout(world_size=1)))
    return model, run_ranks(1, spec, folder / "run")


@pytest.mark.parametrize("name", INTERLEAVED)
def test_the_interleaved_pipeline_gives_the_gradient_of_one_process_to_rounding(
    name: str, deep: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model, expected = deep
    num_ranks, parallel = INTERLEAVED[name]
    losses = moe(Layout(world_size=num_ranks, **parallel))
    spec = exact_spec(model, moe=losses, parallel=parallel)
    found = run_ranks(num_ranks, spec, tmp_path / "run")
    for prefix in ("logprobs/", "traced/", "measured", "grad/", "weight/"):
        assert worst(found, expected, prefix) < (EXACT, ""), prefix


def test_a_checkpoint_of_the_interleaved_pipeline_continues_and_is_exported(
    deep: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model, _ = deep
    two_steps = run_ranks(1, make_spec(model, whole_gradients=False, steps=2), tmp_path / "alone")
    num_ranks, parallel = INTERLEAVED["PP3-VPP2"]
    save = str(tmp_path / "checkpoints")
    spec = make_spec(model, whole_gradients=False, parallel=parallel, save_to=save, export=True)
    run_ranks(num_ranks, spec, tmp_path / "first")
    spec = make_spec(model, whole_gradients=False, resume_from=f"{save}/step_1")
    assert worst(run_ranks(1, spec, tmp_path / "second"), two_steps, "weight/") < (1e-4, "")
    assert_exported(model, tmp_path / "first" / "hf")


@pytest.mark.parametrize("name", ["TP2", "PP2", "TP2xPP2"])
def test_a_head_tied_to_the_embedding_has_the_gradient_of_the_formula(name: str, tmp_path: Path) -> None:
    # Over pipeline stages the first and the last hold a copy each, and the gradient is the sum of both.
    model = write_tiny_model(tmp_path / "tied", **SHAPE | {"tie_word_embeddings": True})
    num_ranks, parallel = LAYOUTS[name]
    spec = make_spec(model, dtype="float64", parallel=parallel, export=True)
    found = run_ranks(num_ranks, spec, tmp_path / "run")
    config, weights = load_reference(model)
    policy_loss(config, weights, spec, ALGORITHMS[0]).backward()
    gradients = {f"grad/c3po/{name}": w.grad for name, w in weights.items()}
    assert worst(found, gradients, "grad/") < (1e-6, "")
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert float(found["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    exported = {name: t.float() for name, t in tensors_of(tmp_path / "run" / "hf").items()}
    assert all(torch.equal(exported[name], t) for name, t in load_file(model / "model.safetensors").items())


@pytest.mark.parametrize(("balance", "z"), [(0.05, 0.0), (0.0, 0.02)], ids=["balance", "z"])
def test_an_auxiliary_loss_is_what_it_is_said_to_be(balance: float, z: float, model: Path, tmp_path: Path) -> None:
    # Far from the denominator's scale, and in several micro-batches on two context-parallel ranks.
    losses = {"load_balance_coefficient": balance, "z_loss_coefficient": z}
    spec = make_spec(model, dtype="float64", parallel={"context": 2}, token_cap=40, moe=losses)
    found = run_ranks(2, spec, tmp_path / "run")
    lengths = [len(row["token_ids"]) for row in spec["sequences"]]
    ((*micro_batches,),) = pack_micro_batches(lengths, 1, 80, cost_model(load_architecture(model)))
    assert len(micro_batches) > 1
    config, weights = load_reference(model)
    expected_balance, expected_z = router_losses(config, weights, spec, [list(m) for m in micro_batches])
    (policy_loss(config, weights, spec, ALGORITHMS[0]) + balance * expected_balance + z * expected_z).backward()
    gradients = {f"grad/c3po/{name}": w.grad for name, w in weights.items()}
    assert worst(found, gradients, "grad/") < (1e-6, "")
    # The logged loss is the mean over the three mixture-of-experts layers. A loss that is off is not logged.
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    logged = {name: metrics[name] for name in ("load_balance_loss", "z_loss") if name in metrics}
    written = {"load_balance_loss": expected_balance.item() / 3} if balance else {"z_loss": expected_z.item() / 3}
    assert logged == pytest.approx(written, rel=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm["name"])
def test_one_process_in_fp64_has_the_gradient_of_the_written_formula(
    algorithm: dict, model: Path, exact: Callable[[Layout], dict[str, torch.Tensor]]
) -> None:
    spec = exact_spec(model)
    found = exact(Layout(world_size=2))  # the run without a balance loss; its z-loss is added here
    config, weights = load_reference(model)
    scaled = {name: t * 1.1 for name, t in weights.items()}
    _, z = router_losses(config, scaled, spec, [[i] for i in range(9)])
    (policy_loss(config, weights, spec, algorithm) + moe(Layout(world_size=2))["z_loss_coefficient"] * z).backward()
    # The present weights are 1.1 times the leaves of the graph.
    gradients = {f"grad/{algorithm['name']}/{name}": w.grad / 1.1 for name, w in weights.items()}
    assert worst(found, gradients, f"grad/{algorithm['name']}/") < (1e-6, "")
    traced = {}
    for sample in TRACED:
        if rows := rows_by_sample(spec).get(sample):
            parts = [logprobs_and_entropy(config, scaled, spec["sequences"][i])[0].detach() for i in rows]
            traced[f"traced/{sample}"] = torch.cat(parts)
    assert traced.keys() == {"traced/0", "traced/3", "traced/8"}  # 4 is the second segment of 3
    assert worst(found, traced, "traced/") < (1e-6, "")


def test_reference_policy_and_recomputation_work_under_context_parallelism(model: Path, tmp_path: Path) -> None:
    common = {"dtype": "float64", "steps": 2, "reference_scale": 1.1}
    expected = run_ranks(1, make_spec(model, **common), tmp_path / "alone")
    spec = make_spec(model, **common, recompute="full", parallel={"context": 2, "expert": 2})
    found = run_ranks(2, spec, tmp_path / "run")
    assert worst(found, expected, "weight/") < (EXACT, "")


@pytest.mark.parametrize("token_cap", [41, 10_000], ids=["one sequence", "everything"])
def test_gradient_does_not_depend_on_the_micro_batch_cap(
    token_cap: int, model: Path, exact: Callable[[Layout], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    layout = Layout(world_size=2)  # whose run has no balance loss, the one that micro-batches change
    spec = exact_spec(model, moe=moe(layout))
    found = run_ranks(1, spec | {"token_cap": token_cap}, tmp_path / "run")
    assert worst(found, exact(layout), "grad/") < (EXACT, "")


@pytest.mark.parametrize("parallel", [{"expert": 2}, {"context": 2}], ids=["EP2", "CP2"])
def test_distributed_optimizer_takes_the_same_step(
    parallel: dict, model: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    found = run_ranks(2, make_spec(model, whole_gradients=False, parallel=parallel), tmp_path / "run")
    assert worst(found, alone, "weight/") < (1e-4, "")


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [(2, {}), (1, {"router_dtype": "bfloat16", "head_dtype": "bfloat16"}), (2, NEW_KERNELS)],
    ids=["TP2", "router and head in it too", "TP2 with FlashAttention 4 and quack"],
)
def test_bfloat16_by_what_a_gpu_has_trains_close_to_float32(
    num_ranks: int, options: dict, model: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    common = {"dtype": "bfloat16", "parallel": {"tensor": num_ranks}, "as_on_a_gpu": True, "watch_host": True}
    spec = make_spec(model, whole_gradients=False, **common, **options)
    found = run_ranks(num_ranks, spec, tmp_path / "run")
    for i in range(9):
        assert float((found[f"logprobs/{i}"] - alone[f"logprobs/{i}"]).abs().mean()) < 0.05
    assert worst(found, alone, "weight/") < (0.02, "")
    # The optimizer has its weights in fp32, whose rounding are the model's, and gradients add up in fp32.
    for rank in range(num_ranks):
        assert float(found[f"share_of_exact_masters/{rank}"]) == 1.0
        assert float(found[f"share_of_masters_in_bf16/{rank}"]) < 0.1
    # A rank that has the whole model waits for nothing in its forward and backward passes; megatron's tensor-parallel
    # layers look at a random generator's state, which is in host memory.
    waits = json.loads((tmp_path / "run/host_waits.json").read_text())
    known = ["kernel_stand_ins.py", *(["megatron/core/tensor_parallel/"] if num_ranks > 1 else [])]
    assert [wait for wait in waits if not any(place in wait for place in known)] == []


def test_quack_changes_the_experts_gradients_alone_and_by_their_rounding_alone(model: Path, tmp_path: Path) -> None:
    """Compare a step in bf16 without and with quack: torch rounds experts' gradients in every micro-batch, quack
    never."""
    common = {"dtype": "bfloat16", "as_on_a_gpu": True}
    torchs = run_ranks(1, make_spec(model, **common), tmp_path / "torch")
    quacks = run_ranks(1, make_spec(model, **common, expert_weight_gradient="quack"), tmp_path / "quack")
    names = [name for name in torchs if name.startswith("grad/")]
    experts = [name for name in names if ".mlp.experts." in name]
    assert len(experts) > 20
    for name in names:
        if name in experts:
            assert 0 < relative(quacks[name], torchs[name]) < 2**-8, name
        else:
            assert torch.equal(quacks[name], torchs[name]), name


@pytest.mark.parametrize("kernels", [{}, NEW_KERNELS], ids=["torch's kernels", "FlashAttention 4 and quack"])
def test_what_saves_memory_and_what_overlaps_changes_no_bit(kernels: dict, model: Path, tmp_path: Path) -> None:
    common = {"dtype": "bfloat16", "whole_gradients": False, "parallel": {"expert": 2}, "steps": 3, "as_on_a_gpu": True}
    common |= kernels
    expected = run_ranks(2, make_spec(model, **common, watch_host=True), tmp_path / "plain")
    # quack's product needs whole layers in a bucket. Otherwise torch adds up a layer's gradients, which it rounds.
    spec = make_spec(model, **common, **(WHOLE_LAYERS if kernels else EVERYTHING), recompute="selective")
    found = run_ranks(2, spec, tmp_path / "run")
    assert found.keys() == expected.keys()
    for name in (name for name in expected if name.startswith("weight/")):
        assert torch.equal(found[name], expected[name]), name
    # Over several ranks megatron's dispatcher waits for the number of tokens that come.
    assert any("token_dispatcher" in wait for wait in json.loads((tmp_path / "plain/host_waits.json").read_text()))


@pytest.mark.parametrize(
    ("before", "after"), [("EP2", "CP2"), ("CP2-EP2", "PP3")], ids=["from EP2 to CP2", "from CP2-EP2 to PP3"]
)
def test_a_checkpoint_continues_in_another_layout_as_if_nothing_had_happened(
    before: str, after: str, model: Path, after_two_steps: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save = str(tmp_path / "checkpoints")
    num_ranks, parallel = LAYOUTS[before]
    common = {"whole_gradients": False, **EVERYTHING}
    spec = make_spec(model, **common, parallel=parallel, experts="grouped", save_to=save)
    run_ranks(num_ranks, spec, tmp_path / "first")
    num_ranks, parallel = LAYOUTS[after]
    spec = make_spec(model, **common, parallel=parallel, resume_from=f"{save}/step_1")
    second = run_ranks(num_ranks, spec, tmp_path / "second")
    assert worst(second, after_two_steps, "weight/") < (1e-4, "")


def test_a_pipeline_stage_without_experts_is_saved_and_goes_on(
    model: Path, after_two_steps: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    # The first of three stages has the dense layer alone, and expert parameters have an optimizer of their own.
    parallel = {"pipeline": 3, "expert": 2}
    spec = make_spec(model, whole_gradients=False, parallel=parallel, save_to=str(tmp_path / "checkpoints"))
    run_ranks(6, spec, tmp_path / "first")
    for num_ranks, layout in ((6, parallel), (1, {})):
        resumed = str(tmp_path / "checkpoints/step_1")
        spec = make_spec(model, whole_gradients=False, parallel=layout, resume_from=resumed)
        found = run_ranks(num_ranks, spec, tmp_path / f"second_on_{num_ranks}")
        assert worst(found, after_two_steps, "weight/") < (1e-4, "")


def test_a_checkpoint_is_saved_and_goes_on_where_a_fused_adam_is_installed(
    model: Path, after_two_steps: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    # Transformer Engine and apex bring one that counts its steps elsewhere; torch's is used all the same.
    common = {"whole_gradients": False, "parallel": {"expert": 2}, "has_fused_adam": True}
    run_ranks(2, make_spec(model, **common, save_to=str(tmp_path / "checkpoints")), tmp_path / "first")
    spec = make_spec(model, **common, resume_from=str(tmp_path / "checkpoints/step_1"))
    assert worst(run_ranks(2, spec, tmp_path / "second"), after_two_steps, "weight/") < (1e-4, "")


@pytest.fixture(scope="module")
def saved_by_tp2(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    """Save a checkpoint of two tensor-parallel ranks after a step. Return it and the weights that they exported
    then."""
    folder = tmp_path_factory.mktemp("tp2")
    spec = make_spec(model, whole_gradients=False, parallel={"tensor": 2}, save_to=str(folder / "checkpoints"))
    return f"{folder}/checkpoints/step_1", run_ranks(2, spec, folder / "run")


@pytest.mark.parametrize("after", ["EP2", "one rank"])
def test_a_checkpoint_of_tensor_parallel_ranks_is_the_same_model_and_optimizer_in_another_layout(
    after: str,
    model: Path,
    saved_by_tp2: tuple[str, dict[str, torch.Tensor]],
    after_two_steps: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    checkpoint, saved = saved_by_tp2
    num_ranks, parallel = LAYOUTS.get(after, (1, {}))
    spec = make_spec(model, whole_gradients=False, parallel=parallel, resume_from=checkpoint)
    found = run_ranks(num_ranks, spec, tmp_path / "run")
    config, _ = load_reference(model)
    weights = {name.removeprefix("weight/"): t.double() for name, t in saved.items() if name.startswith("weight/")}
    for i, row in enumerate(spec["sequences"]):
        expected = logprobs_and_entropy(config, weights, row)[0].detach()
        assert float((found[f"logprobs/{i}"] - expected).abs().max()) < 2e-5
    assert worst(found, after_two_steps, "weight/") < (1e-4, "")


@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2}, {"pipeline": 2}, {"expert": 2}, {"context": 2}],
    ids=["TP2", "PP2", "EP2", "CP2"],
)
def test_hugging_face_to_megatron_and_back_is_bit_exact(parallel: dict, model: Path, tmp_path: Path) -> None:
    run_ranks(2, make_spec(model, parallel=parallel, export=True), tmp_path / "run")
    assert_exported(model, tmp_path / "run" / "hf")


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
