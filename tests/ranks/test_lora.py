"""Tests adapters on gloo ranks: every layout has the gradient of one process and of peft. Also tests checkpoints."""

import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import ALONE
from family_models import make, transformers_gradient, transformers_logprobs, transformers_model
from parallel import ALGORITHMS, EVERYTHING, EXACT, LAYOUTS, SHAPE, make_spec, moe, relative, run_ranks, worst
from safetensors.torch import load_file
from tiny_model import tensors_of, write_tiny_model
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rl.checkpoint.adapters import AdapterNote, read_note, refuse_other_adapters
from megatron_rl.checkpoint.convert import Job, convert
from megatron_rl.checkpoint.metadata import read_metadata
from megatron_rl.checkpoint.names import adapter_table, adapters
from megatron_rl.checkpoint.peft import write_peft
from megatron_rl.checkpoint.read import open_checkpoint
from megatron_rl.config.layout import Layout
from megatron_rl.config.lora import LoraSection
from megatron_rl.families import load_architecture

LORA = {"rank": 4, "alpha": 8.0}
# An epsilon far above gradients: Adam's step is then about linear in them, and does not blow up their rounding.
STEADY = {"lora": LORA, "whole_gradients": False, "optimizer": {"epsilon": 1.0, "learning_rate": 0.1}}
# In the last two four ranks divide experts twice, into groups and each expert over two ranks; and two of them share
# each of the two key-value heads.
OF_ADAPTERS = {name: LAYOUTS[name] for name in ("DP2", "TP2", "TP2-ETP2", "TP2-EP2", "PP2", "CP2-EP2", "CP2xTP2")} | {
    "TP2xDP2-EP2xETP2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "TP4": (4, {"tensor": 4}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **SHAPE)


def spec_of(model: Path, layout: Layout = ALONE, **changes: object) -> dict:
    common = {"dtype": "float64", "moe": moe(layout), "algorithms": ALGORITHMS, "reference_scale": 1.0, "lora": LORA}
    return make_spec(model, **common | changes)


@pytest.fixture(scope="module")
def exact(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, float]], dict[str, torch.Tensor]]:
    """Runs one process in fp64, once for each choice of auxiliary losses."""
    runs: dict[str, dict[str, torch.Tensor]] = {}

    def run(losses: dict[str, float]) -> dict[str, torch.Tensor]:
        key = json.dumps(losses)
        if key not in runs:
            runs[key] = run_ranks(1, spec_of(model, moe=losses), tmp_path_factory.mktemp("exact") / "run")
        return runs[key]

    return run


