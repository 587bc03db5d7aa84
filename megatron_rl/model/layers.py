"""This module holds layers from plain torch for the layer spec: RMSNorm under sequence parallelism, attention over
packed sequences.

Legend: T packed tokens of this rank, C context-parallel ranks, Nq query heads, Nk key-value heads (per tensor-parallel
rank), D head_dim, b rows of a bucket, Lq queries and Lk keys of a row.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.device import compiled, import_megatron
from megatron_rl.model import kernels
from megatron_rl.model.packing import PackedSequences

import_megatron()

from megatron.core.parallel_state import get_tensor_model_parallel_rank  # noqa: E402
from megatron.core.tensor_parallel.mappings import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)


class RMSNorm(torch.nn.Module):
    """Computes the root-mean-square norm with the variance in fp32 (fp64 for fp64 input). On CUDA torch's kernel itself
    sums in fp32, and rounds once, after the weight.

    Its weight is marked for sequence parallelism, where each rank sees a part of the tokens and megatron sums the
    gradients; megatron's own torch norm refuses that.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.is_cuda or hidden.dtype in (torch.float32, torch.float64):
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        normed = F.rms_norm(hidden.float(), self.weight.shape, None, self.eps)
        return self.weight * normed.to(hidden.dtype)


class OutputNorm(RMSNorm):
    """Computes the norm of what attention or an MLP gives.

    Its weight has the place of Megatron's norm of what they read, which here passes everything through.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden

    def add(self, output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        """Take the place of what Megatron adds up with. There is neither bias nor dropout."""
        assert output[1] is None and not dropout
        return residual + super().forward(output[0])


class JoinedHeadsNorm(RMSNorm):
    """Computes the norm of all heads of a token, [..., N, D], as if they were one vector.

    num_heads: of the model. A tensor-parallel rank has N of them, in the order of the ranks, or shares one with ranks
    beside it. The ranks add up their squares in the forward pass, and the gradients of the sum in the backward pass.
    Each rank holds the weights of all heads. Megatron adds up their gradients over the ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, *, num_heads: int) -> None:
        super().__init__(config, num_heads * hidden_size, eps)
        self.num_heads, self.num_ranks = num_heads, config.tensor_model_parallel_size

    def forward(self, heads: Tensor) -> Tensor:
        joined = heads.flatten(-2)
        normed = super().forward(joined) if self.num_ranks == 1 else self._over_ranks(joined)
        return normed.unflatten(-1, heads.shape[-2:])

    def _over_ranks(self, joined: Tensor) -> Tensor:
        wide = joined if joined.dtype == torch.float64 else joined.float()
        squares = reduce_from_tensor_model_parallel_region(wide.square().mean(-1, keepdim=True))
        mean = copy_to_tensor_model_parallel_region(squares) / self.num_ranks
        first = get_tensor_model_parallel_rank() * self.num_heads // self.num_ranks
        weight = self.weight.unflatten(0, (self.num_heads, -1))[first:].flatten()[: joined.shape[-1]]
        return weight * (wide * torch.rsqrt(mean + self.eps)).to(joined.dtype)


class PackedAttention(torch.nn.Module):
    """Computes causal grouped-query attention inside each packed sequence, by torch's scaled_dot_product_attention.

    Rotary embedding is applied here and the model is built with `position_embedding_type="none"`: megatron's own rotary
    for packed sequences loops over them in Python, and takes a table as long as the pack for a different layout.

    Under context parallelism a rank holds two chunks of every sequence (see model/zigzag.py). It attends with its own
    queries to the keys and values of all ranks; backward, their gradients are summed and go back to where they came
    from.
    """

    def __init__(
        self, config: Any, *_: Any, softmax_scale: float | None = None, pg_collection: Any = None, **__: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any, **__: Any) -> Tensor:
        """Rotate and attend: query [T, Nq, D], key and value [T, Nk, D] -> [T, Nq * D]."""
        packed: PackedSequences = packed_seq_params
        assert packed.cos is not None and packed.sin is not None
        query, key = _rotate_both(query, key, packed.cos, packed.sin)
        if self.context_group.size() > 1:
            joined = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=self.context_group)
            key, value = joined.chunk(2, dim=-1)  # [C * T, Nk, D]
        return self.attend(query, key, value, packed)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Attend within each sequence: query [T, Nq, D], key and value [C * T, Nk, D], both rotated -> [T, Nq * D]."""
        assert packed.restore is not None
        outputs = []
        for bucket in packed.buckets:
            q, k, v = _rows(query, bucket.queries), _rows(key, bucket.keys), _rows(value, bucket.keys)
            attended = F.scaled_dot_product_attention(
                q,
                k,
                v,
                **_causal(q.shape[2], k.shape[2]),
                scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, packed.restore)


class FlashAttention(PackedAttention):
    """Computes the same by torch's variable-length flash attention, which takes the sequences end to end, without
    padding. It needs CUDA and half precision, and has no context parallelism.

    kernel: called as `torch.nn.attention.varlen.varlen_attn`, which it is where this is None.
    """

    kernel: Callable[..., Tensor] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        starts, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        kernel, asks_for_groups = _variable_length_attention()
        groups = {"enable_gqa": query.shape[1] != key.shape[1]} if asks_for_groups else {}
        causal = (-1, 0)
        attended = (self.kernel or kernel)(
            query,
            key,
            value.contiguous(),  # kept for backward as a view, it would keep all of the joint projection
            starts,
            starts,
            longest,
            longest,
            scale=self.softmax_scale,
            window_size=causal,
            **groups,
        )
        return attended.flatten(1)


class FlashAttention4(PackedAttention):
    """Computes the same attention by FlashAttention 4, of the package flash-attn-4.

    It is called directly: torch's own adapter (`activate_flash_attention_impl`) changes every attention of the process,
    and that of torch 2.11 refuses the backward pass of packed sequences.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernel = kernels.flash_attention_4()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        starts, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        attended, _ = self.kernel(
            query,
            key,
            value.contiguous(),  # as above
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=self.softmax_scale,
            causal=True,
        )
        return attended.flatten(1)


# The functions below import torch.nn.attention themselves: it imports torch._dynamo, which takes 0.6 s.


def _causal(num_queries: int, num_keys: int) -> dict[str, Any]:
    """Return the arguments that tell scaled_dot_product_attention that the last query sees all keys, the one before it
    all but the last, and so on."""
    if num_queries == num_keys:
        return {"is_causal": True}
    from torch.nn.attention.bias import causal_lower_right

    return {"attn_mask": causal_lower_right(num_queries, num_keys)}


@functools.cache
def _variable_length_attention() -> tuple[Callable[..., Tensor], bool]:
    """Return torch's kernel, and whether it must be asked for groups of heads, as from torch 2.12 on. Earlier versions
    hand any heads to the same kernel, which takes groups of them."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather the rows of a bucket: x [tokens, N, D], index [b, L] -> [b, N, L, D]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


@compiled
def _rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(query, cos, sin), rotate(key, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding with rotate-half (neox) pairing: x [T, N, D], cos and sin [T, 1, R]. The first R elements
    of each head are rotated."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
