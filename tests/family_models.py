"""Makes tiny models of every family by transformers' own classes, in odd shapes and with random weights."""

from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# head_dim is not hidden_size / heads, the vocabulary is odd, and there is one key-value head, or the head is tied.
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 1,
    "pad_token_id": None,
    "bos_token_id": None,
}
_SHORT = {"original_max_position_embeddings": 24}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, **_SHORT},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **_SHORT,
    },
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
GLM = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "use_qk_norm": True,
    "num_nextn_predict_layers": 0,
    "rope_parameters": ROPES["default"] | {"partial_rotary_factor": 0.5},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied, one key-value head, llama3": (
        "Llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_parameters": ROPES["llama3"]},
    ),
    "llama, linear": ("Llama", {"rope_parameters": ROPES["linear"]}),
    "qwen2": ("Qwen2", {"hidden_size": 64}),
    "qwen2, tied, yarn": (
        "Qwen2",
        {"hidden_size": 64, "tie_word_embeddings": True, "rope_parameters": ROPES["yarn"]},
    ),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS),
    "qwen3-moe, not renormalised, some layers dense": (
        "Qwen3Moe",
        EXPERTS
        | {"head_dim": 24, "norm_topk_prob": False, "mlp_only_layers": [2], "decoder_sparse_step": 2}
        | {"num_hidden_layers": 5},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "mixtral-moe": ("Mixtral", {"hidden_size": 64, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "glm4-moe": ("Glm4Moe", GLM),
    "glm4-moe, groups, biases, no norm of queries": (
        "Glm4Moe",
        GLM
        | {"n_group": 3, "topk_group": 2, "use_qk_norm": False, "attention_bias": True, "head_dim": 24}
        | {"num_hidden_layers": 4, "first_k_dense_replace": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5},
    ),
    "olmoe-moe": (
        "Olmoe",
        {"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 4, "hidden_size": 64},
    ),
    "olmo2": ("Olmo2", {"hidden_size": 64, "rope_parameters": ROPES["linear"]}),
    "phi3": ("Phi3", {"hidden_size": 64, "num_key_value_heads": 1}),
    "qwen3, tied, yarn": ("Qwen3", {"tie_word_embeddings": True, "rope_parameters": ROPES["yarn"]}),
}


def make(case: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a model in fp32 as transformers does, and return its folder."""
    import transformers

    family, own = CASES[case]
    fields = {**SHAPE, "rope_parameters": ROPES["default"], **own, **changes}
    if family in ("Mixtral", "Olmo2", "Olmoe", "Phi3", "Qwen2"):
        del fields["head_dim"]
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**fields))
    with torch.no_grad():
        for parameter in model.parameters():  # those that begin as zeros or ones too
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return folder


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def transformers_logprobs(model: Any, ids: list[int]) -> Tensor:
    """Return the log-probs of all tokens but the first, [n - 1]."""
    logits = model(torch.tensor([ids])).logits[0]
    logp = logits.log_softmax(-1)[:-1]
    return logp[range(len(logp)), ids[1:]]


def transformers_gradient(model: Any, spec: dict) -> dict[str, Tensor]:
    """Return the gradient of the C3PO loss, by transformers' forward pass and torch's autograd."""
    total = 0.0
    algorithm = spec["algorithms"][0]
    low, high = 1 - algorithm["clip_low"], 1 + algorithm["clip_high"]
    for row in spec["sequences"]:
        start, ids = row["num_prompt_tokens"], row["token_ids"]
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)[start - 1 : -1]
        logp = logits[range(len(logits)), ids[start:]]
        entropy = -(logits.exp() * logits).sum(-1)
        stale = torch.arange(len(logp)) < row["num_stale_tokens"]
        old = torch.where(stale, torch.tensor(row["rollout_logprobs"]), logp.detach())
        ratio, advantage = (logp - old).exp(), row["advantage"]
        gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        total = total - (gain + algorithm["entropy_coefficient"] * entropy).sum()
    (total / spec["budget"]).backward()
    found = dict(as_in_files((name, p.grad) for name, p in model.named_parameters()))
    return _as_mixtral(found) if model.config.model_type == "mixtral" else found


def _as_mixtral(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}
    return {reduce(lambda name, pair: name.replace(*pair), names.items(), name): t for name, t in tensors.items()}


def as_in_files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as files have them. transformers holds all experts of a layer in one tensor, but files do not."""
    for name, tensor in tensors:
        before, fused, which = name.partition(".experts.")
        for i, of_expert in enumerate(tensor if fused else ()):
            parts = of_expert.chunk(2) if which == "gate_up_proj" else (of_expert,)
            for part, kind in zip(parts, ("gate_proj", "up_proj") if len(parts) > 1 else (which,), strict=True):
                yield f"{before}.experts.{i}.{kind}.weight", part
        if not fused:
            yield name, tensor
