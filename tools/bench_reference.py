"""This module trains transformers' own mixture-of-experts class at a BailingMoE's shape by torch's AdamW. It shows what
a training loop of forty lines reaches, for tools/bench_gpu.py to compare with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from megatron_rl.families import Architecture


def reference_config(architecture: Architecture) -> Qwen2MoeConfig:
    """Return the configuration with the shape of a BailingMoE. Beyond it, Qwen2Moe has a gate of its shared experts, of
    hidden_size weights a layer.

    ValueError for a shape that it does not have: a normalised head, or layers without shared experts.
    """
    if architecture.norm_head or not architecture.shared_intermediate_size:
        raise ValueError(
            f"Qwen2Moe has shared experts and a plain head, got {architecture.shared_intermediate_size} and "
            f"norm_head {architecture.norm_head}; compare another shape"
        )
    return Qwen2MoeConfig(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.num_hidden_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_key_value_heads,
        head_dim=architecture.head_dim,
        moe_intermediate_size=architecture.moe_intermediate_size,
        shared_expert_intermediate_size=architecture.shared_intermediate_size,
        num_experts=architecture.num_experts,
        num_experts_per_tok=architecture.num_experts_per_tok,
        norm_topk_prob=architecture.norm_topk_prob,
        mlp_only_layers=list(architecture.dense_layers),
        qkv_bias=False,
        tie_word_embeddings=architecture.tie_word_embeddings,
        max_position_embeddings=architecture.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rotary.theta},
        rms_norm_eps=architecture.rms_norm_eps,
        initializer_range=architecture.initializer_range,
        use_cache=False,
    )


def ratios(ours: Mapping[str, Any], reference: Mapping[str, Any], micro_batches: int) -> dict[str, dict[str, float]]:
    """Return our tokens/s over the reference's at the same tokens, of a micro-batch and of a step with its optimizer.
    Empty where one of them has no `seconds`."""
    if "seconds" not in ours or "seconds" not in reference:
        return {}
    step, step_of_reference = (micro_batches * row["seconds"] + row["seconds_of_step"] for row in (ours, reference))
    found = {"micro_batch": (reference["seconds"], ours["seconds"]), "step": (step_of_reference, step)}
    # Seconds of a micro-batch are a difference of two times, which noise can make 0 where little is computed.
    return {"ours_over_reference": {name: round(a / b, 3) for name, (a, b) in found.items() if b > 0}}


class Reference:
    """Holds the model in bf16, its fastest experts and attention that need no further package, and AdamW on its bf16
    weights.

    That is less work than ours has, which adds gradients up in fp32 and keeps fp32 weights besides. `lengths` are those
    of a micro-batch's sequences, all the same.
    """

    def __init__(self, architecture: Architecture, lengths: Sequence[int], where: torch.device) -> None:
        assert len(set(lengths)) == 1
        with where:
            self.model = Qwen2MoeForCausalLM._from_config(
                reference_config(architecture),
                dtype=torch.bfloat16,
                attn_implementation="sdpa",
                experts_implementation="grouped_mm",
            )
            self._tokens = torch.randint(architecture.vocab_size, (len(lengths), lengths[0]))
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def step(self, count: int) -> float:
        """Run an optimizer step over the micro-batch `count` times. Return the mean loss, for which the host waits."""
        total = torch.zeros([], device=self._tokens.device)
        for _ in range(count):
            loss = self.model(input_ids=self._tokens, labels=self._tokens).loss / count
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)
