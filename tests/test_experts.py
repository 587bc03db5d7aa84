"""Grouped experts against the same experts one by one, and how their tokens and weights are laid out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.model.experts import GroupedExperts, _stacked, padded_rows

WIDTH, HIDDEN = 8, 16


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    multiple=st.sampled_from([1, 4, 8]),
    reverse=st.booleans(),
)
def test_every_expert_has_whole_rows_and_every_token_a_row_of_its_expert(
    counts: list[int], multiple: int, reverse: bool
) -> None:
    rows, ends = padded_rows(torch.tensor(counts), sum(counts), multiple, reverse)
    sizes = [-(-count // multiple) * multiple for count in counts]
    order = range(len(counts))[::-1] if reverse else range(len(counts))
    expected: dict[int, list[int]] = {}
    first = 0
    for position, expert in enumerate(order):
        expected[expert] = list(range(first, first + counts[expert]))
        first += sizes[expert]
        assert int(ends[position]) == first
    assert rows.tolist() == [row for expert in range(len(counts)) for row in expected[expert]]


def parameters_in(buffer: str, count: int, dtype: torch.dtype) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """(up, down) of each expert: apart, or in one buffer as megatron's, the last one first, or the first one first."""
    shapes = [(2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)] * count
    whole = torch.randn(sum(a * b for a, b in shapes), dtype=dtype)
    parts, end = [], len(whole)
    for a, b in shapes:
        parts.append(whole[end - a * b : end].view(a, b))
        end -= a * b
    if buffer == "first one first":
        parts, start = [], 0
        for a, b in shapes:
            parts.append(whole[start : start + a * b].view(a, b))
            start += a * b
    if buffer == "apart":
        parts = [part.clone() for part in parts]
    found = [torch.nn.Parameter(part) for part in parts]
    return list(zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize("buffer", ["apart", "last one first", "first one first"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_grouped_experts_compute_and_learn_what_single_ones_do(
    buffer: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 1, 9])
    experts = parameters_in(buffer, 4, dtype)
    hidden = torch.randn(15, HIDDEN, dtype=dtype, requires_grad=True)
    probs = torch.rand(15, requires_grad=True)
    gradient = torch.randn(15, HIDDEN, dtype=dtype)
    leaves = [hidden, probs, *(weight for pair in experts for weight in pair)]

    module = SimpleNamespace(
        num_local_experts=4,
        local_experts=[
            SimpleNamespace(linear_fc1=SimpleNamespace(weight=up), linear_fc2=SimpleNamespace(weight=down))
            for up, down in experts
        ],
    )
    output, bias = GroupedExperts.forward(module, hidden, counts, probs)
    assert bias is None
    found = [output, *torch.autograd.grad(output, leaves, gradient)]

    outputs = []
    for (up, down), x, p in zip(experts, hidden.split(counts.tolist()), probs.split(counts.tolist()), strict=True):
        gate, linear = (x @ up.T).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * linear * p[:, None]).to(dtype) @ down.T)
    alone = torch.cat(outputs)
    expected = [alone, *torch.autograd.grad(alone, leaves, gradient)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_weights_in_one_buffer_are_not_copied() -> None:
    for buffer, reverse in (("last one first", True), ("first one first", False)):
        weights = [up for up, _ in parameters_in(buffer, 4, torch.float32)]
        stacked, is_reversed = _stacked(weights)
        assert is_reversed == reverse
        assert stacked.untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr()
        in_order = stacked.flip(0) if reverse else stacked
        assert torch.equal(in_order, torch.stack(weights))
    apart = [up for up, _ in parameters_in("apart", 4, torch.float32)]
    stacked, is_reversed = _stacked(apart)
    assert not is_reversed
    assert torch.equal(stacked, torch.stack(apart))
