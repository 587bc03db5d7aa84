"""Grouped experts against the same experts one by one, and how their tokens and weights are laid out."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.model.experts import GroupedExperts, Weights, distance, rows_of

WIDTH, HIDDEN = 8, 16


@st.composite
def choices(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """A number of experts, and for each of some tokens as many of them, each another."""
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


def holding(weight: torch.nn.Parameter) -> torch.nn.Module:
    """As far as grouped experts look at megatron's."""
    module = torch.nn.Module()
    module.weight = weight
    return module


def parameters_in(buffer: str, count: int, dtype: torch.dtype) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """(up, down) of each expert, in one buffer as megatron's with the last one first, or otherwise."""
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
    )
    module._weights = partial(GroupedExperts._weights, module)
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
        module = SimpleNamespace(num_local_experts=4, linears=[*map(holding, parameters)], weights=None, ready=ready)
        module._weights = partial(GroupedExperts._weights, module)
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
