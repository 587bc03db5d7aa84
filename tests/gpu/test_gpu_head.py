"""Tests the fused head on the device against the formula in fp64."""

import pytest
import torch
from test_logprobs import M, furthest, fused, make_inputs, plain

from megatron_rl import device

# Tolerances are relative to the largest value of each tensor. fp32: 24 products of 24 bits each. bf16: operands and
# gradients are rounded to 8 bits, 2^-9 = 2e-3, and the gradient of the logits once more before two products.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk_tokens", [7, M])
def test_values_and_gradients_are_those_of_the_formula(dtype: torch.dtype, chunk_tokens: int) -> None:
    hidden, weight, targets, upstream = (x.detach().to(device.torch_device()) for x in make_inputs(dtype))
    inputs = hidden.requires_grad_(), weight.requires_grad_(), targets, upstream
    found = fused(*inputs, chunk_tokens=chunk_tokens)
    assert furthest(found, plain(*inputs)) < TOLERANCE[dtype]
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, dtype]
