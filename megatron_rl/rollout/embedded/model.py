"""Runs the forward pass of a model in plain torch, over fixed shapes.

Shapes: R rows = B entries x T queries; H hidden; nq, nkv heads; g = nq / nkv; d head_dim; E experts; k experts per
token; W width of an MLP; S slots; n cache blocks in use. A decode step has one entry per slot and T = 1; a prefill
step has one entry per CHUNK prompt tokens, several of which may belong to one prompt (keys are written before any row
attends).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.expert_choice import top_experts
from megatron_rl.families import Architecture
from megatron_rl.rollout.embedded.cache import BLOCK, KVCache
from megatron_rl.rollout.embedded.weights import LayerWeights, ModelWeights
from megatron_rl.rotary import frequencies

# Scores of hidden keys; finite, because exp and log are tens of times slower on infinities.
MASKED = 1e30
SCORE_FLOOR = -80.0  # e^-80 is lost beside the peak's weight of 1
EXPERT_TILES = (4, 8, 16, 32)  # rows an expert's part is filled up to; below 4 libraries take other kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Describes one forward pass. Rows without a token have position 0 and write to the cache's trash block."""

    tokens: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    write_blocks: Tensor  # [R] int64
    write_slots: Tensor  # [R] int64
    entry_slots: Tensor | None  # [B] int64; None: entry i reads slot i
    num_queries: int  # T
    num_blocks: int  # n: covers every position of the batch
    routed: Tensor | None = None  # [R, layers, k] uint8: gets the chosen experts; dense layers are left alone


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """Holds what all layers of one pass use, computed once."""

    offsets: Tensor  # [R]: position within the cache block
    cos: Tensor  # [R, 1, rotated part of d]
    signed_sin: Tensor  # likewise
    hide: Tensor  # [n, B, 1, T, 1, BLOCK], added to scores: 0, or -MASKED for keys after the query
    keep: Tensor  # the same shape, times weights: 1, or 0 for keys after the query


