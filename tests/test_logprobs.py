"""Tests the fused head against the formula in plain fp64 torch: values and both gradients."""

from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_rl.model import logprobs
from megatron_rl.model.logprobs import CHUNK_BYTES, logprobs_and_entropy

M, V, H = 53, 97, 24


def make_inputs(dtype: torch.dtype = torch.float64, rows: int = V) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden [M, H], weight [rows, H], targets [M], and upstream gradients of both outputs [2, M]."""
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(M, H, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.randn(rows, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (M,), generator=generator)
    upstream = torch.randn(2, M, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, upstream


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, temperature: float = 1.0
) -> tuple[Tensor, ...]:
    """Return log p(y), H, and the gradients of u1 . log p + u2 . H for hidden and weight, in fp64 by autograd."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logp = torch.log_softmax(hidden @ weight[:V].T / temperature, dim=-1)
    chosen, entropy = logp[range(M), targets], -(logp.exp() * logp).sum(-1)
    gradients = torch.autograd.grad((upstream[0] * chosen + upstream[1] * entropy).sum(), [hidden, weight])
    return chosen.detach(), entropy.detach(), *gradients


def fused(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, **options: object) -> tuple[Tensor, ...]:
    chosen, entropy = logprobs_and_entropy(hidden, weight, targets, V, **options)
    gradients = torch.autograd.grad((upstream[0] * chosen + upstream[1] * entropy).sum(), [hidden, weight])
    return chosen.detach(), entropy.detach(), *gradients


def furthest(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest difference, relative to the largest value of its tensor."""
    return max(
        float((f.double() - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_values_and_gradients_are_those_of_the_formula(temperature: float) -> None:
    inputs = make_inputs()
    found = fused(*inputs, temperature=temperature)
    assert furthest(found, plain(*inputs, temperature=temperature)) < 1e-13
    assert {x.dtype for x in found} == {torch.float64}


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 26, 52, 53, 1000])
def test_the_chunk_size_changes_rounding_alone(chunk_tokens: int) -> None:
    inputs = make_inputs()
    assert furthest(fused(*inputs, chunk_tokens=chunk_tokens), plain(*inputs)) < 1e-13


@pytest.mark.parametrize("num_rows", [1, 3, 20])
def test_how_many_rows_are_computed_at_once_changes_nothing(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CACHED_BYTES", num_rows * V * 8)
    inputs = make_inputs()
    assert furthest(fused(*inputs, chunk_tokens=20), plain(*inputs)) < 1e-13


def test_torch_makes_one_graph_of_what_a_gpu_computes_at_once() -> None:
    """Check that torch traces these functions as one graph. The compiler behind it needs a GPU and is left out."""
    torch.manual_seed(0)
    z, local = torch.randn(M, V), torch.randint(-5, V + 5, (M,))
    per_token = torch.randn(4, M).unbind()
    for function, *arguments in (
        (partial(logprobs.chunk_sums, scale=0.7), local),
        (partial(logprobs.logit_gradient, scale=0.7, dtype=torch.bfloat16), local, *per_token),
        (partial(logprobs.logit_gradient, scale=1.0, dtype=torch.float32), local, *per_token[:3], None),
    ):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for count in (M, M - 7):  # a second length, as the last chunk may have
            rows = [None if x is None else x[:count] for x in (z, *arguments)]
            torch.testing.assert_close(compiled(*rows), function(*rows))


def test_padded_rows_of_the_vocabulary_have_no_probability_and_no_gradient() -> None:
    hidden, weight, targets, upstream = make_inputs(rows=V + 5)
    with torch.no_grad():
        weight[V:] = 1e3  # would drown everything
    found = fused(hidden, weight, targets, upstream, chunk_tokens=10)
    assert furthest(found, plain(hidden, weight, targets, upstream)) < 1e-13
    assert not found[3][V:].any()


@pytest.mark.parametrize("zero", [0, 1])
def test_either_output_may_go_unused(zero: int) -> None:
    hidden, weight, targets, upstream = make_inputs()
    outputs = logprobs_and_entropy(hidden, weight, targets, V, chunk_tokens=20)
    gradients = torch.autograd.grad((upstream[1 - zero] * outputs[1 - zero]).sum(), [hidden, weight])
    upstream[zero] = 0
    assert furthest(gradients, plain(hidden, weight, targets, upstream)[2:]) < 1e-13


def test_fp32_stays_close_to_fp64() -> None:
    inputs = make_inputs(torch.float32)
    found = fused(*inputs, chunk_tokens=20)
    assert furthest(found, plain(*inputs)) < 1e-5
    assert {x.dtype for x in found} == {torch.float32}


def test_bf16_loses_no_more_than_the_rounding_of_its_gradients() -> None:
    inputs = make_inputs(torch.bfloat16)
    found, expected = fused(*inputs, chunk_tokens=20), plain(*inputs)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert furthest(found[:2], expected[:2]) < 1e-5
    # Half a unit in the last place of bf16: as if the fp64 gradient itself had been rounded.
    assert furthest(found[2:], expected[2:]) < 2**-8


def test_rounded_logits_are_those_of_bf16_and_their_gradient_passes_the_rounding() -> None:
    hidden, weight, targets, upstream = make_inputs(torch.bfloat16)
    outputs = logprobs_and_entropy(hidden, weight, targets, V, temperature=0.7, logit_dtype=torch.bfloat16)
    found = [*outputs, *torch.autograd.grad((upstream * torch.stack(outputs)).sum(), [hidden, weight])]
    logits = (hidden.double() @ weight.double().T).float()
    rounded = logits + (logits.bfloat16().float() - logits).detach()
    logp = (rounded.double() / 0.7).log_softmax(-1)
    expected = [logp[range(len(targets)), targets], -(logp.exp() * logp).sum(-1)]
    expected += torch.autograd.grad((upstream * torch.stack(expected)).sum(), [hidden, weight])
    assert furthest(found[:2], expected[:2]) < 1e-5
    assert furthest(found[2:], expected[2:]) < 2**-8
    assert furthest(logprobs_and_entropy(hidden, weight, targets, V, temperature=0.7), expected[:2]) > 1e-4


def test_extreme_logits_give_finite_numbers() -> None:
    hidden, weight, targets, upstream = make_inputs(torch.float32)
    found = fused((hidden * 1e3).detach().requires_grad_(), weight, targets, upstream)
    assert all(bool(torch.isfinite(x).all()) for x in found)
    assert float(found[0].min()) < -1e3
    assert float(found[1].min()) >= 0


def test_no_tokens_give_zero_gradients_and_not_none() -> None:
    hidden, weight, *_ = make_inputs()
    chosen, entropy = logprobs_and_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.int64), V)
    assert chosen.shape == entropy.shape == (0,)
    gradients = torch.autograd.grad(chosen.sum() + entropy.sum(), [hidden, weight])
    assert [g.shape for g in gradients] == [hidden.shape, weight.shape]
    assert not any(g.any() for g in gradients)


def test_backward_keeps_no_logits() -> None:
    hidden, weight, targets, _ = make_inputs(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logprobs_and_entropy(hidden, weight, targets, V)
    assert sum(x.numel() for x in kept) == hidden.numel() + weight.numel() + 3 * M
    assert CHUNK_BYTES["cpu"] <= 256 * 2**20
