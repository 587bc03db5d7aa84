"""Tests tools/bench_gpu.py at a tiny size.

It checks FLOPs against those counted by hand, the layers that fit, the part that an operation belongs to, what is left
out of a step, and the reference's shape.
"""

import json
import math
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from megatron_rl.families import read_architecture

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from alone import world  # noqa: E402
from bench_gpu import CHOICES, SMOKE, Bench, names_in, run_config  # noqa: E402
from bench_reference import Reference, ratios, reference_config  # noqa: E402
from mfu import layers_that_fit, model_flops, nominal_peak  # noqa: E402
from profile_parts import assign, mark_modules, marked  # noqa: E402

LING_LITE = ROOT / "examples/ring_lite/ling_lite_1_5/config.json"


def test_flops_of_ling_lite_by_hand() -> None:
    shape = read_architecture(ROOT / "examples/ring_lite/ling_lite_1_5/config.json")
    found = model_flops(shape.model_copy(update={"num_hidden_layers": 3}), [8192, 100], 8290)
    # Queries, keys, values and output; router; two shared and six of 64 experts, of three matrices each; four norms'
    # worth of weights a layer is no product, but is counted as 2 per weight, as the last norm is.
    layer = 2048 * 3072 + 2048 * 2048 + 64 * 2048 + (2 + 6) * 3 * 2048 * 1408 + 2 * 2048
    products = 2 * (3 * layer + 2048) * 8292 + 2 * 126464 * 2048 * 8290
    # q . k and the sum of values: 2 * 2 * 2048 operations for each of about n^2 / 2 pairs.
    attention = 3 * 2 * 2048 * (8192**2 + 100**2)
    assert found == pytest.approx(3 * (products + attention), rel=1e-12)
    head = model_flops(shape, [10], 10) - model_flops(shape, [10], 0)
    assert head == pytest.approx(3 * 2 * 126464 * 2048 * 10)
    tied = shape.model_copy(update={"tie_word_embeddings": True})
    assert model_flops(tied, [10], 7) == pytest.approx(model_flops(shape, [10], 7))


def test_peaks_by_name_and_layers_by_memory() -> None:
    assert nominal_peak("NVIDIA H200") == nominal_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert nominal_peak("NVIDIA H100 PCIe") == 756e12
    assert nominal_peak("NVIDIA A100-SXM4-80GB") == 312e12
    with pytest.raises(ValueError, match="'Some GPU'.*--peak"):
        nominal_peak("Some GPU")
    assert layers_that_fit(lambda n: 10 + 3 * n, 28, 22) == 4
    assert layers_that_fit(lambda n: 10 + 3 * n, 3, 22) == 3
    with pytest.raises(ValueError, match="one layer"):
        layers_that_fit(lambda n: 10 + 3 * n, 28, 12)