@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_every_layout_gives_the_adapters_the_gradient_of_one_process_to_rounding(
    name: str, model: Path, exact: Callable[[dict[str, float]], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    num_ranks, parallel = OF_ADAPTERS[name]
    layout = Layout(world_size=num_ranks, **parallel)
    spec = spec_of(model, layout, parallel=parallel, token_cap=80 // layout.context)
    found, expected = run_ranks(num_ranks, spec, tmp_path / "run"), exact(spec["moe"])
    for prefix in ("logprobs/", "traced/", "measured", "grad/", "factor/", "weight/"):
        assert worst(found, expected, prefix) < (EXACT, ""), prefix
    assert float(found["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-6)
    factors = {hf for entry in adapter_table(load_architecture(model), LoraSection(**LORA)).values() for hf in entry.hf}
    for algorithm in ALGORITHMS:
        gradients = {f"grad/{algorithm['name']}/{name}" for name in factors}
        assert gradients <= found.keys()
        assert all(float(found[name].norm()) > 0 for name in gradients)


def given_factors(model: Path) -> dict[str, torch.Tensor]:
    """Make what tests/parallel_worker.py fills each factor with, by the name that peft has."""
    found = {}
    for name, entry in adapter_table(load_architecture(model), LoraSection(**LORA)).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = 0.05 * torch.randn(entry.shape, generator=generator)
        found |= dict(zip(entry.hf, entry.layout.split(whole), strict=True))
    return found


def peft_model(folder: Path, factors: dict[str, torch.Tensor]) -> tuple[Any, dict[str, list[str]]]:
    """Make transformers' class with peft's adapters, and list the names that each of our factors has there: of a fused
    weight's `lora_a` every projection has a copy."""
    peft = pytest.importorskip("peft", reason="peft is not installed; `make install` brings it")
    projections = [
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "down_proj",
    ]
    config = peft.LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], use_rslora=True, target_modules=projections)
    model = peft.get_peft_model(transformers_model(folder), config)
    parameters = dict(model.named_parameters())
    places: dict[str, list[str]] = {}
    for adapter in adapters(load_architecture(folder), LoraSection(**LORA)).values():
        for _, a, b in adapter.peft_names():
            places.setdefault(adapter.a.hf[0], []).append(a.replace(".weight", ".default.weight"))
            places.setdefault(b, []).append(b.replace(".weight", ".default.weight"))
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert trained == {name for names in places.values() for name in names}
    with torch.no_grad():
        for name, theirs in places.items():
            for place in theirs:
                parameters[place].copy_(factors[name])
    return model, places


@pytest.mark.parametrize("case", ["llama, tied, one key-value head, llama3", "phi3", "qwen2"])
def test_the_trainer_has_the_logprobs_and_gradients_of_peft_on_transformers(case: str, tmp_path: Path) -> None:
    folder = make(case, tmp_path / "model")
    spec = make_spec(folder, traced=[], lora=LORA)
    model, places = peft_model(folder, given_factors(folder))
    with torch.no_grad():
        logprobs = [transformers_logprobs(model, row["token_ids"]) for row in spec["sequences"]]
    gradient = transformers_gradient(model, spec)
    for num_ranks, parallel in ((1, {}), (2, {"tensor": 2})):
        found = run_ranks(num_ranks, spec | {"parallel": parallel}, tmp_path / f"on {num_ranks}")
        for i, (row, expected) in enumerate(zip(spec["sequences"], logprobs, strict=True)):
            assert (found[f"logprobs/{i}"] - expected[row["num_prompt_tokens"] - 1 :]).abs().max() < 2e-5
        for name, theirs in places.items():
            expected = sum(gradient[place] for place in theirs)
            assert relative(found[f"grad/c3po/{name}"], expected) < 1e-5, name


@pytest.fixture(scope="module")
def alone_in_fp32(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    spec = make_spec(model, **STEADY, steps=2)
    return run_ranks(1, spec, tmp_path_factory.mktemp("alone") / "run")


def test_grouped_experts_with_recomputation_train_what_sequential_ones_do(
    model: Path, alone_in_fp32: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    spec = make_spec(model, **STEADY, steps=2, experts="grouped", recompute="full", parallel={"pipeline": 2})
    found = run_ranks(2, spec, tmp_path / "run")
    for prefix in ("logprobs/", "factor/", "weight/"):
        assert worst(found, alone_in_fp32, prefix) < (1e-4, ""), prefix


def test_what_saves_memory_and_what_overlaps_changes_no_bit_in_bfloat16_and_rounding_is_told(
    model: Path, tmp_path: Path
) -> None:
    common = {"dtype": "bfloat16", "whole_gradients": False, "parallel": {"expert": 2}, "steps": 3, "as_on_a_gpu": True}
    common |= {"lora": {"rank": 8, "alpha": 8.0}}
    expected = run_ranks(2, make_spec(model, **common), tmp_path / "plain")
    found = run_ranks(2, make_spec(model, **common, **EVERYTHING, recompute="selective"), tmp_path / "run")
    names = [name for name in expected if name.startswith(("factor/", "weight/"))]
    assert len(names) > 100
    assert all(torch.equal(found[name], expected[name]) for name in names)
    base = tensors_of(model)
    frozen = [name for name in base if "norm" in name or "embedding" in name or "gate.weight" in name]
    assert all(torch.equal(expected[f"weight/{name}"], base[name].bfloat16()) for name in frozen)
    metrics = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    # The exported, merged weights are compared with the exact ones, computed here from the factors.
    along = size = noise = 0.0
    for adapter in adapters(load_architecture(model), LoraSection(**common["lora"])).values():
        for name, b in zip(adapter.weight.hf, adapter.b.hf, strict=True):
            factors = (expected[f"factor/{x}"].double() for x in (b, adapter.a.hf[0]))
            update = 8.0 / 8**0.5 * torch.matmul(*factors)
            kept = expected[f"weight/{name}"].double() - base[name].bfloat16().double()
            along += float((update * kept).sum())
            size += float(update.square().sum())
            noise += float((kept - update).square().sum())
    assert metrics["lora_update_kept"] == pytest.approx(along / size, rel=1e-4)
    assert metrics["lora_rounding_noise"] == pytest.approx((noise / size) ** 0.5, rel=1e-3)


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save a checkpoint of two ranks that divide every weight, after a step. Return it and the results of the run."""
    folder = tmp_path_factory.mktemp("saved")
    parallel = {"tensor": 2, "expert_tensor": 2}
    spec = make_spec(model, **STEADY, parallel=parallel, save_to=str(folder / "checkpoints"))
    return folder / "checkpoints/step_1", run_ranks(2, spec, folder / "run")


def test_a_checkpoint_holds_adapters_alone_and_goes_on_in_another_layout(
    model: Path,
    saved: tuple[Path, dict[str, torch.Tensor]],
    alone_in_fp32: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    checkpoint, _ = saved
    architecture = load_architecture(model)
    numbers = sum(torch.Size(e.shape).numel() for e in adapter_table(architecture, LoraSection(**LORA)).values())
    stored = read_metadata(checkpoint / "megatron").state_dict_metadata.items()
    sizes = {name: found.size.numel() for name, found in stored if isinstance(found, TensorStorageMetadata)}
    assert all(name.endswith((".lora_a", ".lora_b")) for name in sizes)
    assert sum(sizes.values()) == 4 * numbers  # each with its fp32 weight and Adam's two moments
    spec = make_spec(model, **STEADY, parallel={"expert": 2}, resume_from=str(checkpoint))
    found = run_ranks(2, spec, tmp_path / "run")
    assert worst(found, alone_in_fp32, "factor/") < (1e-4, "")
    assert worst(found, alone_in_fp32, "weight/") < (1e-4, "")


@pytest.mark.parametrize(("targets", "name"), [(["experts"], "EP2"), (["mlp", "experts"], "PP2xDP2-EP2")])
def test_adapters_that_leave_an_optimizer_without_parameters_are_saved_and_go_on(
    targets: list[str], name: str, model: Path, tmp_path: Path
) -> None:
    # With expert parallelism dense and expert parameters have an optimizer each. Of the first case nothing is dense; of
    # the second the first pipeline stage has the one dense MLP.
    common = STEADY | {"lora": LORA | {"targets": targets}}
    expected = run_ranks(1, make_spec(model, **common, steps=2), tmp_path / "alone")
    num_ranks, parallel = LAYOUTS[name]
    spec = make_spec(model, **common, parallel=parallel, save_to=str(tmp_path / "checkpoints"))
    run_ranks(num_ranks, spec, tmp_path / "first")
    for ranks, layout in ((num_ranks, parallel), (1, {})):
        spec = make_spec(model, **common, parallel=layout, resume_from=str(tmp_path / "checkpoints/step_1"))
        found = run_ranks(ranks, spec, tmp_path / f"second_on_{ranks}")
        assert worst(found, expected, "factor/") < (1e-4, "")


def test_a_checkpoint_is_read_and_converted_as_the_merged_model(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    checkpoint, found = saved
    job = Job(source=checkpoint, destination=tmp_path / "hf", to_megatron=False, verify=True)
    convert(job)
    merged = tensors_of(tmp_path / "hf")
    with open_checkpoint(checkpoint) as opened:
        for name, tensor in merged.items():
            assert torch.equal(opened.read(name), tensor)
            assert relative(tensor, found[f"weight/{name}"]) < 1e-6, name
    assert not (tmp_path / "hf/lora.json").exists()


def test_frozen_weights_that_are_gone_or_others_are_told(
    model: Path, saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    checkpoint, _ = saved
    note = read_note(checkpoint)
    assert note is not None
    assert (note.base, note.lora) == (model, LoraSection(**LORA))
    other = write_tiny_model(tmp_path / "other", seed=1, **SHAPE)
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    for base, message in ((tmp_path / "gone", "which is no folder here"), (other, "other weights than those at")):
        (copy / "lora.json").write_text(note.model_copy(update={"base": base}).text())
        with pytest.raises(ValueError, match=message):
            open_checkpoint(copy)
    (copy / "lora.json").write_text('{"base": 1}')
    with pytest.raises(ValueError, match="does not say whose adapters"):
        open_checkpoint(copy)


def test_a_run_does_not_go_on_with_other_adapters_or_other_weights(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    checkpoint, _ = saved
    note = read_note(checkpoint)
    assert note is not None
    refuse_other_adapters(checkpoint, note)
    refuse_other_adapters(tmp_path, None)
    changes: list[tuple[Path, AdapterNote | None, str]] = [
        (checkpoint, None, r"go on with the \[lora\] that .* rank 4, alpha 8"),
        (checkpoint, note.model_copy(update={"lora": LoraSection(rank=8)}), r"rank 4.* says rank 8"),
        (checkpoint, note.model_copy(update={"digest": "0"}), "other weights"),
        (tmp_path, note, "holds all weights and no adapters"),
    ]
    for directory, expected, message in changes:
        with pytest.raises(ValueError, match=message):
            refuse_other_adapters(directory, expected)


def test_peft_loads_the_exported_adapters_with_the_logits_of_the_merged_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; `make install` brings it")
    folder = make("qwen3", tmp_path / "model")
    spec = make_spec(folder, lora=LORA, whole_gradients=False, save_to=str(tmp_path / "checkpoints"))
    run_ranks(1, spec, tmp_path / "run")
    source = tmp_path / "checkpoints/step_1"
    write_peft(source, tmp_path / "adapter")
    convert(Job(source=source, destination=tmp_path / "hf", to_megatron=False))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    ids = random.Random(2).choices(range(97), k=40)
    with torch.no_grad():
        base = transformers_model(folder)
        before = transformers_logprobs(base, ids)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        found = transformers_logprobs(adapted, ids)
        expected = transformers_logprobs(transformers_model(tmp_path / "hf"), ids)
    assert (found - expected).abs().max() < 5e-5
    assert (found - before).abs().max() > 0.01
    with pytest.raises(ValueError, match="holds weights and no adapters"):
        write_peft(folder, tmp_path / "none")


def test_a_projection_without_an_adapter_makes_peft_want_whole_names(
    model: Path, saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    checkpoint, _ = saved
    write_peft(checkpoint, tmp_path / "all")
    tensors = load_file(tmp_path / "all/adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.experts.5.up_proj.lora_A.weight" in tensors
    gate, up = (
        tensors[f"base_model.model.model.layers.1.mlp.shared_experts.{name}_proj.lora_A.weight"]
        for name in ("gate", "up")
    )
    assert torch.equal(gate, up)
    from megatron_rl.checkpoint.peft import _target_modules

    assert _target_modules(["a.mlp.up.weight"], {"a.experts.0.up.weight"}) == ["a.mlp.up"]
    assert _target_modules(["a.mlp.up.weight", "b.mlp.up.weight"], {"a.norm.weight"}) == ["up"]