class EmbeddedModel:
    """Holds the network's shape and rotary tables, and runs its forward pass; weights and cache are arguments."""

    def __init__(self, config: Architecture, *, dtype: torch.dtype, context_length: int) -> None:
        self.config = config
        self.dtype = dtype
        self.cos, self.signed_sin = signed_tables(config, context_length)
        self.expert_tile = EXPERT_TILES[0]  # the self-check of invariance.py raises it where it must
        self._buffers: dict[str, Tensor] = {}
        self.block_positions = torch.arange(-(-context_length // BLOCK) * BLOCK).view(-1, 1, 1, 1, 1, BLOCK)

    def hidden(self, weights: ModelWeights, cache: KVCache, batch: Batch) -> Tensor:
        """Return the hidden states after the final norm, [R, H], and write the rows' keys and values into the cache."""
        shared = self._shared(batch)
        eps = self.config.rms_norm_eps
        x = weights.embedding[batch.tokens]
        for index, layer in enumerate(weights.layers):
            record = None if batch.routed is None else batch.routed[:, index]
            if self.config.norms_outputs:
                context = self._attention(layer, x, cache, index, batch, shared)
                x = x + rms_norm(torch.mm(context, layer.dense), layer.input_norm, eps)
                x = x + rms_norm(self._feed_forward(layer, torch.zeros_like(x), x, record), layer.mlp_norm, eps)
                continue
            context = self._attention(layer, rms_norm(x, layer.input_norm, eps), cache, index, batch, shared)
            x = torch.addmm(x, context, layer.dense)
            x = self._feed_forward(layer, x, rms_norm(x, layer.mlp_norm, eps), record)
        return rms_norm(x, weights.final_norm, eps)

    def logits(self, weights: ModelWeights, hidden: Tensor) -> Tensor:
        """Compute the logits: [R, H] -> fp32 [R, V]."""
        return torch.mm(hidden.float(), weights.head)

    def _buffer(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return uninitialised scratch memory, overwritten by the name's next use: touching fresh pages would cost
        more."""
        count = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name] = torch.empty(count, dtype=dtype)
        return buffer[:count].view(shape)

    def _shared(self, batch: Batch) -> _Shared:
        positions = batch.positions.view(1, -1, 1, batch.num_queries, 1, 1)
        keep = (self.block_positions[: batch.num_blocks] <= positions).float()
        return _Shared(
            offsets=batch.positions % BLOCK,
            cos=self.cos[batch.positions].unsqueeze(1),
            signed_sin=self.signed_sin[batch.positions].unsqueeze(1),
            hide=(keep - 1) * MASKED,
            keep=keep,
        )

    def _attention(
        self, layer: LayerWeights, normed: Tensor, cache: KVCache, index: int, batch: Batch, shared: _Shared
    ) -> Tensor:
        """Compute attention: [R, H] -> [R, nq d] in the model's dtype."""
        config = self.config
        nq, nkv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        queries, group = batch.num_queries, nq // nkv
        entries = normed.shape[0] // queries
        product = torch.mm(normed, layer.qkv)
        if layer.qkv_bias is not None:
            product += layer.qkv_bias
        qkv = product.float().view(-1, nq + 2 * nkv, d)
        heads = qkv[:, : nq + nkv]
        if layer.qk_norms is not None:
            heads = normed_heads(heads, nq, layer.qk_norms, config.rms_norm_eps)
        heads = apply_rotary(heads, shared.cos, shared.signed_sin)
        cache.keys[index][batch.write_blocks, batch.write_slots, :, :, shared.offsets] = heads[:, nq:]
        cache.values[index][batch.write_blocks, batch.write_slots, :, shared.offsets] = qkv[:, nq + nkv :]
        q = heads[:, :nq].reshape(entries, queries, nkv, group, d)
        q = q.transpose(1, 2).reshape(entries * nkv, queries * group, d)
        if batch.entry_slots is None:
            blocks = cache.blocks(index, entries)[: batch.num_blocks]
        else:
            blocks = cache.gather_blocks(index, batch.entry_slots, batch.num_blocks)
        out = self._attend(q, blocks, shared)
        out = out.view(entries, nkv, queries, group, d).transpose(1, 2).reshape(-1, nq * d)
        return out.to(self.dtype)

    def _attend(self, q: Tensor, blocks: list[tuple[Tensor, Tensor]], shared: _Shared) -> Tensor:
        """Compute softmax(q k / sqrt(d)) v for q [B nkv, T g, d], block after block in order.

        The maximum over all blocks is exact, each block's sums have a fixed shape, and a wholly masked block adds
        exact zeros: so the bits do not depend on num_blocks, that is on how long the other sequences are.
        """
        rows, width, d = q.shape
        scores = self._buffer("scores", len(blocks), rows, width, BLOCK)
        for b, (keys, _) in enumerate(blocks):
            torch.baddbmm(scores[b], q, keys, beta=0, alpha=d**-0.5, out=scores[b])
        _, entries, _, queries, _, _ = shared.keep.shape
        grouped = scores.view(len(blocks), entries, rows // entries, queries, width // queries, BLOCK)
        grouped.add_(shared.hide)
        peak = scores.amax(-1, keepdim=True)
        if len(blocks) > 1:
            peak = peak.amax(0, keepdim=True)
        weights = scores.sub_(peak).clamp_(min=SCORE_FLOOR).exp_()
        grouped.mul_(shared.keep)
        sums = weights.sum(-1, keepdim=True)
        out = torch.bmm(weights[0], blocks[0][1])
        total = sums[0]
        for b, (_, values) in enumerate(blocks[1:], start=1):
            out.baddbmm_(weights[b], values)
            total = total + sums[b]
        return out.div_(total)

    def _feed_forward(self, layer: LayerWeights, x: Tensor, normed: Tensor, record: Tensor | None) -> Tensor:
        """Compute x + MLP(normed), [R, H]: what every token passes through, then the chosen experts, which go to
        `record`."""
        if layer.mlp is not None:
            x = torch.addmm(x, self._activated(torch.mm(normed, layer.mlp.gate_up)), layer.mlp.down)
        if layer.router is not None:
            x = x + self._experts(layer, layer.router, normed, record)
        return x

    def _experts(self, layer: LayerWeights, router: Tensor, normed: Tensor, record: Tensor | None) -> Tensor:
        """Sum routing weight * expert(normed) over the chosen experts, [R, H].

        Rows are sorted by expert and each expert's part is filled up to a multiple of `expert_tile` rows, whose
        products have the same bits however many there are: so a row does not depend on what the others choose.
        """
        tile, num_chosen = self.expert_tile, self.config.num_experts_per_tok
        top, chosen = self._routing(router, layer.expert_bias, normed)
        if record is not None:
            record.copy_(chosen)
        expert, order = chosen.flatten().sort(stable=True)
        counts = expert.bincount(minlength=len(layer.experts))
        filled = (counts + (tile - 1)) // tile * tile
        ends = filled.cumsum(0)
        shift = (ends - filled) - (counts.cumsum(0) - counts)  # from a row's place among the chosen to the filled one
        places = torch.arange(len(order)) + shift[expert]
        bounds = [0, *ends.tolist()]
        source = torch.zeros(bounds[-1], dtype=torch.int64).index_put_((places,), order // num_chosen)
        inputs = normed.index_select(0, source)
        width = self.config.moe_intermediate_size
        gate_up = self._buffer("gate_up", bounds[-1], 2 * width, dtype=self.dtype)
        parts = [(mlp, a, b) for mlp, a, b in zip(layer.experts, bounds, bounds[1:], strict=False) if b > a]
        for mlp, a, b in parts:
            torch.mm(inputs[a:b], mlp.gate_up, out=gate_up[a:b])
        act = self._activated(gate_up)
        outputs = self._buffer("outputs", *inputs.shape, dtype=self.dtype)
        for mlp, a, b in parts:
            torch.mm(act[a:b], mlp.down, out=outputs[a:b])
        own = outputs.index_select(0, torch.empty_like(places).index_put_((order,), places))
        return own.view(*top.shape, -1).mul_(top.unsqueeze(-1)).sum(1)

    def _activated(self, gate_up: Tensor) -> Tensor:
        """Compute silu(gate) * up: [R, 2 W] -> [R, W]."""
        gate, up = gate_up.chunk(2, -1)
        act = self._buffer("act", *gate.shape, dtype=self.dtype)
        return torch.ops.aten.silu.out(gate, out=act).mul_(up)

    def _routing(self, router: Tensor, bias: Tensor | None, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights in the model's dtype and ids of the chosen experts, [R, k].

        The chosen experts have the largest scores, the bias added, among the best groups. Their weights are the scores
        without it, renormalised if norm_topk_prob, times the routed scaling factor.
        """
        config, logits = self.config, torch.mm(normed.float(), router)
        if config.score_function == "softmax":
            scores = logits[:, : config.num_experts].softmax(-1)
        else:
            scores = logits.sigmoid_()[:, : config.num_experts]
        ranked = scores if bias is None else scores + bias
        top, chosen = top_experts(ranked, config.num_experts_per_tok, config.n_group, config.topk_group)
        if bias is not None:
            top = scores.gather(-1, chosen)
        if config.norm_topk_prob:
            top = top / (top.sum(-1, keepdim=True) + 1e-20)
        if config.routed_scaling_factor != 1:
            top = top * config.routed_scaling_factor
        return top.to(self.dtype), chosen


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight, the variance in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def normed_heads(heads: Tensor, num_queries: int, weights: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Apply RMS norm to heads, [R, nq + nkv, d] in fp32: first those of queries, then those of keys. weights: [d] each
    for a norm of each head by itself, [nq d] and [nkv d] for one of all queries together, and one of all keys."""
    queries, keys = (
        rms_norm(part.reshape(len(part), -1, len(weight)), weight.float(), eps).view(part.shape)
        for part, weight in zip((heads[:, :num_queries], heads[:, num_queries:]), weights, strict=True)
    )
    return torch.cat((queries, keys), dim=1)


def signed_tables(config: Architecture, context_length: int) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin, [context, rotated part of d]: the sign of rotate-half is folded into sin's first
    half."""
    cos, sin = frequencies(config.rotary, config.head_dim, torch.float32).tables(torch.arange(context_length))
    half = sin.shape[-1] // 2
    return cos, torch.cat((-sin[:, :half], sin[:, half:]), -1)


def apply_rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Apply rotate-half (neox) rotary: (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 of the last axis, or of
    its first part, as wide as the tables."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((apply_rotary(x[..., :width], cos, signed_sin), x[..., width:]), -1)
    return (x * cos).addcmul_(x.roll(width // 2, -1), signed_sin)
