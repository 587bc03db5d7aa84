"""The arithmetic of tools/bench_gpu.py: FLOPs by hand, the layers that fit, and which part an operation belongs to."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from megatron_rl.config.bailing import read_bailing_config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from mfu import layers_that_fit, model_flops, nominal_peak  # noqa: E402
from profile_parts import assign, mark_modules, marked  # noqa: E402


def test_flops_of_ling_lite_by_hand() -> None:
    shape = read_bailing_config(ROOT / "examples/ring_lite/ling_lite_1_5/config.json")
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
    """x x^T x, of two products, and as many in backward."""

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