class _Square(torch.autograd.Function):
    """Computes x x^T x, which takes two products forward. Its backward takes as many."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ x.T @ x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad @ x.T @ x


def test_operations_of_forward_backward_and_recomputation_belong_to_the_part_that_made_them() -> None:
    a, b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    handles = mark_modules([(a, "a"), (b, "b")])
    head = marked("head", _Square.apply)
    x = torch.randn(4, 8, requires_grad=True)

    def counted() -> Counter[tuple[str, str]]:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(2):
                head(b(checkpoint(a, x, use_reentrant=True))).tanh().sum().backward()
        products = {"aten::mm": "mm", "aten::addmm": "addmm", "aten::tanh_backward": "tanh'"}
        found = assign(list(profiled.events()))
        return Counter((part, products[event.name]) for event, part in found if event.name in products)

    # Two passes: a runs forward twice, the second time in backward; two products behind each Linear's backward.
    expected = {("a", "addmm"): 4, ("a", "mm"): 4, ("b", "addmm"): 2, ("b", "mm"): 4, ("head", "mm"): 8}
    assert counted() == {**expected, ("other", "tanh'"): 2}
    for handle in handles:
        handle.remove()
    assert {part for part, _ in counted()} == {"head", "other"}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    config = run_config(Namespace(recompute=["none"], model=[]), 32)
    shape = read_architecture(LING_LITE).model_copy(update=SMOKE)
    with world():
        yield Bench(shape, config, dist.new_group(backend="gloo"), rounds=1)


def test_without_head_there_is_no_gradient_of_the_head(bench: Bench) -> None:
    """Check that the head alone has no gradient, not even of zeros, which a GPU would write and add."""
    (gpt,) = bench.trainer.model.gpts
    weights = {"head": gpt.output_layer.weight, "embedding": gpt.embedding.word_embeddings.weight}
    told: Counter[str] = Counter()
    hooks = [weight.register_hook(lambda _, name=name: told.update([name])) for name, weight in weights.items()]
    batch = bench.micro_batch([16, 16])
    with bench.without_head():
        bench.step(batch, 2)
    assert told == {"embedding": 2}
    bench.step(batch, 2)
    assert told == {"embedding": 4, "head": 2}
    for hook in hooks:
        hook.remove()


def test_recomputation_runs_every_layer_once_more_and_changes_no_gradient(bench: Bench) -> None:
    (gpt,) = bench.trainer.model.gpts
    passes: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_: passes.append(1)) for layer in gpt.decoder.layers]
    batch = bench.micro_batch([16, 16])
    gradients, counts = [], []
    state = [p.detach().clone() for p in bench.trainer.model.parameters()]
    for how in ("none", "full", "none"):
        with bench.recomputing(how):
            bench.step(batch, 1)
        gradients.append([p.main_grad.clone() for p in bench.trainer.model.parameters()])
        counts.append(len(passes))
        passes.clear()
        with torch.no_grad():
            for p, before in zip(bench.trainer.model.parameters(), state, strict=True):
                p.copy_(before)
    assert counts == [2, 4, 2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients[:2], strict=True))
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dense", [0, 1])
def test_the_reference_has_the_same_shape_but_for_a_gate_of_shared_experts(dense: int) -> None:
    changes = {"num_hidden_layers": 3, "dense_layers": tuple(range(dense))}
    shape = read_architecture(LING_LITE).model_copy(update=changes)
    with torch.device("meta"):
        from transformers import Qwen2MoeForCausalLM

        model = Qwen2MoeForCausalLM(reference_config(shape))
    gates = (3 - dense) * shape.hidden_size
    assert sum(p.numel() for p in model.parameters()) == shape.num_parameters() + gates
    sizes = {name.split(".", 3)[-1]: tuple(p.shape) for name, p in model.named_parameters() if ".layers.2." in name}
    assert sizes["mlp.experts.gate_up_proj"] == (64, 2 * 1408, 2048)
    assert sizes["self_attn.k_proj.weight"] == (4 * 128, 2048)
    assert sizes["mlp.shared_expert.up_proj.weight"] == (2 * 1408, 2048)
    assert model.model.rotary_emb.config.rope_parameters["rope_theta"] == 600_000
    assert model.config.norm_topk_prob


def test_a_shape_that_the_reference_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="0 and norm_head False; compare another shape"):
        reference_config(read_architecture(LING_LITE).model_copy(update={"shared_intermediate_size": 0}))


def test_the_reference_learns_what_it_is_given() -> None:
    torch.manual_seed(0)
    shape = read_architecture(LING_LITE).model_copy(update=SMOKE | {"initializer_range": 0.05})
    reference = Reference(shape, [16, 16], torch.device("cpu"))
    for group in reference.optimizer.param_groups:
        group["lr"] = 1e-2
    first, *_, last = (reference.step(2) for _ in range(15))
    assert first == pytest.approx(math.log(512), rel=0.1)
    assert last < 0.5 * first
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}


def test_ratios_to_the_reference_by_hand() -> None:
    ours, theirs = ({"seconds": a, "seconds_of_step": b} for a, b in ((0.25, 1.0), (0.5, 3.0)))
    assert ratios(ours, theirs, 8) == {"ours_over_reference": {"micro_batch": 2.0, "step": 2.333}}
    assert ratios(ours | {"seconds": 0.0}, theirs, 8) == {"ours_over_reference": {"step": 7.0}}
    assert ratios({"left_out": "out of memory"}, theirs, 8) == ratios(ours, {"left_out": "no"}, 8) == {}


def test_all_of_it_at_a_tiny_size() -> None:
    command = [sys.executable, str(ROOT / "tools/bench_gpu.py"), "--smoke", "--rounds", "1", "--micro-batches", "2"]
    command += ["--lengths", "32", "--choices", "expert_weight_gradient"]
    environment = os.environ | {"MEGATRON_RL_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = forked.run(command, timeout=800, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    rows = [(row["length"], row["recompute"]) for row in found["training"]]
    assert rows == [(length, how) for length in (32, 128) for how in ("none", "full")]
    # Seconds of a micro-batch are a difference of two times, of either sign where little is computed.
    assert math.isfinite(found["without_head"]["seconds"])
    assert math.isfinite(found["choices"]["expert_weight_gradient = torch"]["seconds"])
    assert (
        "set model.expert_weight_gradient = 'torch'" in found["choices"]["expert_weight_gradient = quack"]["left_out"]
    )
    reference, ours = found["reference"], found["training"][2]
    assert reference["class"] == "Qwen2MoeForCausalLM"
    assert reference["parameters"] == found["parameters"] + found["layers"] * 64
    told = reference["ours_over_reference"]
    assert ("micro_batch" in told) == (ours["seconds"] > 0)
    if ours["seconds"] > 0:
        assert told["micro_batch"] == pytest.approx(reference["seconds"] / ours["seconds"], abs=1e-3)


def test_names_that_are_not_known_are_refused() -> None:
    assert names_in(CHOICES)("attention,experts,") == ["attention", "experts"]
    with pytest.raises(ArgumentTypeError, match="'layers' is none of experts, attention, expert_weight_gradient"):
        names_in(CHOICES)("attention,layers")
