"""Tests grouped experts against the same experts one by one, and the layout of their tokens and weights."""

import doctest
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_stand_ins import gemm_add_inplace
from torch import Tensor

from megatron_rl.model import experts as module_of_experts
from megatron_rl.model.experts import GroupedExperts, Weights, distance, rows_of

WIDTH, HIDDEN = 8, 16


@st.composite
def choices(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Draw a number of experts and, for each of some tokens, an equal number of different experts."""
    num_experts = draw(st.integers(1, 8))
    num_choices = draw(st.integers(1, num_experts))
    some = st.permutations(range(num_experts)).map(lambda order: order[:num_choices])
    return num_experts, draw(st.lists(some, min_size=1, max_size=30))


@given(chosen=choices(), multiple=st.sampled_from([1, 4, 8]), reverse=st.booleans())
def test_every_expert_has_whole_rows_and_every_choice_a_row_of_its_expert(
    chosen: tuple[int, list[list[int]]], multiple: int, reverse: bool
) -> None:
    num_experts, expert_of = chosen
    rows = rows_of(torch.tensor(expert_of), num_experts, multiple, reverse)
    first = 0
    for position, expert in enumerate(range(num_experts)[::-1] if reverse else range(num_experts)):
        tokens = [token for token, experts in enumerate(expert_of) if expert in experts]
        for row, token in enumerate(tokens, first):
            assert int(rows.of_choice[token, expert_of[token].index(expert)]) == row
            assert int(rows.token[row]) == token
        first += max(1, -(-len(tokens) // multiple)) * multiple
        assert int(rows.ends[position]) == first
    assert first <= len(rows.token)
    assert 0 <= int(rows.token.min()) <= int(rows.token.max()) < len(expert_of)


def test_the_worked_examples_of_four_tokens_and_two_experts_are_true() -> None:
    found = doctest.testmod(module_of_experts)
    assert found.attempted >= 12
    assert found.failed == 0


def holding(weight: torch.nn.Parameter) -> torch.nn.Module:
    """Return a module with this weight: grouped experts use no more of megatron's linear layers."""
    module = torch.nn.Module()
    module.weight = weight
    return module


def parameters_in(buffer: str, count: int, dtype: torch.dtype) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Return (up, down) of each expert. By default they lie in one buffer as megatron's do, with the last one first."""
    shapes = [(2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)] * count
    order = range(len(shapes)) if buffer == "first one first" else range(len(shapes))[::-1]
    whole = torch.randn(sum(a * b for a, b in shapes) + 64, dtype=dtype)
    parts, start = {}, 0
    for i in order:
        a, b = shapes[i]
        # A bucket ends behind the last expert's "down": between all "up"s lies as much as ever.
        start += 64 if buffer == "uneven" and i == len(shapes) - 2 else 0
        parts[i] = whole[start : start + a * b].view(a, b)
        start += a * b
    found = [torch.nn.Parameter(parts[i].clone() if buffer == "apart" else parts[i]) for i in range(len(shapes))]
    return list(zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize("buffer", ["apart", "last one first", "first one first", "uneven"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("sorted_by_expert", [True, False], ids=["sorted", "with the numbers of their experts"])
def test_grouped_experts_compute_and_learn_what_single_ones_do(
    sorted_by_expert: bool, buffer: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    experts = parameters_in(buffer, 4, dtype)
    if sorted_by_expert:
        counts = torch.tensor([5, 0, 1, 9])
        expert_of = torch.repeat_interleave(torch.arange(4), counts)[:, None]
    else:
        counts = expert_of = torch.tensor([[0, 3], [3, 0], [0, 2], [3, 0], [0, 3], [0, 3], [3, 0]])
    shape = (15,) if sorted_by_expert else (7, 2)
    hidden = torch.randn(shape[0], HIDDEN, dtype=dtype, requires_grad=True)
    probs = torch.rand(shape, requires_grad=True)
    gradient = torch.randn(shape[0], HIDDEN, dtype=dtype)
    leaves = [hidden, probs, *(weight for pair in experts for weight in pair)]

    module = SimpleNamespace(
        num_local_experts=4,
        linears=[holding(weight) for pair in experts for weight in pair],
        weights=None,
        ready=None,
        add_product=None,
    )
    module._weights = partial(GroupedExperts._weights, module)
    module._products = partial(GroupedExperts._products, module)
    output, bias = GroupedExperts.forward(module, hidden, counts, probs)
    assert bias is None
    found = [output, *torch.autograd.grad(output, leaves, gradient)]

    sums = [torch.zeros(HIDDEN) for _ in hidden]
    for token, (numbers, chances) in enumerate(zip(expert_of.tolist(), probs.view(expert_of.shape), strict=True)):
        for number, chance in zip(numbers, chances, strict=True):
            up, down = experts[number]
            gate, linear = (hidden[token] @ up.T).chunk(2, dim=-1)
            sums[token] = sums[token] + (F.silu(gate) * linear * chance).to(dtype) @ down.T
    alone = torch.stack(sums).to(dtype)
    gradients = torch.autograd.grad(alone, leaves, gradient, allow_unused=True)
    expected = [alone, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max()))


def grouped(parameters: list[torch.nn.Parameter], ready: Any, add_product: Any) -> SimpleNamespace:
    """Stand in for GroupedExperts of these weights, as far as its methods look."""
    module = SimpleNamespace(num_local_experts=len(parameters) // 2, linears=[*map(holding, parameters)])
    module.weights, module.ready, module.add_product = None, ready, add_product
    module._weights = partial(GroupedExperts._weights, module)
    module._products = partial(GroupedExperts._products, module)
    return module


def test_gradients_of_all_experts_are_added_to_megatrons_at_once() -> None:
    torch.manual_seed(0)
    hidden, probs = torch.randn(6, HIDDEN), torch.rand(6, 2)
    expert_of = torch.tensor([[0, 3], [3, 0], [0, 2], [3, 0], [1, 3], [0, 3]])
    alone, weights, mains = (
        [x for pair in parameters_in("last one first", 4, torch.float32) for x in pair] for _ in range(3)
    )
    start = [main.detach().clone() for main in mains]
    for weight, same, main in zip(weights, alone, mains, strict=True):
        weight.data.copy_(same)
        weight.main_grad = main.detach()
    told: list[Tensor] = []
    for parameters, ready in ((alone, None), (weights, told.append)):
        module = grouped(parameters, ready, None)
        for _ in range(2):  # two micro-batches
            GroupedExperts.forward(module, hidden, expert_of, probs)[0].square().sum().backward()
    for weight, before, same in zip(weights, start, alone, strict=True):
        torch.testing.assert_close(weight.main_grad, before + same.grad)
    # The last expert's come first: autograd knows these, and megatron's hook is called by itself.
    *others, up, down = weights
    assert up.grad_added_to_main_grad
    assert down.grad_added_to_main_grad
    assert all(weight.grad is None for weight in others)
    assert sorted(map(id, told)) == sorted([*map(id, others)] * 2)


@pytest.mark.parametrize(
    ("buffer", "signs", "copied"),
    [
        ("last one first", (-1, -1), (False, False)),
        ("first one first", (1, 1), (False, False)),
        ("uneven", (-1, 0), (False, True)),
        ("apart", (0, 0), (True, True)),
    ],
)
def test_weights_that_lie_evenly_in_one_buffer_are_not_copied(
    buffer: str, signs: tuple[int, int], copied: tuple[bool, bool]
) -> None:
    size = 3 * WIDTH * HIDDEN  # of an expert, gate, up and down
    for weights, sign, is_copied in zip(
        zip(*parameters_in(buffer, 4, torch.float32), strict=True), signs, copied, strict=True
    ):
        assert distance(weights) == sign * size
        reverse = signs[0] < 0
        found = Weights(weights, reverse).stacked()
        assert torch.equal(found.flip(0) if reverse else found, torch.stack(weights))
        assert (found.untyped_storage().data_ptr() != weights[0].untyped_storage().data_ptr()) == is_copied


@given(
    chosen=choices(),
    buffer=st.sampled_from(["last one first", "first one first"]),
    apart=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=30)
def test_gradients_added_up_in_the_product_are_those_of_single_experts(
    chosen: tuple[int, list[list[int]]], buffer: str, apart: bool, seed: int
) -> None:
    """Check each expert's gradient of two micro-batches by quack's product from bf16 to fp32.

    The formula in fp64 is the measure, as far as activations rounded to bf16 allow. apart: weights do not lie in one
    buffer, as without the distributed optimizer.
    """
    torch.manual_seed(seed)
    num_experts, expert_of = max(2, chosen[0]), torch.tensor(chosen[1])
    laid_out = "apart" if apart else buffer
    weights = [x for pair in parameters_in(laid_out, num_experts, torch.bfloat16) for x in pair]
    mains = [x.detach().float() for pair in parameters_in(buffer, num_experts, torch.float32) for x in pair]
    for weight, main in zip(weights, in_one_buffer(mains, buffer), strict=True):
        weight.main_grad = main
    before = [weight.main_grad.clone() for weight in weights]
    told: list[Tensor] = []
    module = grouped(weights, told.append, gemm_add_inplace)
    hidden = torch.randn(len(expert_of), HIDDEN).bfloat16().requires_grad_()
    probs = torch.rand(expert_of.shape)
    upstream = torch.randn(len(expert_of), HIDDEN).bfloat16()
    for _ in range(2):
        GroupedExperts.forward(module, hidden, expert_of, probs)[0].backward(upstream)

    exact = [weight.detach().double().requires_grad_() for weight in weights]
    x = hidden.detach().double().requires_grad_()
    output = torch.zeros_like(x)
    for token, numbers in enumerate(expert_of.tolist()):
        for place, number in enumerate(numbers):
            gate, up = (x[token] @ exact[2 * number].T).chunk(2)
            output[token] += (F.silu(gate) * up * probs[token, place]) @ exact[2 * number + 1].T
    gradients = torch.autograd.grad(output, [x, *exact], upstream.double(), allow_unused=True)
    scale = max(float(g.abs().max()) for g in gradients if g is not None)
    assert float((hidden.grad.double() - 2 * gradients[0]).abs().max()) < 0.05 * scale
    for weight, start, gradient in zip(weights, before, gradients[1:], strict=True):
        added = (weight.main_grad - start).double()
        expected = torch.zeros_like(added) if gradient is None else 2 * gradient
        assert float((added - expected).abs().max()) < 0.05 * scale
        assert weight.grad is None or weight.grad_added_to_main_grad
    assert sum(getattr(weight, "grad_added_to_main_grad", False) for weight in weights) == 2
    assert len(told) == 2 * (len(weights) - 2)


def in_one_buffer(tensors: list[Tensor], buffer: str) -> list[Tensor]:
    """Return the same values in one buffer, laid out as `parameters_in` lays out parameters."""
    order = tensors if buffer == "first one first" else tensors[::-1]
    pieces = torch.cat([x.flatten() for x in order]).split([x.numel() for x in order])
    placed = [piece.view(x.shape) for piece, x in zip(pieces, order, strict=True)]
    return placed if buffer == "first one first" else placed[::-1]


def test_a_gradient_added_up_in_the_product_is_not_rounded_to_bf16() -> None:
    """Check that the product adds in fp32: bf16 would round 1,000 + 0.5 to 1,000."""
    weights = [x for pair in parameters_in("first one first", 2, torch.bfloat16) for x in pair]
    for weight, main in zip(
        weights, in_one_buffer([torch.zeros(w.shape) for w in weights], "first one first"), strict=True
    ):
        weight.main_grad = main
    ups = weights[::2]
    found = {}
    for name, kernel in {"torch": None, "quack": gemm_add_inplace}.items():
        for weight in ups:
            weight.main_grad.zero_()
        x = torch.zeros(16, HIDDEN, dtype=torch.bfloat16)
        x[0, 0], x[1, 0] = 1000.0, 0.5
        x.requires_grad_()
        ends = torch.tensor([8, 16], dtype=torch.int32)
        product = Weights(ups, False, lambda _: None, kernel).product(x, ends)
        product.backward(torch.ones_like(product))
        found[name] = float(ups[0].main_grad[0, 0])
    assert found == {"torch": 1000.0, "quack": 1000.5}


def test_gradients_apart_are_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    weights = [x for pair in parameters_in("last one first", 2, torch.bfloat16) for x in pair]
    for weight in weights:
        weight.main_grad = torch.zeros(weight.shape)
    module = grouped(weights, lambda _: None, gemm_add_inplace)
    hidden = torch.randn(3, HIDDEN).bfloat16()
    GroupedExperts.forward(module, hidden, torch.tensor([[0], [1], [0]]), torch.rand(3, 1))[0].sum().backward()
    assert all(weight.grad is not None and float(weight.grad.abs().max()) > 0 for weight in weights)
    assert all(float(weight.main_grad.abs().max()) == 0 for weight in weights)
    assert "leaves a layer to torch" in caplog.text
