"""Tests attention over packed sequences, by buckets and by flash attention's kernels, against the formula."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import kernel_stand_ins
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.families import Rotary
from megatron_rl.model import kernels, layers
from megatron_rl.model.layers import FlashAttention, FlashAttention4, PackedAttention
from megatron_rl.model.packing import pack
from megatron_rl.rotary import frequencies

LENGTHS, HEADS, GROUPS, DIM = [7, 1, 12, 4], 4, 2, 8


def plain(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, longest: int, longest_k: int, **options: Any
) -> Tensor:
    """Compute what torch's `varlen_attn` computes, one sequence at a time. Refuse what it refuses."""
    assert starts.dtype == torch.int32
    assert starts is starts_k
    assert longest == longest_k == max(LENGTHS)
    assert options.pop("window_size") == (-1, 0)
    scale = options.pop("scale")
    assert options == ({"enable_gqa": True} if layers._variable_length_attention()[1] else {})
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outputs = []
    for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        scores = torch.einsum("qnd,knd->nqk", q[a:b], k[a:b]) * (scale or q.shape[2] ** -0.5)
        seen = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        outputs.append(torch.einsum("nqk,knd->qnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[a:b]))
    return torch.cat(outputs)


@pytest.mark.parametrize("asks_for_groups", [True, False])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_flash_attention_and_buckets_are_the_same(
    scale: float | None, asks_for_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_variable_length_attention", lambda: (plain, asks_for_groups))
    torch.manual_seed(0)
    packed = pack(LENGTHS, frequencies(Rotary(), DIM), torch.float64, torch.device("cpu"))
    inputs = [torch.randn(24, n, DIM, dtype=torch.float64, requires_grad=True) for n in (HEADS, GROUPS, GROUPS)]
    upstream = torch.randn(24, HEADS * DIM, dtype=torch.float64)
    found = []
    for kind in (PackedAttention, FlashAttention):
        group = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
        attention = kind(None, softmax_scale=scale, pg_collection=group)
        attention.kernel = plain
        output = attention(*inputs, packed_seq_params=packed)
        found.append([output, *torch.autograd.grad(output, inputs, upstream)])
    for buckets, flash in zip(*found, strict=True):
        torch.testing.assert_close(flash, buckets, rtol=1e-10, atol=1e-12)


def test_torchs_kernel_takes_what_it_is_given() -> None:
    """Check the kernel's signature and the shape of its output. Its values need a GPU."""
    packed = pack(LENGTHS, frequencies(Rotary(), DIM), torch.bfloat16, torch.device("meta"))
    q, k, v = (torch.empty(24, n, DIM, dtype=torch.bfloat16, device="meta") for n in (HEADS, GROUPS, GROUPS))
    attention = FlashAttention(None, pg_collection=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1)))
    assert attention(q, k, v, packed_seq_params=packed).shape == (24, HEADS * DIM)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=5),
    groups=st.integers(1, 2),
    heads_of_group=st.integers(1, 3),
    dim=st.sampled_from([8, 24]),
    scale=st.sampled_from([None, 0.2]),
)
def test_flash_attention_4_is_given_what_buckets_compute(
    lengths: list[int], groups: int, heads_of_group: int, dim: int, scale: float | None
) -> None:
    """Compare output and gradients in bf16 with those of the buckets in fp64."""
    torch.manual_seed(0)
    total, heads = sum(lengths), groups * heads_of_group
    inputs = [torch.randn(total, n, dim).bfloat16().requires_grad_() for n in (heads, groups, groups)]
    upstream = torch.randn(total, heads * dim).bfloat16()
    group = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for name, module in kernel_stand_ins.modules().items():
            patch.setitem(sys.modules, name, module)
        for kind, dtype in ((PackedAttention, torch.float64), (FlashAttention4, torch.bfloat16)):
            attention = kind(None, softmax_scale=scale, pg_collection=group)
            packed = pack(lengths, frequencies(Rotary(), dim), dtype, torch.device("cpu"))
            leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
            output = attention(*leaves, packed_seq_params=packed)
            assert output.dtype == dtype
            found.append([output, *torch.autograd.grad(output, leaves, upstream.to(dtype))])
    for exact, ours in zip(*found, strict=True):
        assert float((ours.double() - exact).detach().norm() / exact.detach().norm().clamp(min=1e-3)) < 0.02


@pytest.mark.parametrize("kind", [FlashAttention, FlashAttention4])
def test_values_are_kept_alone(kind: type[PackedAttention], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that values are copied for backward. They are a part of the joint projection, which would be kept with
    them."""
    for name, module in kernel_stand_ins.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    packed = pack(LENGTHS, frequencies(Rotary(), DIM), torch.float64, torch.device("cpu"))
    joint = torch.randn(24, GROUPS, (HEADS // GROUPS + 2) * DIM, dtype=torch.float64)
    q, k, v = joint.split([HEADS // GROUPS * DIM, DIM, DIM], dim=-1)
    attention = kind(None, pg_collection=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1)))
    given: list[Tensor] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        given.extend((query, key, value))
        return query if kind is FlashAttention else (query, None)

    attention.kernel = kernel
    attention(q.reshape(24, HEADS, DIM), k, v, packed_seq_params=packed)
    assert len(given) == 3
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in given)


def test_a_kernel_that_cannot_be_imported_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    with pytest.raises(ValueError, match=r"'fa4' needs flash_attn_varlen_func.*pip install flash-attn-4.*'auto'"):
        FlashAttention4(None, pg_collection=SimpleNamespace(cp=None))
    for broken in (None, ModuleType("quack.gemm_interface")):  # not there, or another project's of that name
        monkeypatch.setitem(sys.modules, "quack.gemm_interface", broken)
        with pytest.raises(ValueError, match=r"'quack' needs gemm_add_inplace.*set model.expert_weight_gradient = 't"):
            kernels.quack_add_product()
