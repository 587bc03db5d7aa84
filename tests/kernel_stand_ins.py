"""Replaces GPU kernels on a CPU, for tests.

The signatures are those of flash-attn-4 4.0.0b36 and quack-kernels 0.6.5, as far as tests need them. Values are
computed by the formula in fp32. These refuse what the real ones refuse, which was read in their sources.

The real ones want a GPU. Of what they return only what is asked for is there.
"""

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ALIGNED_BYTES = 16


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Compute FlashAttention 4 of packed sequences as on Hopper."""
    assert not others
    assert qv is seqused_q is seqused_k is gather_kv_indices is page_table is min_seqlen_k is None
    assert window_size == (None, None)
    assert causal
    (num_tokens, heads, width), groups = q.shape, k.shape[1]
    assert k.shape == v.shape == (num_tokens, groups, width)
    assert heads % groups == 0
    assert 8 <= width <= 256
    assert width % (ALIGNED_BYTES // q.element_size()) == 0
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype
    for starts in (cu_seqlens_q, cu_seqlens_k):
        assert starts is not None
        assert starts.dtype == torch.int32
        assert starts.stride(0) == 1
    starts = cu_seqlens_q.tolist()
    assert starts == cu_seqlens_k.tolist()
    assert starts[-1] == num_tokens
    lengths = [b - a for a, b in pairwise(starts)]
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    outputs = []
    for queries, keys, values in zip(*(x.float().split(lengths) for x in (q, k, v)), strict=True):
        keys, values = (x.repeat_interleave(heads // groups, dim=1) for x in (keys, values))
        scores = torch.einsum("qnd,knd->nqk", queries, keys) * scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        outputs.append(torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outputs).to(q.dtype), q.new_full((heads, num_tokens), torch.nan, dtype=torch.float32)


def gemm_add_inplace(
    A: Tensor,
    B: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None,
    batch_idx_permute: Tensor | None = None,
    dynamic_scheduler: bool = False,
    tuned: bool = True,
    **others: Any,
) -> None:
    """Add quack's product of each group to out [L, M, N]. A is [M, total_K] and B is [total_K, N]."""
    assert not others
    assert bias is cu_seqlens_m is A_idx is batch_idx_permute is None
    assert (alpha, beta, dynamic_scheduler, tuned) == (1.0, 1.0, False, False)
    assert cu_seqlens_k is not None
    assert cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_k.is_contiguous()
    (m, total), n, groups = A.shape, B.shape[1], len(cu_seqlens_k) - 1
    assert B.shape[0] == total
    assert out.shape == (groups, m, n)
    assert A.dtype == B.dtype == torch.bfloat16
    assert out.dtype == torch.float32
    assert A.stride(-2) == 1, "varlen_k requires A to be m-major"
    assert B.stride(-1) == 1, "varlen_k requires B to be n-major"
    assert out.stride(-1) == 1
    for x in (A, B, out):
        assert x.data_ptr() % ALIGNED_BYTES == 0
        assert all(stride == 1 or stride * x.element_size() % ALIGNED_BYTES == 0 for stride in x.stride())
    for number, (a, b) in enumerate(pairwise(cu_seqlens_k.tolist())):
        assert 0 <= a <= b <= total
        out[number] += A[:, a:b].float() @ B[a:b].float()


def install() -> None:
    """Put these modules into sys.modules, so that imports find them."""
    sys.modules.update(modules())


def modules() -> dict[str, ModuleType]:
    """Return the stand-in modules by their names in sys.modules."""
    found = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "quack", "quack.gemm_interface")}
    found["flash_attn.cute"].flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    found["quack.gemm_interface"].gemm_add_inplace = gemm_add_inplace  # type: ignore[attr-defined]
    return found
